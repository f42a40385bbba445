"""One picture: from its bytes to what the stock pipeline makes of it."""

from __future__ import annotations

import io
import struct
import zlib
from functools import lru_cache

import numpy
from diffusers.video_processor import VideoProcessor
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from wan_distill.errors import FileError, one_line

# Those that Pillow reads by itself: one that is not listed may start another program (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM")
MOST_PIXELS = 89_478_485  # of a picture: where Pillow warns of files that unpack to fill the memory
LEAST_SIDE = 16  # pixels, whole or cropped: Wan's VAE makes 2 latents of them
ANIMATED = "animations, of which the first frame is used"
TRANSPARENT = "transparent pictures, laid on white"
SIXTEEN_BIT = "pictures of 16 bits, rounded to 8"
OTHERWISE = "export it again, or take it away"
# What Pillow's readers raise for damaged files, beside errors of the system.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
)


def decode(data: bytes) -> tuple[Image.Image, list[str]]:
    """(the picture as RGB of 8 bits, upright; what was done to it that changes what is seen).

    As `diffusers.utils.load_image` reads it, but transparent parts become white instead of what
    happens to lie under them, and 16 bits are rounded instead of cut off.

    Raises FileError for what is no picture, damaged, too small or too large.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_readable())
        size = image.size
        # Cameras store a second, smaller picture in an MPO; that is no animation.
        animated = getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        if size[0] * size[1] <= MOST_PIXELS:
            image.load()
            image = ImageOps.exif_transpose(image)
            image, notes = _to_rgb(image)
    except Image.DecompressionBombError as error:
        raise _too_many_pixels() from error
    except UnidentifiedImageError as error:
        raise FileError(
            f"is {_kind(data)}", "convert it to PNG or JPEG, or take it away"
        ) from error
    except DAMAGE as error:
        raise FileError(f"is damaged ({one_line(error)})", OTHERWISE) from error
    if size[0] * size[1] > MOST_PIXELS:
        raise _too_many_pixels()
    _check_sides(image.size)
    return image, [ANIMATED] * animated + notes


@lru_cache(maxsize=1)
def _readable() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with: it fails for all where one is unknown."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _too_many_pixels() -> FileError:
    return FileError(f"has more than {MOST_PIXELS / 1e6:.0f} million pixels", "make it smaller")


def _check_sides(size: tuple[int, int]) -> None:
    if min(size) < LEAST_SIDE:
        raise FileError(
            f"is {size[0]} x {size[1]} pixels",
            f"give pictures of {LEAST_SIDE} pixels or more on each side, or take it away",
        )


def _kind(data: bytes) -> str:
    """What Pillow cannot read is, in words."""
    if not data:
        return "empty"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"heim", b"hevc"):
        return "HEIC, which Pillow does not read"
    return "no picture, or of a format that is not read"


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """RGB of 8 bits, and what was done. Raises ValueError."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values, which have no white; save it in 8 bits")
    if image.mode.startswith("I"):
        values = numpy.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("it holds values of 32 bits; save it in 8 bits")
        rounded = (values / 257).round().astype("uint8")
        return Image.fromarray(rounded).convert("RGB"), [SIXTEEN_BIT]
    if not image.has_transparency_data:
        return image.convert("RGB"), []
    layers = image.convert("RGBA")
    notes = [TRANSPARENT] if layers.getchannel("A").getextrema() != (255, 255) else []
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB"), notes


def crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of the aspect width : height, to a pixel; not resized.

    The stock pipeline resizes what it is given, whatever its aspect: it would stretch the rest.
    Raises FileError where that part is too small.
    """
    cropped_width = min(image.width, max(1, round(image.height * width / height)))
    cropped_height = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - cropped_width) // 2, (image.height - cropped_height) // 2
    try:
        _check_sides((cropped_width, cropped_height))
    except FileError as error:
        raise FileError(
            f"is {image.width} x {image.height} pixels, of which clips of {width} x {height} show "
            f"{cropped_width} x {cropped_height}",
            "give a larger one, or of another aspect",
        ) from error
    return image.crop((left, top, left + cropped_width, top + cropped_height))


@lru_cache(maxsize=1)
def _processor() -> VideoProcessor:
    return VideoProcessor(vae_scale_factor=8)  # that of WanImageToVideoPipeline


def to_pixels(image: Image.Image, height: int, width: int) -> Tensor:
    """[3, height, width] in [-1, 1], float32, by the stock pipeline's own function.

    Args:
        image: RGB; multiples of 8 for height and width, which it would round otherwise.
    """
    pixels: Tensor = _processor().preprocess(image, height=height, width=width)[0]
    return pixels
