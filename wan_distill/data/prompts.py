"""Prompts from files of every usual layout, and their split into training and evaluation."""

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
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.settings.assets import ASSETS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

BUILT_IN_PROMPTS = ASSETS / "prompts.txt"
LONG_PROMPT = 300  # words: about 512 tokens, all that Wan's transformers see
# `a prompt --w 832 --h 480`: the options are musubi-tuner's, not part of the prompt.
MUSUBI_OPTION = re.compile(r"\s+--[whfdsnlgi]\s")
CAPTION_KEYS = ("caption", "text", "prompt")
HELD_OUT = 10  # one prompt of so many is held out for the evaluation


def read_prompts(source: Path | str, say: Callable[[str], None] = lambda line: None) -> list[str]:
    """The distinct prompts in `source`, in its order.

    Lines that begin with # and musubi's trailing options (`--w 832 ...`) are not part of a prompt.

    Args:
        source: a .txt, .json, .jsonl or .csv file, a folder of .txt files, or the id of a
            `datasets` data set.
        say: is called with one line, which gives the line number, for each duplicate and for each
            prompt that is too long to be used whole.

    Raises UsageError where there is no prompt, and for files that are binary, not UTF-8 or
    malformed.
    """
    place = Path(source)
    first_place: dict[str, str] = {}  # prompt -> where it was read first
    for where, line in _raw_prompts(place, str(source)):
        prompt = MUSUBI_OPTION.split(line.strip(), maxsplit=1)[0].strip()
        if not prompt or prompt.startswith("#"):
            continue
        if prompt in first_place:
            say(f"--prompts {where}: the same prompt as {first_place[prompt]}; used once")
            continue
        count = len(prompt.split())
        if count > LONG_PROMPT:
            say(
                f"--prompts {where}: {count} words; Wan reads the first 512 tokens, "
                f"about {LONG_PROMPT} words"
            )
        first_place[prompt] = where
    if not first_place:
        raise UsageError(f"--prompts {source}: holds no prompt; write one per line")
    return list(first_place)


def _raw_prompts(place: Path, source: str) -> Iterator[tuple[str, str]]:
    """(where, text) of everything in `place` that might be a prompt."""
    if place.is_dir():  # one prompt per file, which may have several lines
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
    """(where, caption) of each record of a .jsonl, .csv or .json file.

    A .json file holds a list of strings or objects, or an object with such a list in `data`.
    """
    try:
        rows = _parse_records(place.suffix, text)
    except ValueError as error:
        raise UsageError(
            f"--prompts {place}: malformed ({error}); give valid {place.suffix[1:].upper()}"
        ) from error
    if not isinstance(rows, list):
        raise UsageError(f'--prompts {place}: must be a list of prompts, or {{"data": [...]}}')
    first = 2 if place.suffix == ".csv" else 1
    for number, row in enumerate(rows, first):
        where = f"{place}:{number}"
        yield where, row if isinstance(row, str) else _caption(row, where)


def _parse_records(suffix: str, text: str) -> Any:
    """The rows in `text`; of a .json file, whatever stands in their place. Raises ValueError."""
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    if suffix == ".jsonl":
        return [json.loads(line) if line.strip() else "" for line in text.splitlines()]
    rows = json.loads(text)
    return rows.get("data") if isinstance(rows, dict) else rows


def _caption(row: Any, where: str) -> str:
    """The text of a record, under the first of CAPTION_KEYS that it has. Raises UsageError."""
    for key in CAPTION_KEYS:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return row[key]
    raise UsageError(
        f"--prompts {where}: none of {', '.join(CAPTION_KEYS)} holds text here; rename the column"
    )


def _hub_dataset(source: str) -> Iterator[tuple[str, str]]:
    """(where, caption) of each row of a data set of the hub. Raises UsageError."""
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
        where = f"{source}[{number}]"
        yield where, _caption(row, where)


def _text(file: Path) -> str:
    """The text of a file, without a byte-order mark. Raises UsageError."""
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
        raise UsageError(f"--prompts {file}: a binary file; give text, one prompt per line")
    return text


def split_prompts(config: Config, teacher: TeacherInfo) -> tuple[list[str], list[str]]:
    """(training, evaluation) prompts: both lists have some, and no prompt is in both.

    The embedded teacher comes with captions that it was not trained on itself. Of other lists a
    tenth is held out, chosen by the hash of each prompt: the order of the list does not matter. Of
    two prompts or more at least one is on each side. A single prompt is trained on; the evaluation
    then uses prompts of this package: the embedded teacher's held-out captions, or the held-out
    tenth of the built-in list.

    Raises UsageError as `read_prompts` does.
    """
    if config.prompts is None and teacher.embedded:
        return read_prompts(teacher.folder / "prompts.txt"), _captions_for_evaluation(teacher)
    say = functools.partial(print, file=sys.stderr)
    prompts = read_prompts(config.prompts or BUILT_IN_PROMPTS, say)
    if len(prompts) > 1:
        held_out = _held_out(prompts)
        excluded = set(held_out)
        return [prompt for prompt in prompts if prompt not in excluded], held_out
    say(
        f"--prompts {config.prompts}: one prompt only; the evaluation and previews use built-in "
        "ones"
    )
    if teacher.embedded:
        others = _captions_for_evaluation(teacher)
    else:
        others = _held_out(read_prompts(BUILT_IN_PROMPTS))
    return prompts, [prompt for prompt in others if prompt not in prompts]


def _captions_for_evaluation(embedded: TeacherInfo) -> list[str]:
    """Captions that the embedded teacher itself was not trained on."""
    return read_prompts(embedded.folder / "heldout_prompts.txt")


def _held_out(prompts: list[str]) -> list[str]:
    """Those of two prompts or more that are not trained on: some, and not all."""
    digests = {p: int(hashlib.sha256(p.encode()).hexdigest(), 16) for p in prompts}
    chosen = [p for p in prompts if digests[p] % HELD_OUT == 0]
    if 0 < len(chosen) < len(prompts):
        return chosen
    return [min(prompts, key=lambda p: digests[p])]
