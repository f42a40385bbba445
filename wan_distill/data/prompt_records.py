"""Captions in records: JSON and data sets."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from wan_distill.data.prompt_text import (
    CAPTION_KEYS,
    Entry,
    read_text,
    refuse_pretender,
    split_lines,
)
from wan_distill.errors import UsageError, one_line


def caption_of(record: Any, where: str) -> str:
    """The text of a record: a string, or the first of CAPTION_KEYS, in any case, that holds one.
    Raises UsageError where there is none; null is an empty caption.
    """
    if isinstance(record, str):
        return record
    found = None
    if isinstance(record, dict):
        values = {str(key).strip().casefold(): value for key, value in record.items()}
        held = [values[key] for key in CAPTION_KEYS if key in values]
        texts = [value for value in held if isinstance(value, str)]
        found = next((text for text in texts if text.strip()), next(iter(texts), None))
        if found is None and any(value is None for value in held):
            return ""
    if found is None:
        raise UsageError(
            f"--prompts {where}: none of {', '.join(CAPTION_KEYS)} holds text here; rename the "
            "column"
        )
    return found


def read_json(place: Path) -> Iterator[Entry]:
    """The captions of `json_records`."""
    for where, record in json_records(place):
        yield Entry(where, caption_of(record, where))


def json_records(
    place: Path, flag: str = "--prompts", keys: tuple[str, ...] = CAPTION_KEYS
) -> Iterator[tuple[str, Any]]:
    """(place, value) of each record: of a list, of an object with such a list in `data`, or one per
    line. An object with one of `keys` is a record. Raises UsageError.
    """
    text = read_text(place, flag)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise UsageError(f"{flag} {place}: nested too deeply; give a list of prompts") from error
    except ValueError as error:
        whole = error
    else:
        yield from _listed(place, content, flag, keys)
        return
    lines = [(n, line) for n, line in enumerate(split_lines(text), 1) if line.strip()]
    by_line = place.suffix.casefold() != ".json" or (lines and is_json(lines[0][1]))
    for number, line in lines if by_line else ():
        where = f"{place}:{number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"{flag} {where}: malformed ({one_line(error)}); give one JSON value per line"
            ) from error
        yield where, record
    if not by_line:
        line_number = getattr(whole, "lineno", 1)
        raise UsageError(
            f"{flag} {place}:{line_number}: malformed ({one_line(whole)}); give valid JSON"
        ) from whole


def _listed(
    place: Path, content: Any, flag: str, keys: tuple[str, ...]
) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, str) or (
        isinstance(content, dict)
        and (
            place.suffix.casefold() != ".json"
            or any(str(key).strip().casefold() in keys for key in content)
        )
    ):
        content = [content]  # one record per line, and one line
    if not isinstance(content, list):
        raise UsageError(f'{flag} {place}: must be a list of prompts, or {{"data": [...]}}')
    for number, record in enumerate(content, 1):
        yield f"{place}: record {number}", record


# -------------------------------------------------------------------------------------- data sets


def read_data_set(source: str) -> Iterator[Entry]:
    """The training split of a data set of the hub."""
    return read_rows(source, lambda datasets: datasets.load_dataset(source, split="train"))


def read_columns(place: Path) -> Iterator[Entry]:
    """A .parquet or .arrow file."""
    if not os.path.isfile(place):
        raise UsageError(f"--prompts {place}: there is no such file; check the name")
    with place.open("rb") as data:
        refuse_pretender(place, data.read(200))
    kind = place.suffix.casefold()[1:]
    return read_rows(
        str(place),
        lambda datasets: datasets.load_dataset(kind, data_files=str(place), split="train"),
    )


def read_rows(source: str, load: Callable[[Any], Any]) -> Iterator[Entry]:
    """The captions of what `load` makes of the package `datasets`. Raises UsageError."""
    rows = load_rows(source, load)
    names = [name for name in getattr(rows, "column_names", None) or () if _is_caption(name)]
    if names and hasattr(rows, "select_columns"):  # videos beside the captions are not decoded
        rows = rows.select_columns(names)
    for number, row in enumerate(rows):
        where = f"{source}[{number}]"
        yield Entry(where, caption_of(row, where))


def load_rows(source: str, load: Callable[[Any], Any], flag: str = "--prompts") -> Any:
    """What `load` makes of the package `datasets`; of several splits the one named train. Raises
    UsageError where the package or the data set is missing.
    """
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{flag} {source}: nothing here has that name; to read it as a data set: pip install "
            "datasets"
        ) from error
    try:
        rows = load(datasets)
        return rows["train"] if isinstance(rows, dict) else rows
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"{flag} {source}: neither a file nor a dataset ({one_line(error)}); check the name"
        ) from error


def _is_caption(name: str) -> bool:
    return name.strip().casefold() in CAPTION_KEYS


def is_json(*texts: str) -> bool:
    """Whether one of `texts` is a JSON value."""
    for text in texts:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            continue
        return True
    return False
