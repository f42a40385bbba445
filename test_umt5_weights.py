#!/usr/bin/env python
"""Checks that a text encoder is the one in its files, its token table above all, and that the
tokenizer beside it belongs to it. Also collected by pytest.

    python test_umt5_weights.py                                  the embedded teacher
    python test_umt5_weights.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers
                                                                 any hub id or folder
    python test_umt5_weights.py --teacher_path X --repair OUT    write a clean copy to OUT

Exit code: 0 PASS or REPAIRED, 1 BROKEN, 2 bad arguments.
"""

from __future__ import annotations

from wan_distill.interrupts import end_quietly

if __name__ == "__main__":
    end_quietly()  # Ctrl-C while the rest is imported

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from wan_distill.errors import FileError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.flags import path, text
from wan_distill.settings.one_line_parser import OneLineParser
from wan_distill.settings.other_names import command_name
from wan_distill.settings.weight_files import refuse_pickles
from wan_distill.system.endings import ended
from wan_distill.system.notices import keep_notices
from wan_distill.umt5.inspect import inspect_text_encoder, locate
from wan_distill.umt5.silence import LOADERS, silence_tied_weight_report
from wan_distill.umt5.tables import EMBED, SHARED

if TYPE_CHECKING:
    import pytest
    from transformers import UMT5EncoderModel

    from wan_distill.umt5.verify import Verdict

REPORT = (
    "UMT5EncoderModel LOAD REPORT from: somewhere\nKey | Status |\n----+--------+\n"
    "encoder.embed_tokens.weight | MISSING |\n\nNotes:\n- MISSING: newly initialized"
)
OTHER = REPORT.replace("encoder.embed_tokens.weight", "encoder.final_layer_norm.weight")


def check(
    source: str | Path, *, variant: str | None = None, allow_pickle: bool = False
) -> tuple[UMT5EncoderModel | None, Verdict]:
    """The loaded encoder (None where it, or its tokenizer, is broken) and the verdict on both.

    Raises FileError or UsageError where no verdict is possible: no such folder, no weight files of
    this variant, or pickles without permission.
    """
    with keep_notices():
        from transformers.utils import logging as loaders

        from wan_distill.umt5 import repair, text, verify

    if not sys.stderr.isatty():
        loaders.disable_progress_bar()
    folder = locate(source)
    inspection = inspect_text_encoder(folder, variant)
    if not allow_pickle:
        refuse_pickles(inspection.files)
    tokenizer = text.tokenizer_beside(folder)
    try:
        encoder, verdict = repair.load_text_encoder(
            inspection.folder, variant=variant, allow_pickle=allow_pickle
        )
        if tokenizer is not None:
            _, verdict = text.add_tokenizer(verdict, encoder, tokenizer)
        return encoder, verdict
    except FileError as error:
        return None, verify.Verdict(
            verdict="BROKEN",
            reason=error.reason,
            remedy=error.remedy,
            keys_in_file=inspection.keys_in_file,
            rows_compared=0,
            rows_total=0,
            transformers=inspection.transformers,
            loads_right_on=inspection.loads_right_on,
        )


def is_shown(message: str) -> bool:
    """Whether a loader's `message` reaches the log inside `silence_tied_weight_report`."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(LOADERS[0])
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with silence_tied_weight_report():
            logger.warning(message)
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    return message in messages


def print_verdict(encoder: UMT5EncoderModel | None, verdict: Verdict) -> None:
    """Prints the verdict for people; `encoder` is None where it is broken or was not kept."""
    print(
        f"file       holds {verdict.keys_in_file}; loads right on transformers "
        f"{verdict.loads_right_on} (installed: {verdict.transformers})"
    )
    if encoder is not None:
        is_tied = encoder.shared.weight is encoder.encoder.embed_tokens.weight
        parameters = "one parameter" if is_tied else "two parameters"
        print(f"tying      {SHARED} and {EMBED} are {parameters} in memory")
        print(
            f"rows       {verdict.rows_compared} of {verdict.rows_total} compared with the file: "
            "equal"
        )
        print(
            f"tokenizer  {verdict.entries} entries; embeddings of two unlike prompts are "
            f"{verdict.difference:.2g} of their norm apart"
            if verdict.entries
            else "tokenizer  none lies beside the text encoder: not checked"
        )
        print(
            f"silencing  hides the tied-weight report: {not is_shown(REPORT)}; "
            f"hides a report of another missing key: {not is_shown(OTHER)}"
        )
    print(f"{verdict.verdict}: {verdict.reason}")
    if verdict.remedy:
        print(f"           {verdict.remedy}")


def make_parser() -> OneLineParser:
    """The command line."""
    parser = OneLineParser(
        prog=command_name("test_umt5_weights.py", "wan-distill-check"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--teacher_path",
        type=path,
        default=str(EMBEDDED_TEACHER),
        help="hub id, pipeline or text encoder folder",
    )
    add(
        "--repair",
        type=path,
        metavar="OUT",
        help="write a clean copy of the text encoder to this new folder",
    )
    add("--json", action="store_true", help="print the verdict as JSON and nothing else")
    add("--revision", type=text, help="branch, tag or commit on the hub")
    add("--cache_dir", type=path, help="where hub files are kept")
    add("--variant", type=text, help="weight file variant, e.g. fp16")
    add("--allow_pickle", action="store_true", help="also read .bin weights, if you trust them")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` and returns the exit code."""
    args = argparse.Namespace(repair=None)
    return ended(
        lambda: run(make_parser().parse_args(argv, args)),
        disk_error=2,  # 1 is the verdict BROKEN
        writes_to=lambda: args.repair,
    )


def run(args: argparse.Namespace) -> int:
    """Prints the verdict; the exit code. Raises FileError, UsageError and OSError."""
    how = {"variant": args.variant, "allow_pickle": args.allow_pickle}
    encoder = None
    folder = locate(args.teacher_path, revision=args.revision, cache_dir=args.cache_dir)
    if args.repair:
        with keep_notices():
            from wan_distill.umt5.repair import repair_on_disk

        verdict = repair_on_disk(folder, args.repair, **how)
    else:
        encoder, verdict = check(folder, **how)
    if args.json:
        print(json.dumps(verdict.to_json()))
    else:
        print_verdict(encoder, verdict)
    return 1 if verdict.verdict == "BROKEN" else 0


# ---------------------------------------------------------------------- the same checks, for pytest


def test_the_table_in_use_is_the_files() -> None:
    from wan_distill.umt5.verify import verify

    encoder, verdict = check(EMBEDDED_TEACHER)
    assert encoder is not None
    assert verdict.verdict == "PASS"
    assert verdict.rows_compared == verdict.rows_total == verdict.entries > 100
    assert verify(encoder, EMBEDDED_TEACHER).matches


def test_both_names_are_one_parameter() -> None:
    encoder, _ = check(EMBEDDED_TEACHER)
    assert encoder is not None
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_only_the_tied_weight_report_is_hidden() -> None:
    assert not is_shown(REPORT)
    assert is_shown(OTHER)
    assert is_shown(REPORT.replace("\n\nNotes", "\nencoder.block.0.x | UNEXPECTED |\n\nNotes"))


def test_the_script_prints_its_verdict_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] == "PASS"
    assert {"reason", "remedy", "keys_in_file", "rows_compared", "transformers"} <= set(verdict)


if __name__ == "__main__":
    sys.exit(main())
