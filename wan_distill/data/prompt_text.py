"""The text of a prompt file, in any encoding that says which one it is."""

from __future__ import annotations

import codecs
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from wan_distill.errors import UsageError

CAPTION_KEYS = ("caption", "text", "prompt")
ENCODINGS = {  # by the mark at the beginning; that of UTF-16 also begins UTF-32's
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


# What lies under the name of a prompt file although it is something else.
POINTER = b"version https://git-lfs"
PAGE = re.compile(rb"\s*<(!doctype\s+html|html)\b", re.IGNORECASE)
UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # categories of characters


class Entry(NamedTuple):
    """What may be a prompt: its place and its text; empty where there is none."""

    where: str
    text: str
    note: str = ""
    """What was done to it, to be counted."""


def read_text(file: Path, flag: str = "--prompts") -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, which is left
    out. Raises UsageError, whose line begins with `flag`.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        remedy = "give a text file"
        if isinstance(error, FileNotFoundError) and not file.is_symlink():
            remedy = "check the name; prompts stand in a file, one per line"
        raise UsageError(f"{flag} {file}: cannot be read ({error.strerror}); {remedy}") from error
    refuse_pretender(file, data[:200], flag)
    encoding = next((name for mark, name in ENCODINGS.items() if data.startswith(mark)), "UTF-8")
    try:
        text = data.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(encoding, "replace").count("\n") + 1
        raise UsageError(
            f"{flag} {file}:{line}: not {encoding} text (byte {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text or text.startswith(("{\\rtf", "PK\x03\x04")):
        raise UsageError(f"{flag} {file}: a binary file; give plain text")
    return text


def refuse_pretender(file: Path, start: bytes, flag: str = "--prompts") -> None:
    """Raises UsageError where the first bytes of a text file show that it is something else."""
    if start.startswith(POINTER):
        raise UsageError(
            f"{flag} {file}: is a pointer of Git LFS and not the file; run `git lfs pull`"
        )
    if PAGE.match(start):
        raise UsageError(f"{flag} {file}: is a web page and not the file; download it again")


def is_blank(text: str) -> bool:
    """Whether nothing of `text` is seen: white space, control and zero-width characters alone."""
    return all(unicodedata.category(character) in UNSEEN for character in text)


def split_lines(text: str) -> list[str]:
    r"""The lines of a text file: they end with \n or \r\n, or with \r where there is no \n."""
    lines = text.split("\n" if "\n" in text else "\r")
    return [line.removesuffix("\r").lstrip("\ufeff") for line in lines]


def check_characters(prompt: str, where: str, flag: str = "--prompts") -> None:
    """Raises UsageError for text that no file can hold: half a character, or a NUL."""
    broken = re.search(r"[\ud800-\udfff\0]", prompt)
    if broken:
        raise UsageError(
            f"{flag} {where}: holds {broken[0]!a}, which is half a character or none; "
            "write the text anew there"
        )
