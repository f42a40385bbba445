"""Prompts from files of every usual layout, and their split into training and evaluation."""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from wan_distill.data.prompt_files import entries
from wan_distill.data.prompt_text import check_characters, is_blank
from wan_distill.data.remarks import Remarks
from wan_distill.errors import FileError, UsageError
from wan_distill.settings.assets import ASSETS, CAPTIONS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.umt5.text import tokenizer_of
from wan_distill.umt5.tokenizer import tokenise

BUILT_IN_PROMPTS = ASSETS / "prompts.txt"
FEW = 4  # prompts: of fewer a large part is held out
HELD_OUT = 10  # one prompt of so many is held out for the evaluation


def read_prompts(
    source: Path | str,
    say: Callable[[str], None] = lambda line: None,
    too_long: Callable[[str], str] = lambda prompt: "",
) -> list[str]:
    """The distinct prompts in `source`, in its order, without white space around them.

    In text files lines that begin with # and musubi's trailing options (`--w 832 ...`) are not part
    of a prompt; nothing is taken from records.

    Args:
        source: a text file, .json, .jsonl, .csv or .tsv, a folder of .txt files, or the id of a
            `datasets` data set.
        say: gets one line, with the place, for each duplicate and each prompt that is too long to
            be used whole, up to a number of them, and one for each kind of what is left out.
        too_long: says why a prompt is not used whole, or nothing.

    Raises UsageError where there is no prompt, and for files that are binary, of an encoding or a
    format that is not known, or malformed.
    """
    first_place: dict[str, str] = {}  # prompt -> where it was read first
    remarks = Remarks("--prompts", str(source), say)
    for where, text, note in entries(str(source)):
        if note:
            remarks.count(note, where)
        prompt = text.strip()
        if is_blank(prompt):
            if not note:
                remarks.count("empty captions left out", where)
            continue
        check_characters(prompt, where)
        if "\ufffd" in prompt:
            remarks.count("prompts with \ufffd, where another program lost a character", where)
        if prompt in first_place:
            remarks.name(
                "duplicates", where, f"the same prompt as {first_place[prompt]}; used once"
            )
            continue
        if remark := too_long(prompt):
            remarks.name("long prompts", where, remark)
        first_place[prompt] = where
    remarks.sum_up()
    if not first_place:
        raise UsageError(f"--prompts {source}: holds no prompt; write one per line")
    return list(first_place)


def counting_tokens(config: Config, teacher: TeacherInfo) -> Callable[[str], str]:
    """Says of a prompt that it has more tokens than the transformers see, or nothing.

    Raises UsageError where the teacher has no tokenizer that works, but not in a dry run: the plan
    holds all the same, and says so after it.
    """
    try:
        tokenizer = tokenizer_of(teacher.folder)
    except FileError as error:
        if config.dry_run:
            return lambda prompt: ""
        raise UsageError(f"--teacher_path {teacher.source}: {error}") from error
    limit = config.max_sequence_length

    def too_long(prompt: str) -> str:
        count = tokenise(tokenizer, prompt).count
        seen = f"Wan sees the first {limit} (--max_sequence_length), end mark included"
        return f"{count} tokens; {seen}" if count > limit else ""

    return too_long


def split_prompts(config: Config, teacher: TeacherInfo) -> tuple[list[str], list[str]]:
    """(training, evaluation) prompts: both lists have some, and no prompt is in both.

    A tiny teacher comes with captions that it was not trained on itself. Of other lists a
    tenth is held out, chosen by the hash of each prompt: the order of the list does not matter. Of
    two prompts or more at least one is on each side. A single prompt is trained on; the evaluation
    then uses prompts of this package: the tiny teacher's held-out captions, or the held-out
    tenth of the built-in list.

    Raises UsageError as `read_prompts` and `counting_tokens` do.
    """
    say = functools.partial(print, file=sys.stderr)
    too_long = counting_tokens(config, teacher)
    if config.prompts is None and teacher.world is not None:
        own = teacher.folder / CAPTIONS
        return read_prompts(own, say, too_long), _captions_for_evaluation(teacher)
    prompts = read_prompts(config.prompts or BUILT_IN_PROMPTS, say, too_long)
    if len(prompts) > 1:
        held_out = held_out_of(prompts)
        excluded = set(held_out)
        if len(prompts) < FEW:
            say(
                f"--prompts {config.prompts}: {len(prompts)} prompts only, and {len(held_out)} "
                "kept to measure the student; give more"
            )
        return [prompt for prompt in prompts if prompt not in excluded], held_out
    say(
        f"--prompts {config.prompts}: one prompt only; the evaluation and previews use built-in "
        "ones"
    )
    if teacher.world is not None:
        others = _captions_for_evaluation(teacher)
    else:
        others = held_out_of(read_prompts(BUILT_IN_PROMPTS))
    return prompts, [prompt for prompt in others if prompt not in prompts]


def _captions_for_evaluation(tiny: TeacherInfo) -> list[str]:
    """Captions that a tiny teacher itself was not trained on."""
    return read_prompts(tiny.folder / "heldout_prompts.txt")


def held_out_of(prompts: list[str]) -> list[str]:
    """Those of two prompts or more that are not trained on: some, and not all."""
    digests = {p: int(hashlib.sha256(p.encode()).hexdigest(), 16) for p in prompts}
    chosen = [p for p in prompts if digests[p] % HELD_OUT == 0]
    if 0 < len(chosen) < len(prompts):
        return chosen
    return [min(prompts, key=lambda p: digests[p])]
