"""What prompt files hold: one prompt per line, records, folders of captions, data sets.

Each format has one reader, chosen by the suffix in any case. What the suffix leaves open, the
content decides: one JSON value or one per line, the delimiter of a table, the encoding.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from wan_distill.data.prompt_records import (
    is_json,
    read_columns,
    read_data_set,
    read_json,
    read_rows,
)
from wan_distill.data.prompt_tables import read_table
from wan_distill.data.prompt_text import CAPTION_KEYS, Entry, read_text, split_lines
from wan_distill.errors import UsageError

# `a prompt --w 832 --fs 5`: options of musubi-tuner's prompt files, in any case. Those of the first
# kind take a number, those of the second a text.
MUSUBI_OPTION = re.compile(
    r"\s+--(?:(?:[whfdsgl]|fs)\s+[-+.\d]|(?:[ni]|ei|cn|ci|of)\s+\S)", re.IGNORECASE
)
UNKNOWN_OPTION = re.compile(r"\s--\w")
KEPT = "prompts with what looks like an option, kept in the text"
COMMENT = "comment lines left out"
OPTIONS = "prompts cut where musubi-tuner's options begin"
JOINED = "files of several lines, each one prompt"
NESTED = "files in subfolders left out"


def entries(source: str) -> Iterator[Entry]:
    """Everything that may be a prompt, in the order of the file.

    Args:
        source: a file, a folder of .txt files or of a saved data set, or the id of a data set.

    Raises UsageError for formats that are not known, and for what is not of its format.
    """
    place = Path(source)
    suffix = place.suffix.casefold()
    if os.path.isdir(place):  # False, not an error, where the name is too long
        return _folder(place)
    named = re.fullmatch(r"[\w.-]+/[\w.-]+", source)
    if suffix in READERS and (suffix or os.path.exists(place) or not named):
        return READERS[suffix](place)
    if os.path.exists(place):
        raise UsageError(
            f"--prompts {place}: {suffix} is no format that is read; give .txt (one prompt per "
            f"line), {', '.join(known for known in READERS if known not in ('', '.txt'))}, or a "
            "folder of .txt"
        )
    if not named:
        raise UsageError(f"--prompts {place}: there is no such file; check the name")
    return read_data_set(source)


def _lines(place: Path) -> Iterator[Entry]:
    text = read_text(place)
    _refuse_records(place, text)
    for number, line in enumerate(split_lines(text), 1):
        where = f"{place}:{number}"
        if line.lstrip().startswith("#"):
            yield Entry(where, "", COMMENT)
        elif line.strip():
            prompt = MUSUBI_OPTION.split(f" {line}", maxsplit=1)[0]
            cut = OPTIONS if len(prompt) <= len(line) else ""
            yield Entry(where, prompt, cut or (KEPT if UNKNOWN_OPTION.search(prompt) else ""))


def _refuse_records(place: Path, text: str) -> None:
    """Raises UsageError for a text file that holds JSON or a table under a wrong suffix."""
    first = next((line.strip() for line in split_lines(text) if line.strip()), "")
    names = [name.strip(' "').casefold() for name in re.split(r"[,;\t|]", first)]
    kind = ""
    if first.startswith(("{", "[")) and is_json(first, text):
        kind = ".json" if first.startswith("[") else ".jsonl"
    elif len(names) > 1 and set(names) & set(CAPTION_KEYS) and all(map(str.isidentifier, names)):
        kind = ".tsv" if "\t" in first else ".csv"
    if kind:
        raise UsageError(
            f"--prompts {place}: holds {kind[1:].upper()}, not one prompt per line; rename it to "
            f"{place.stem.removesuffix(kind)}{kind}"
        )


def _folder(place: Path) -> Iterator[Entry]:
    """One prompt per .txt file, beside clips or not; or a data set as `save_to_disk` leaves it."""
    if (place / "dataset_dict.json").exists() or (place / "dataset_info.json").exists():
        yield from read_rows(str(place), lambda datasets: datasets.load_from_disk(str(place)))
        return
    captions = [
        file
        for file in sorted(place.rglob("*"))
        if file.suffix.casefold() == ".txt"
        and not any(part.startswith(".") for part in file.relative_to(place).parts)
        and not file.is_dir()
    ]
    for file in captions:
        if file.parent != place:
            yield Entry(str(file), "", NESTED)
            continue
        lines = [line.strip() for line in split_lines(read_text(file)) if line.strip()]
        yield Entry(str(file), " ".join(lines), JOINED if len(lines) > 1 else "")


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    "": _lines,
    ".txt": _lines,
    ".json": read_json,
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".jsonlines": read_json,
    ".csv": read_table,
    ".tsv": read_table,
    ".parquet": read_columns,
    ".arrow": read_columns,
}
