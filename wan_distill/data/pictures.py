"""Pictures that clips begin with, and their captions: read and checked before weights load."""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from wan_distill.data.picture_decoding import crop, decode, to_pixels
from wan_distill.data.picture_folders import METADATA, Source, file_source, sources
from wan_distill.data.prompt_text import check_characters
from wan_distill.data.remarks import Remarks
from wan_distill.errors import FileError, UsageError
from wan_distill.settings.assets import ASSETS

BUILT_IN_PICTURES = ASSETS / "pictures"
NEUTRAL_CAPTION = "the scene comes to life with natural motion"
NO_CAPTION = f'pictures without a caption, which get "{NEUTRAL_CAPTION}"'
ENLARGED = "pictures smaller than the clip, enlarged"
WORKERS = 8  # threads at most; each holds one whole picture


@dataclass(frozen=True)
class PictureRecord:
    """One picture and what its clip shows.

    Attributes:
        name: its file relative to the folder, or `id[row]`.
        caption: text without white space around it, never empty.
        key: 32 hexadecimal digits of the SHA-256 of the picture's bytes as they are stored.
        read: gives those bytes.
    """

    name: str
    caption: str
    key: str
    read: Callable[[], bytes]

    def image(self) -> Image.Image:
        """The whole picture: RGB, upright. Raises FileError where it is not any more what it was
        when it was checked.
        """
        return decode(self.read())[0]

    def cropped(self, height: int, width: int) -> Image.Image:
        """The largest centred part of the aspect width : height, not resized: what the stock
        pipeline must be given for the same clip.
        """
        return crop(self.image(), height, width)

    def pixels(self, height: int, width: int) -> Tensor:
        """[3, height, width] in [-1, 1], float32: bit-equal to what WanImageToVideoPipeline's
        `video_processor.preprocess` makes of `cropped(height, width)`.
        """
        return to_pixels(self.cropped(height, width), height, width)


def read_pictures(
    source: Path | str,
    say: Callable[[str], None] = lambda line: None,
    flag: str = "--images",
    size: tuple[int, int] | None = None,
    too_long: Callable[[str], str] = lambda caption: "",
) -> list[PictureRecord]:
    """The distinct pictures in `source`, in the order of their names, of the metadata file or of
    the rows. Every one is decoded once, so that a bad one is found here.

    Args:
        source: a folder of pictures with captions beside them (`name.txt`), or with metadata.jsonl
            or metadata.csv as `datasets` reads them; a saved data set; or the id of a data set with
            a column of images.
        say: gets one line for each kind of what is left out or changed, and for each duplicate and
            each caption that is too long, up to a number of them.
        flag: what the lines begin with.
        size: (height, width) of the clips; None: not known yet.
        too_long: says why a caption is not used whole, or nothing.

    Raises UsageError where there is no picture, and for pictures and captions that cannot be used.
    """
    remarks = Remarks(flag, str(source), say)
    found = list(sources(str(source), remarks))
    first_place: dict[tuple[str, str], str] = {}  # picture and caption -> where they were first
    records = []
    for place, (record, notes) in zip(found, _check_all(found, flag, size), strict=True):
        if (record.key, record.caption) in first_place:
            first = first_place[record.key, record.caption]
            remarks.name("duplicates", place.where, f"the same as {first}; used once")
            continue
        first_place[record.key, record.caption] = place.where
        for note in notes:
            remarks.count(note, place.where)
        if place.caption.strip() and (remark := too_long(record.caption)):
            remarks.name("long captions", place.where, remark)
        records.append(record)
    remarks.sum_up()
    if not records:
        lists = [name for name in METADATA if Path(source, name).is_file()]
        raise UsageError(
            f"{flag} {source}: its {lists[0]} names no picture; fill it in, or delete it"
            if lists
            else f"{flag} {source}: holds no picture; give a folder of PNG, JPEG or WebP files"
        )
    return records


def read_picture(
    file: Path | str, flag: str = "--image", size: tuple[int, int] | None = None
) -> PictureRecord:
    """A single picture; its caption is what `NAME.txt` beside it says, or the neutral one. Raises
    UsageError as `read_pictures` does.
    """
    return _check_all([file_source(Path(file), flag)], flag, size)[0][0]


def _check_all(
    found: list[Source], flag: str, size: tuple[int, int] | None
) -> list[tuple[PictureRecord, list[str]]]:
    """Each one's record, and what was done to it. Raises UsageError for the first that is bad, with
    the number of the others.
    """
    workers = min(WORKERS, os.cpu_count() or 1)
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        # What Pillow warns of is either refused or used.
        warnings.filterwarnings("ignore", module="PIL")
        checked = list(pool.map(functools.partial(_check, flag=flag, size=size), found))
    bad = [
        (place, result)
        for place, result in zip(found, checked, strict=True)
        if isinstance(result, FileError)
    ]
    if bad:
        place, error = bad[0]
        others = f" (and {len(bad) - 1} others are bad)" if len(bad) > 1 else ""
        raise UsageError(f"{flag} {place.where}: {error}{others}") from error
    return [result for result in checked if not isinstance(result, FileError)]


def _check(
    place: Source, flag: str, size: tuple[int, int] | None
) -> tuple[PictureRecord, list[str]] | FileError:
    """The record and what was done, or what is wrong."""
    caption = place.caption.strip()
    check_characters(caption, place.where, flag)
    notes = [] if caption else [NO_CAPTION]
    try:
        data = place.read()
        image, done = decode(data)
        if size is not None:
            part = crop(image, *size)
            notes += [ENLARGED] if part.height < size[0] or part.width < size[1] else []
    except FileError as error:
        return error
    key = hashlib.sha256(data).hexdigest()[:32]
    return PictureRecord(place.name, caption or NEUTRAL_CAPTION, key, place.read), notes + done
