"""Prompts of every layout people keep them in, and their split into training and evaluation."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.settings.assets import ASSETS
from wan_distill.settings.config import Config

BUILT_IN_PROMPTS = ASSETS / "prompts.txt"
LONG_PROMPT = 300  # words: about 512 tokens, all that Wan's transformers see
MUSUBI_OPTION = re.compile(
    r"\s+--[whfdsnlgi]\s"
)  # `a prompt --w 832 --h 480`: the options are not the prompt's
CAPTION_KEYS = ("caption", "text", "prompt")


def read_prompts(source: Path | str, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """Distinct prompts of a .txt, .json, .jsonl or .csv file, of a folder of .txt files, or of a
    `datasets` id.

    Lines that begin with # and musubi's trailing options (`--w 832 ...`) are not part of a prompt.

    Args:
        say: gets one line, with its line number, for each duplicate and each prompt too long to be
            seen whole.

    Raises UsageError when there is nothing to read, or it is binary, not UTF-8 or malformed.
    """
    place, prompts = Path(source), {}
    for where, line in _raw_prompts(place, str(source)):
        prompt = MUSUBI_OPTION.split(line.strip(), maxsplit=1)[0].strip()
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in prompts:
            say(f"--prompts {where}: the same prompt as {prompts[prompt]}; used once")
            continue
        if len(prompt.split()) > LONG_PROMPT:
            say(
                f"--prompts {where}: {len(prompt.split())} words; Wan sees the first 512 tokens, "
                f"about {LONG_PROMPT}"
            )
        prompts[prompt] = where
    if not prompts:
        raise UsageError(f"--prompts {source}: holds no prompt; write one a line")
    return list(prompts)


def _raw_prompts(place: Path, source: str) -> Iterator[tuple[str, str]]:
    """(where, text) of everything in `place` that might be a prompt."""
    if place.is_dir():  # one prompt a file, which may have several lines
        for file in sorted(place.glob("*.txt")):
            yield str(file), " ".join(_text(file).split())
    elif place.exists() or place.suffix or "/" not in source:
        text = _text(place)
        if place.suffix in (".json", ".jsonl", ".csv"):
            yield from _records(place, text)
        else:
            yield from ((f"{place}:{n}", line) for n, line in enumerate(text.splitlines(), 1))
    else:
        yield from _hub_dataset(source)


def _records(place: Path, text: str) -> Iterator[tuple[str, str]]:
    """Captions of .jsonl, .csv, a JSON list of strings or objects, or an object that holds such a
    list in `data`.
    """
    try:
        if place.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif place.suffix == ".jsonl":
            rows = [json.loads(line) if line.strip() else "" for line in text.splitlines()]
        else:
            rows = json.loads(text)
            rows = rows.get("data") if isinstance(rows, dict) else rows
    except ValueError as error:
        raise UsageError(
            f"--prompts {place}: malformed ({error}); give valid {place.suffix[1:].upper()}"
        ) from error
    if not isinstance(rows, list):
        raise UsageError(f'--prompts {place}: must be a list of prompts, or {{"data": [...]}}')
    first = 2 if place.suffix == ".csv" else 1
    for number, row in enumerate(rows, first):
        yield (
            f"{place}:{number}",
            row if isinstance(row, str) else _caption(row, f"{place}:{number}"),
        )


def _caption(row, where: str) -> str:
    found = [
        row[key] for key in CAPTION_KEYS if isinstance(row, dict) and isinstance(row.get(key), str)
    ]
    if not found:
        raise UsageError(
            f"--prompts {where}: none of {', '.join(CAPTION_KEYS)} holds text here; name the "
            "column so"
        )
    return found[0]


def _hub_dataset(source: str) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"--prompts {source}: no such file; to read a hub dataset of that name: "
            "pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(source, split="train")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(
            f"--prompts {source}: neither a file nor a dataset ({reason}); check the name"
        ) from error
    for number, row in enumerate(rows):
        yield f"{source}[{number}]", _caption(row, f"{source}[{number}]")


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--prompts {file}: not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise UsageError(
            f"--prompts {file}: cannot be read ({error.strerror}); give a text file"
        ) from error
    if "\0" in text:
        raise UsageError(f"--prompts {file}: a binary file; give text, one prompt a line")
    return text


def split_prompts(config: Config, teacher) -> tuple[list[str], list[str]]:
    """(training, evaluation) prompts: never the same one in both.

    The embedded teacher brings captions it has never seen itself; of other lists every tenth is
    held out, by hash, so that the split does not depend on the list's order or length.
    """
    if config.prompts is None and teacher.embedded:
        return read_prompts(teacher.folder / "prompts.txt"), read_prompts(
            teacher.folder / "heldout_prompts.txt"
        )
    prompts = read_prompts(
        config.prompts or BUILT_IN_PROMPTS, functools.partial(print, file=sys.stderr)
    )
    if len(prompts) == 1:
        return prompts, prompts
    digests = {p: hashlib.sha256(p.encode()).hexdigest() for p in prompts}
    held_out = [p for p in prompts if int(digests[p], 16) % 10 == 0] or [
        min(prompts, key=digests.get)
    ]
    return [p for p in prompts if p not in set(held_out)] or held_out, held_out
