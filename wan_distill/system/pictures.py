"""Clips as pictures: mp4 files, and a sheet of frames that compares samplers."""

from __future__ import annotations

import errno
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from diffusers.utils import export_to_video
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from wan_distill.layout import strip_of
from wan_distill.system.files import written_aside

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

TEXT_SIZE = 10  # pixels
NAME_WIDTH = 190  # pixels to the left of the frames, for the samplers' names
FRAME_HEIGHT = 96  # pixels; smaller frames are enlarged by whole numbers
GAP = 2  # pixels between frames
TITLE_HEIGHT = 24  # pixels above the frames of a prompt, for its text
# Linux, macOS, Windows; for all users and for this one.
FONT_FOLDERS = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "~/.local/share/fonts",
    "~/.fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
    "~/Library/Fonts",
    "C:/Windows/Fonts",
    "~/AppData/Local/Microsoft/Windows/Fonts",
)
FONT_FILES = (".ttf", ".ttc", ".otf")
# Words in the names of fonts that are harder to read in small sizes: tried last.
STYLES = (
    "bold",
    "black",
    "italic",
    "oblique",
    "light",
    "thin",
    "condensed",
    "serif",
    "math",
    "mono",
)
NO_CHARACTER = "\U0010ffff"  # never assigned: every font draws its box in place of it


def contact_sheet(
    file: Path, clips: dict[str, Tensor], prompts: list[str], frames: int = 6
) -> None:
    """Writes a PNG with one block per prompt: a row of frames for each sampler.

    Args:
        file: the PNG. It appears only when it is complete.
        clips: sampler name -> [prompts, F, H, W, 3] in [0, 1].
        prompts: one for each clip of a sampler.
        frames: at most this many frames per clip, evenly spaced in time.
    """
    height, width = next(iter(clips.values())).shape[2:4]
    scale = max(1, FRAME_HEIGHT // height)
    size = (width * scale, height * scale)
    row = size[1] + GAP
    block = TITLE_HEIGHT + len(clips) * row + GAP
    sheet_size = (NAME_WIDTH + frames * (size[0] + GAP), block * len(prompts))
    sheet = Image.new("RGB", sheet_size, "white")
    draw = ImageDraw.Draw(sheet)
    for p, prompt in enumerate(prompts):
        draw_line(draw, (6, p * block + 7), prompt, sheet.width - 12)
        for r, (name, clip) in enumerate(clips.items()):
            top = p * block + TITLE_HEIGHT + r * row
            draw_line(draw, (6, top + size[1] // 2 - 6), name, NAME_WIDTH - 12)
            times = torch.linspace(0, clip.shape[1] - 1, min(frames, clip.shape[1])).round().long()
            for column, frame in enumerate(clip[p, times]):
                picture = Image.fromarray((frame * 255).round().byte().numpy())
                enlarged = picture.resize(size, Image.Resampling.NEAREST)
                sheet.paste(enlarged, (NAME_WIDTH + column * (size[0] + GAP), top))
    with written_aside(file) as aside:
        sheet.save(aside, format="PNG")


def draw_line(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int) -> None:
    """Draws `text` as one line at `place` (left, top), shortened to `width` pixels."""
    font, line = font_for(" ".join(text.split()))
    line = line[:width]  # no character is narrower than a pixel
    while font.getlength(line) > width:
        line = line[:-1]
    draw.text(place, line, font=font, fill="black")


def font_for(text: str) -> tuple[Font, str]:
    """The font that can draw most of `text`, and `text` with escapes (`\\u4e2d`) for the rest.

    Pillow's own font draws ASCII; for everything else the installed fonts are searched.
    """
    best: Font = ImageFont.load_default(TEXT_SIZE)
    missing = missing_in(best, text)
    fonts = installed_fonts()
    while missing and (font := next(fonts, None)):
        left = missing_in(font, text)
        if len(left) < len(missing):
            best, missing = font, left
    escapes = {ord(c): c.encode("ascii", "backslashreplace").decode() for c in missing}
    return best, text.translate(escapes)


def missing_in(font: Font, text: str) -> set[str]:
    """The characters of `text` in place of which `font` draws its box."""
    box = bytes(font.getmask(NO_CHARACTER))
    return {c for c in set(text) if not c.isspace() and bytes(font.getmask(c)) == box}


def installed_fonts() -> Iterator[Font]:
    """The fonts in this machine's font folders, plain ones first."""
    folders = [Path(folder).expanduser() for folder in FONT_FOLDERS]
    files = [f for folder in folders for f in folder.rglob("*") if f.suffix.lower() in FONT_FILES]

    def order(file: Path) -> tuple[bool, str]:
        return any(style in file.stem.lower() for style in STYLES), file.name

    for file in sorted(files, key=order):
        try:
            yield ImageFont.truetype(file, TEXT_SIZE)
        except OSError:  # damaged, or bitmaps (emoji) in other sizes only
            continue


def write_video(file: Path, frames: numpy.ndarray, fps: int) -> Path:
    """Writes a clip as mp4 or, where no encoder is installed, as a strip of its frames.

    Args:
        file: the mp4. It appears only when it is complete; its folder is made.
        frames: [F, H, W, 3] in [0, 1].
        fps: frames per second.

    Returns:
        The file that was written.

    Raises OSError where it cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        strip = strip_of(file)
        picture = numpy.concatenate(list(frames), axis=1)
        with written_aside(strip) as aside:
            Image.fromarray((picture * 255).round().astype("uint8")).save(aside, format="PNG")
        return strip
    with written_aside(file, ".mp4") as aside:
        export_to_video(list(frames), str(aside), fps=fps, macro_block_size=2)
        _check_whole(aside, len(frames), file)
    return file


def _check_whole(written: Path, frames: int, file: Path) -> None:
    """Raises OSError where the encoder did not write all `frames`: on a full disk it ends as if
    nothing had happened.

    Args:
        file: what it was to become.
    """
    from imageio_ffmpeg import count_frames_and_secs

    try:
        found, _ = count_frames_and_secs(str(written))
    except RuntimeError:  # its index is missing
        found = 0
    if found < frames:
        raise OSError(
            errno.EIO, "the encoder did not finish it; see whether the disk is full", file
        )
