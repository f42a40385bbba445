"""Where pictures and their captions are: folders, `metadata` files in them, data sets."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from wan_distill.data.prompt_records import json_records, load_rows
from wan_distill.data.prompt_tables import table_rows
from wan_distill.data.prompt_text import CAPTION_KEYS, read_text, split_lines
from wan_distill.data.remarks import Remarks
from wan_distill.errors import FileError, UsageError

# Those of files that are read, and of some that people have and that must not be passed over.
SUFFIX = re.compile(
    r"\.(a?png|jpe?g|jpe|jp2|jfif|webp|avif|tiff?|bmp|gif|p[pgn]m|hei[cf])", re.IGNORECASE
)
METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"  # the column of `datasets`' imagefolder
NESTED = "pictures in subfolders left out"
OTHER_FILES = "files that are no pictures left out"
UNNAMED = "pictures that the metadata does not name left out"
ORPHANS = "captions without a picture left out"
JOINED = "captions of several lines, each made one"


class Source(NamedTuple):
    """Where one picture is, not read yet."""

    where: str
    """For messages."""
    name: str
    caption: str
    """White space around it is left; empty where there is none."""
    read: Callable[[], bytes]
    """Raises FileError."""


def sources(place: str, remarks: Remarks) -> Iterator[Source]:
    """All pictures of a folder or data set. Raises UsageError."""
    flag, folder = remarks.flag, Path(place)
    if os.path.isdir(place):  # False, not an error, where the name is too long
        if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
            return _rows(place, lambda datasets: datasets.load_from_disk(place), flag)
        files = _files(folder, flag)
        tables = [f for f in files if f.stem.casefold() == "metadata" and f.is_file()]
        return _described(tables, files, remarks) if tables else _beside(folder, files, remarks)
    if os.path.exists(place):
        raise UsageError(f"{flag} {place}: is a file; give a folder of pictures")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise UsageError(f"{flag} {place}: there is no such folder; check the name")
    return _rows(place, lambda datasets: datasets.load_dataset(place, split="train"), flag)


def _files(folder: Path, flag: str) -> list[Path]:
    """What is in a folder, by name, without what is hidden. Raises UsageError."""
    try:
        return [file for file in sorted(folder.iterdir()) if not file.name.startswith(".")]
    except OSError as error:
        raise UsageError(
            f"{flag} {folder}: cannot be read ({error.strerror}); check the folder"
        ) from error


def file_source(file: Path, flag: str) -> Source:
    """One picture, and what `NAME.txt` beside it says."""
    captions = [f for f in (file.with_suffix(".txt"), file.with_suffix(".TXT")) if f.is_file()]
    caption = read_caption(captions[0], flag)[0] if captions else ""
    return Source(str(file), file.name, caption, functools.partial(read_file, file))


def read_file(file: Path) -> bytes:
    """Its bytes. Raises FileError."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise FileError(f"cannot be read ({error.strerror})", "check the file") from error


def read_caption(file: Path, flag: str) -> tuple[str, bool]:
    """(its text as one line, whether it had several). Raises UsageError."""
    lines = [line.strip() for line in split_lines(read_text(file, flag)) if line.strip()]
    return " ".join(lines), len(lines) > 1


def is_picture(file: Path) -> bool:
    """Whether its name says so."""
    return SUFFIX.fullmatch(file.suffix) is not None


def _beside(folder: Path, files: list[Path], remarks: Remarks) -> Iterator[Source]:
    """Pictures, each with its caption in a text file of the same name."""
    captions = {f.stem: f for f in files if f.suffix.casefold() == ".txt" and f.is_file()}
    used = set()
    for file in files:
        if file.is_dir():
            for inner in filter(is_picture, sorted(file.rglob("*"))):
                remarks.count(NESTED, str(inner))
        elif is_picture(file):
            caption, text = "", captions.get(file.stem)
            if text is not None:
                used.add(text)
                caption, joined = read_caption(text, remarks.flag)
                if joined:
                    remarks.count(JOINED, str(text))
            read = functools.partial(read_file, file)
            yield Source(str(file), file.name, caption, read)
        elif file not in captions.values():
            remarks.count(OTHER_FILES, str(file))
    for text in captions.values():
        if text not in used:
            remarks.count(ORPHANS, str(text))


