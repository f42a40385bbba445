"""Captions in tables with a header: .csv and .tsv."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from wan_distill.data.prompt_records import caption_of
from wan_distill.data.prompt_text import CAPTION_KEYS, Entry, read_text, split_lines
from wan_distill.errors import UsageError

DELIMITERS = {".csv": ",;\t|", ".tsv": "\t,;|"}  # the usual one first


def read_table(place: Path) -> Iterator[Entry]:
    """The caption of each row of a table, as of a record: the first column that holds one."""
    for where, row in table_rows(place):
        yield Entry(where, caption_of(row, where))


def table_rows(
    place: Path, flag: str = "--prompts", keys: tuple[str, ...] = CAPTION_KEYS
) -> Iterator[tuple[str, dict[str, str]]]:
    """(place, fields by lower-case name) of each row of a table with a header, quoted as the csv
    module and Excel quote. Raises UsageError, also where the header names none of `keys`.
    """
    text = read_text(place, flag)
    first = 1
    choices = DELIMITERS[place.suffix.casefold()]
    stated = re.match(r"sep=(.)\r?\n", text)  # Excel's line before the header
    if stated:
        text, first, choices = text[stated.end() :], 2, stated[1]
    headers = {delimiter: _header(text, delimiter) for delimiter in choices}
    delimiter = next((d for d, names in headers.items() if set(names) & set(keys)), "")
    if not delimiter:
        raise UsageError(
            f"{flag} {place}:{first}: the header names none of {', '.join(keys)}; rename the column"
        )
    names = headers[delimiter]
    rows = _split_rows(place, text, delimiter, first, flag)
    if len(names) == 1:
        rows = _one_column(place, text, choices, first) or rows
    for line, row in rows[1:]:
        if len(row) != len(names):
            raise UsageError(
                f"{flag} {place}:{line}: {len(row)} fields, the header has {len(names)}; put "
                f"captions that hold {delimiter!r} in double quotes"
            )
        # The first of two columns of one name.
        yield f"{place}:{line}", dict(zip(reversed(names), reversed(row), strict=True))


def _header(text: str, delimiter: str) -> list[str]:
    """The names in the first line that has any, if `delimiter` stands between them."""
    line = next((line for line in split_lines(text) if line.strip()), "")
    return [name.strip(' "').casefold() for name in line.split(delimiter)]


def _split_rows(
    place: Path, text: str, delimiter: str, first: int, flag: str
) -> list[tuple[int, list[str]]]:
    """(line, fields) of each row that has any. Raises UsageError."""
    limit = csv.field_size_limit(max(len(text), 1))  # whole captions: the usual limit is 131,072
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows, line = [], first
    try:
        for row in reader:
            if row:
                rows.append((line, row))
            line = first + reader.line_num
    except csv.Error as error:
        raise UsageError(
            f"{flag} {place}:{line}: malformed ({error}); put captions in double quotes, and "
            "write a double quote inside them twice"
        ) from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _one_column(
    place: Path, text: str, choices: str, first: int
) -> list[tuple[int, list[str]]] | None:
    """The rows of a table of one column, where nothing says which delimiter there might be: one
    that stands in captions is none.
    """
    for delimiter in choices:
        with contextlib.suppress(UsageError):
            rows = _split_rows(place, text, delimiter, first, "--prompts")
            if all(len(row) == 1 for _, row in rows):
                return rows
    return None
