"""Pictures of every kind and layout, cropped as the stock image-to-video pipeline is given them."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path

import numpy
import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
from diffusers.utils import load_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wan_distill.data import picture_decoding
from wan_distill.data.picture_decoding import decode
from wan_distill.data.pictures import (
    BUILT_IN_PICTURES,
    NEUTRAL_CAPTION,
    read_picture,
    read_pictures,
)
from wan_distill.errors import FileError, UsageError
from wan_distill.settings.assets import EMBEDDED_TEACHER

RED, BLUE = (230, 20, 30), (10, 40, 220)


def painting(width: int = 80, height: int = 48, mode: str = "RGB") -> Image.Image:
    """Red on the left, blue on the right, with a gradient, so that no two columns are equal."""
    pixels = numpy.zeros((height, width, 3), "uint8")
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    pixels[..., 1] = numpy.linspace(0, 200, width).astype("uint8")
    return Image.fromarray(pixels).convert(mode)


def stored(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def put(folder: Path, **files: bytes | str) -> Path:
    """Writes files, `__` in whose names stands for the dot."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def sixteen_bit() -> Image.Image:
    return Image.fromarray(numpy.linspace(0, 65535, 80 * 48).reshape(48, 80).astype("uint16"))


def turned() -> bytes:
    """Stored lying on its side, as a camera held upright does."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored(painting().transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)


def see_through() -> Image.Image:
    image = painting(mode="RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def animation(format: str) -> bytes:
    others = [painting().rotate(angle) for angle in (90, 180)]
    return stored(painting(), format, save_all=True, append_images=others)


def palette_with_hole() -> bytes:
    image = painting().quantize(16)
    return stored(image, "PNG", transparency=0)


# ---------------------------------------------------------------------------------------- layouts

CAPTIONS = {"a.png": "a cat turns", "b.jpg": "a dog, running"}
ROWS = [{"file_name": name, "text": text} for name, text in CAPTIONS.items()]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)
PICTURES = dict(a__png=stored(painting()), b__jpg=stored(painting(64, 64), "JPEG"))


@pytest.mark.parametrize(
    "captions",
    [
        dict(a__txt="a cat turns\n", b__TXT="\ufeffa dog,\nrunning"),
        dict(a__txt="a cat turns".encode("utf-16"), b__txt="a dog, running"),
        dict(metadata__jsonl=JSONL),
        dict(metadata__jsonl=JSONL.replace("text", "Caption").replace("a.png", "./a.png")),
        dict(metadata__jsonl=JSONL, a__txt="another caption"),
        dict(metadata__csv='file_name,text\na.png,a cat turns\nb.jpg,"a dog, running"\n'),
        dict(
            Metadata__CSV="sep=;\r\nprompt;File_Name\r\na cat turns;a.png\r\na dog, running;b.jpg"
        ),
    ],
)
def test_every_layout_gives_the_same_pictures(tmp_path, captions):
    folder = put(tmp_path / "photos", **PICTURES, **captions)
    records = read_pictures(folder)
    assert {record.name: record.caption for record in records} == CAPTIONS
    assert [record.image().size for record in records] == [(80, 48), (64, 64)]


def test_a_folder_is_read_whatever_else_lies_in_it(tmp_path):
    said = []
    folder = put(
        tmp_path / "photos",
        **PICTURES,
        a__txt="a cat\nturns",
        c__png=PICTURES["a__png"],  # the same picture, but without its caption
        d__png=PICTURES["a__png"],
        e__txt="a caption of nothing",
        clip__mp4=b"\0",
        __DS_Store=b"\0",
    )
    put(folder / "more", f__png=PICTURES["a__png"])
    records = read_pictures(folder, said.append)
    assert [(record.name, record.caption) for record in records] == [
        ("a.png", "a cat turns"),
        ("b.jpg", NEUTRAL_CAPTION),
        ("c.png", NEUTRAL_CAPTION),
    ]
    assert records[0].key == records[2].key != records[1].key
    assert said[0] == (f"--images {folder / 'd.png'}: the same as {folder / 'c.png'}; used once")
    assert sorted(line.split(": ", 1)[1].split(" (")[0] for line in said[1:]) == [
        "1 captions of several lines, each made one",
        "1 captions without a picture left out",
        "1 files that are no pictures left out",
        "1 pictures in subfolders left out",
        f'2 pictures without a caption, which get "{NEUTRAL_CAPTION}"',
    ]


def test_metadata_without_captions_and_pictures_that_it_does_not_name(tmp_path):
    said = []
    (tmp_path / "sub").mkdir()
    put(tmp_path / "sub", a__png=PICTURES["a__png"])
    put(tmp_path, **PICTURES, metadata__jsonl='{"file_name": "sub/a.png", "text": null}')
    (record,) = read_pictures(tmp_path, said.append, size=(96, 64))
    assert (record.name, record.caption) == ("sub/a.png", NEUTRAL_CAPTION)
    assert [line.split(": ", 1)[1].split(" (")[0] for line in said] == [
        "2 pictures that the metadata does not name left out",
        f'1 pictures without a caption, which get "{NEUTRAL_CAPTION}"',
        "1 pictures smaller than the clip, enlarged",
    ]


def test_a_single_picture_has_the_caption_beside_it(tmp_path):
    put(tmp_path, **PICTURES, b__txt=" a dog\n")
    assert read_picture(tmp_path / "b.jpg").caption == "a dog"
    assert read_picture(tmp_path / "a.png").caption == NEUTRAL_CAPTION
    with pytest.raises(UsageError, match=r"^--image .*c.png: cannot be read .No such file"):
        read_picture(tmp_path / "c.png")


def test_long_captions_are_named(tmp_path):
    said = []
    put(tmp_path, **PICTURES, a__txt="a cat")
    read_pictures(tmp_path, said.append, too_long=lambda caption: f"{len(caption)} letters")
    assert said[0] == f"--images {tmp_path / 'a.png'}: 5 letters" and len(said) == 2


# ------------------------------------------------------------------------------------- what is seen


@pytest.mark.parametrize(
    "data, remark",
    [
        (stored(painting()), None),
        (stored(painting().quantize()), None),
        (stored(painting(), "JPEG", quality=95), None),
        (stored(painting(mode="CMYK"), "JPEG", quality=95), None),
        (stored(painting(), "WEBP", lossless=True), None),
        (stored(painting(), "BMP"), None),
        (stored(painting(mode="RGBA")), None),  # alpha that hides nothing
        (turned(), None),
        (animation("GIF"), "animations, of which the first frame is used"),
        (animation("PNG"), "animations, of which the first frame is used"),
        (animation("TIFF"), "animations, of which the first frame is used"),
        (animation("MPO"), None),  # a camera's second, smaller picture
    ],
)
def test_what_everybody_sees_is_what_is_read(tmp_path, data, remark):
    said = []
    put(tmp_path, a__png=data, a__txt="a cat")
    (record,) = read_pictures(tmp_path, said.append)
    image = record.image()
    assert image.mode == "RGB" and image.size == (80, 48)
    error = numpy.asarray(image).astype(float) - numpy.asarray(painting())
    assert numpy.abs(error).mean() < 8  # of a palette, or of JPEG
    assert (f"1 {remark}" in said[0] and len(said) == 1) if remark else not said


@pytest.mark.parametrize(
    "mode, shades",
    [("L", (0, 255)), ("1", (0, 255)), ("LA", (0, 255)), ("I;16", (0, 255))],
)
def test_grey_pictures_are_grey(mode, shades):
    image = sixteen_bit() if mode == "I;16" else Image.linear_gradient("L").convert(mode)
    pixels = numpy.asarray(decode(stored(image))[0])
    assert (pixels == pixels[..., :1]).all() and (pixels.min(), pixels.max()) == shades
    if mode != "1":
        assert abs(pixels.mean() - 127.5) < 1  # neither cut off nor dark


@pytest.mark.parametrize(
    "data", [stored(see_through()), stored(see_through(), "WEBP", lossless=True)]
)
def test_what_is_transparent_becomes_white(tmp_path, data):
    said = []
    put(tmp_path, a__png=data, a__txt="a cat")
    (record,) = read_pictures(tmp_path, said.append)
    pixels = numpy.asarray(record.image()).astype(int)
    assert pixels[0].min() >= 250  # wholly transparent
    assert abs(pixels[-1] - numpy.asarray(painting())[-1].astype(int)).max() < 12  # hardly
    assert "1 transparent pictures, laid on white" in said[0]


def test_a_transparent_colour_of_a_palette_becomes_white():
    pixels = numpy.asarray(decode(palette_with_hole())[0])
    assert (pixels == 255).all(axis=-1).any()


def test_sixteen_bits_are_rounded_and_this_is_said(tmp_path):
    said = []
    put(tmp_path, a__png=stored(sixteen_bit()), a__txt="a cat")
    read_pictures(tmp_path, said.append)
    assert "1 pictures of 16 bits, rounded to 8" in said[0]


@pytest.mark.parametrize("data", [stored(painting()), stored(painting(), "JPEG"), turned()])
def test_opaque_pictures_are_what_diffusers_loads(tmp_path, data):
    put(tmp_path, a__png=data)
    ours = numpy.asarray(read_picture(tmp_path / "a.png").image())
    assert (ours == numpy.asarray(load_image(str(tmp_path / "a.png")))).all()


@pytest.mark.parametrize(
    "size, clip, shown",
    [
        ((80, 48), (64, 64), (48, 48)),
        ((80, 48), (48, 80), (80, 48)),
        ((48, 80), (64, 64), (48, 48)),
        ((832, 480), (480, 832), (832, 480)),
        ((1920, 1080), (480, 832), (1872, 1080)),
        ((333, 777), (480, 832), (333, 192)),
        ((1000, 77), (480, 832), (133, 77)),
    ],
)
def test_pixels_are_those_of_the_stock_pipeline_bit_for_bit(tmp_path, size, clip, shown):
    put(tmp_path, a__png=stored(painting(*size)))
    record = read_picture(tmp_path / "a.png")
    cropped = record.cropped(*clip)
    assert cropped.size == shown
    # In the middle: as much is lost on one side as on the other.
    left, top = (size[0] - shown[0]) // 2, (size[1] - shown[1]) // 2
    whole = numpy.asarray(painting(*size))
    part = whole[top : top + shown[1], left : left + shown[0]]
    assert (numpy.asarray(cropped) == part).all()

    vae = AutoencoderKLWan.from_pretrained(EMBEDDED_TEACHER / "vae")
    pipeline = WanImageToVideoPipeline(None, None, vae, None)
    expected = pipeline.video_processor.preprocess(cropped, height=clip[0], width=clip[1])
    pixels = record.pixels(*clip)
    assert pixels.dtype == torch.float32 and pixels.shape == (3, *clip)
    assert torch.equal(pixels, expected[0]) and pixels.min() < -0.8 and pixels.max() > 0.7


# ---------------------------------------------------------------------------------------- bad input

PNG, JPEG = stored(painting()), stored(painting(), "JPEG")
BOMB, LARGE = (f"P6 {side} {side} 255\n".encode() for side in (60_000, 10_000))


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "is empty; convert it"),
        (b"<html>Not found</html>", "is no picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no picture"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which Pillow does not read"),
        (PNG[: len(PNG) // 2], "is damaged"),
        (JPEG[: len(JPEG) // 2], r"is damaged \(Truncated File Read\); export it again"),
        (PNG[:60] + b"\0\0\0\0" + PNG[64:], "is damaged"),
        (BOMB, "has more than 89 million pixels; make it smaller"),
        (LARGE, "has more than 89 million pixels; make it smaller"),
        (stored(painting(1, 400)), "is 1 x 400 pixels; give pictures of 16 pixels or more"),
        (stored(painting(3000, 20)), "is 3000 x 20 pixels, of which clips of 64 x 96 show 13 x 20"),
        (stored(Image.new("F", (64, 64)), "TIFF"), "floating-point values"),
        (stored(Image.new("I", (64, 64), 70_000), "TIFF"), "values of 32 bits"),
    ],
)
def test_bad_pictures_are_refused_in_one_line(tmp_path, data, reason, recwarn):
    put(tmp_path, a__png=PNG, b__png=data)
    with pytest.raises(UsageError, match=f"^--images .*b.png: .*{reason}") as error:
        read_pictures(tmp_path, size=(96, 64))
    assert "\n" not in str(error.value) and not recwarn.list


def test_the_first_bad_picture_is_named_and_the_others_counted(tmp_path):
    put(tmp_path, a__png=PNG, b__png=b"", c__png=b"", d__png=b"")
    with pytest.raises(UsageError, match=r"b.png: is empty; .*and 2 others are bad"):
        read_pictures(tmp_path)


@pytest.mark.parametrize(
    "files, reason",
    [
        (dict(a__txt=b"\xe9t\xe9"), "a.txt:1: not UTF-8"),
        (dict(a__txt=b"PK\x03\x04"), "a.txt: a binary file"),
        (dict(metadata__jsonl='{"file_name": "b.png"}'), "jsonl: record 1: names b.png, which is"),
        (dict(metadata__jsonl='{"file_name": "a.png"}\n{}\n{'), "metadata.jsonl:2: no file_name"),
        (dict(metadata__jsonl='{"text": "a cat"}\n"a.png"'), "metadata.jsonl:1: no file_name"),
        (dict(metadata__jsonl='{"file_name": "a.png"}\n{'), "metadata.jsonl:2: malformed"),
        (dict(metadata__jsonl='"a.png"\n"b.png"'), "metadata.jsonl:1: no file_name"),
        (dict(metadata__jsonl='[{"file_name": 1}]'), "record 1: no file_name"),
        (dict(metadata__jsonl='{"image": "a.png", "text": "a"}'), "record 1: no file_name"),
        (dict(metadata__jsonl='[{"file_name": "../a.png"}]'), "leads out of the folder"),
        (dict(metadata__jsonl='[{"file_name": "sub/../../a.png"}]'), "leads out of the folder"),
        (dict(metadata__jsonl='[{"file_name": "/etc/a.png"}]'), "leads out of the folder"),
        (dict(metadata__jsonl=r'[{"file_name": "C:\\a.png"}]'), "leads out of the folder"),
        (dict(metadata__jsonl='[{"file_name": "."}]'), "leads out of the folder"),
        (dict(metadata__jsonl='[{"file_name": "a.png", "text": "\\ud83d"}]'), "half a character"),
        (dict(metadata__csv="name,text\na.png,a cat"), "metadata.csv:1: the header names none of"),
        (dict(metadata__csv=b"file_name,text\na.png,\xe9"), "metadata.csv:2: not UTF-8"),
        (dict(metadata__csv="file_name\na.png", metadata__jsonl=JSONL), "keep one of"),
        (dict(metadata__parquet=b"PAR1"), "holds metadata.parquet; keep one of"),
    ],
)
def test_bad_captions_are_refused_in_one_line(tmp_path, files, reason):
    put(tmp_path, a__png=PNG, **files)
    with pytest.raises(UsageError, match=f"^--images .*{reason}") as error:
        read_pictures(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("empty", "holds no picture"),
        ("unnamed", "its metadata.jsonl names no picture; fill it in, or delete it"),
        ("a.png", "is a file; give a folder"),
        ("nothing", "there is no such folder"),
        ("sub/no/thing", "there is no such folder"),
        ("n" * 300, "there is no such folder"),
        ("named", "cannot be read"),
    ],
)
def test_what_is_no_folder_of_pictures_is_refused(tmp_path, name, reason):
    put(tmp_path / "empty", a__txt="a cat")
    put(tmp_path, a__png=PNG)
    put(tmp_path / "unnamed", a__png=PNG, metadata__jsonl="")
    put(tmp_path / "named", metadata__csv="file_name\nsub.png")
    (tmp_path / "named" / "sub.png").mkdir()
    with pytest.raises(UsageError, match=f"^--images .*{name}.*: {reason}"):
        read_pictures(tmp_path / name)


def test_a_pillow_without_a_format_reads_the_others(monkeypatch):
    picture_decoding._readable.cache_clear()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    assert decode(stored(painting(), "TIFF"))[0].size == (80, 48)
    picture_decoding._readable.cache_clear()


FILES = [
    *(stored(painting(), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM")),
    turned(),
    stored(sixteen_bit()),
]


@pytest.mark.filterwarnings("ignore")  # Pillow's, of the damage
@settings(max_examples=150, deadline=None)
@given(data=st.sampled_from(FILES), place=st.integers(0, 10_000), value=st.integers(0, 255))
def test_damage_anywhere_gives_a_picture_or_one_error(data, place, value):
    damaged = bytearray(data)
    damaged[place % len(data)] = value
    try:
        image, _ = decode(bytes(damaged))
    except FileError as error:
        assert "\n" not in str(error)
    else:
        assert image.mode == "RGB"


# -------------------------------------------------------------------------------------- data sets


class Rows(list):
    """What `datasets` gives: a table with typed columns."""

    features: dict

    @property
    def column_names(self):
        return list(self.features)

    def cast_column(self, column, kind):
        assert kind.decode is False  # the bytes as they are stored
        return self

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


class ImageFeature:
    def __init__(self, decode=True):
        self.decode = decode


ImageFeature.__name__ = "Image"


def test_a_data_set_with_a_column_of_images(monkeypatch, tmp_path):
    (tmp_path / "b.jpg").write_bytes(JPEG)
    rows = Rows(
        [
            {"photo": {"bytes": PNG, "path": "a.png"}, "text": "a cat"},
            {"photo": {"bytes": None, "path": str(tmp_path / "b.jpg")}, "text": None},
        ]
    )
    rows.features = {"photo": ImageFeature(), "text": object()}

    def load_dataset(name, split):
        if name != "some/pictures":
            raise FileNotFoundError(f"no dataset {name}")
        return rows

    package = types.SimpleNamespace(
        load_dataset=load_dataset, load_from_disk=lambda place: {"train": rows}, Image=ImageFeature
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    records = read_pictures("some/pictures")
    assert [(record.name, record.caption) for record in records] == [
        ("some/pictures[0]", "a cat"),
        ("some/pictures[1]", NEUTRAL_CAPTION),
    ]
    assert records[1].image().size == (80, 48)
    put(tmp_path / "saved", dataset_info__json="{}")
    assert [record.key for record in read_pictures(tmp_path / "saved")] == [
        record.key for record in records
    ]
    with pytest.raises(UsageError, match="--images other/one: neither a file nor a dataset"):
        read_pictures("other/one")
    rows[1]["photo"] = None
    with pytest.raises(UsageError, match=r"some/pictures\[1\]: has no picture"):
        read_pictures("some/pictures")
    rows.features = {"photo": ImageFeature(), "mask": ImageFeature()}
    with pytest.raises(UsageError, match="several columns of images"):
        read_pictures("some/pictures")
    rows.features = {"photo": object()}
    with pytest.raises(UsageError, match="has no such column; name one"):
        read_pictures("some/pictures")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="pip install datasets"):
        read_pictures("some/pictures")


def test_the_built_in_pictures_are_few_small_and_distinct():
    said = []
    records = read_pictures(BUILT_IN_PICTURES, said.append, size=(480, 832))
    assert not said and len(records) >= 16
    assert len({record.caption for record in records}) == len(records)
    assert all(8 <= len(record.caption.split()) <= 60 for record in records)
    files = list(BUILT_IN_PICTURES.iterdir())
    assert sum(file.stat().st_size for file in files) < 300_000