def _described(tables: list[Path], files: list[Path], remarks: Remarks) -> Iterator[Source]:
    """Pictures that a metadata file names, in its order."""
    flag, folder = remarks.flag, tables[0].parent
    known = [table for table in tables if table.name.casefold() in METADATA]
    if len(tables) > 1 or not known:
        named = " and ".join(table.name for table in tables)
        raise UsageError(f"{flag} {folder}: holds {named}; keep one of {' and '.join(METADATA)}")
    (table,) = known
    reader = table_rows if table.suffix.casefold() == ".csv" else json_records
    used = set()
    for where, row in reader(table, flag, (FILE_NAME,)):
        file = folder / _file_name(row, where, flag)
        used.add(file)
        if not file.exists():
            raise UsageError(
                f"{flag} {where}: names {file.name}, which is not in the folder; add the file, or "
                "take the line away"
            )
        name = file.relative_to(folder).as_posix()
        yield Source(str(file), name, _caption(row), functools.partial(read_file, file))
    for file in files:
        if is_picture(file) and file not in used:
            remarks.count(UNNAMED, str(file))


def _file_name(row: Any, where: str, flag: str) -> str:
    """The file that a row of a metadata file names: inside of the folder. Raises UsageError."""
    values = _by_name(row)
    name = values.get(FILE_NAME)
    if not isinstance(name, str) or not name.strip():
        raise UsageError(f"{flag} {where}: no {FILE_NAME}; name the picture in that column")
    path = os.path.normpath(name.strip().replace("\\", "/"))
    # Not os.path.isabs: it depends on the system, and on Windows on the version of Python.
    if re.match(r"[/\\]|[A-Za-z]:", path) or path.split(os.sep)[0] in ("..", "."):
        raise UsageError(
            f"{flag} {where}: {FILE_NAME} {name} leads out of the folder; move the picture there, "
            "and give its name relative to it"
        )
    return path


def _by_name(row: Any) -> dict[str, Any]:
    """The columns of a row by their names in lower case; none where it is no object."""
    return {str(k).strip().casefold(): v for k, v in row.items()} if isinstance(row, dict) else {}


def _caption(row: Any) -> str:
    """The first of CAPTION_KEYS that holds text, in any case; or nothing."""
    values = _by_name(row)
    texts = [values[key] for key in CAPTION_KEYS if isinstance(values.get(key), str)]
    return next((text for text in texts if text.strip()), "")


# -------------------------------------------------------------------------------------- data sets


def _rows(place: str, load: Callable[[Any], Any], flag: str) -> Iterator[Source]:
    """The rows of a data set with a column of images, whose bytes are read as they are stored."""
    rows = load_rows(place, load, flag)
    features = getattr(rows, "features", None) or {}
    columns = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if len(columns) != 1 and "image" not in columns:
        has = f"several columns of images ({', '.join(columns)})" if columns else "no such column"
        raise UsageError(f"{flag} {place}: has {has}; name one of images `image`")
    column = "image" if "image" in columns else columns[0]
    import datasets  # load_rows has found it

    rows = rows.cast_column(column, datasets.Image(decode=False))
    texts: Iterable[Any] = [{}] * len(rows)
    kept = [name for name in rows.column_names if name.strip().casefold() in CAPTION_KEYS]
    if kept:
        texts = rows.select_columns(kept)
    for number, row in enumerate(texts):
        where = f"{place}[{number}]"
        yield Source(where, where, _caption(row), functools.partial(_stored, rows, number, column))


def _stored(rows: Any, number: int, column: str) -> bytes:
    """The bytes of one row's image. Raises FileError."""
    image = rows[number][column]
    if image is None:
        raise FileError("has no picture", "take the row away")
    data = image["bytes"]
    return data if data is not None else read_file(Path(image["path"]))
