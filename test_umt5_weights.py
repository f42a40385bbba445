#!/usr/bin/env python
"""Is this text encoder's token table the one in its file? Run it, or let pytest collect it.

    python test_umt5_weights.py                                                 the embedded teacher
    python test_umt5_weights.py --teacher_path Wan-AI/Wan2.2-T2V-A14B-Diffusers  any hub id or folder
    python test_umt5_weights.py --teacher_path X --repair OUT                   write a clean copy to OUT

Exit code: 0 PASS or REPAIRED, 1 BROKEN, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.umt5.inspect import EMBED, SHARED
from wan_distill.umt5.verify import Verdict

LOADERS = "transformers.modeling_utils"  # the logger that transformers 5 writes its report through
REPORT = (
    "UMT5EncoderModel LOAD REPORT from: somewhere\nKey | Status |\n----+--------+\n"
    "encoder.embed_tokens.weight | MISSING |\n\nNotes:\n- MISSING: newly initialized"
)
OTHER = REPORT.replace("encoder.embed_tokens.weight", "encoder.final_layer_norm.weight")


def check(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    allow_pickle: bool = False,
) -> tuple[object | None, Verdict]:
    """The loaded encoder (None when broken) and the verdict on the text encoder of `source`.

    Raises TextEncoderError where there is nothing to judge: no such folder, or pickles without
    permission.
    """
    from wan_distill.umt5.inspect import inspect_text_encoder, locate, refuse_pickle
    from wan_distill.umt5.repair import load_text_encoder

    folder = locate(source, revision=revision, cache_dir=cache_dir)
    found = inspect_text_encoder(folder)
    if not allow_pickle:
        refuse_pickle(found)
    try:
        return load_text_encoder(folder, allow_pickle=allow_pickle)
    except TextEncoderError as error:
        reason, _, remedy = str(error).rpartition("; " if "; " in str(error) else ": ")
        return None, Verdict(
            "BROKEN",
            reason,
            remedy,
            found.keys_in_file,
            0,
            0,
            found.transformers,
            loads_right_on=found.loads_right_on,
        )


def shown_while_silenced(message: str) -> bool:
    """Whether a loader's `message` still reaches the log inside `silence_tied_weight_report`."""
    from wan_distill.umt5.silence import silence_tied_weight_report

    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logger = logging.getLogger(LOADERS)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        with silence_tied_weight_report():
            logger.warning(message)
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
    return message in seen


def tell(encoder, verdict: Verdict) -> None:
    """The readable verdict."""
    print(
        f"file       holds {verdict.keys_in_file}; loads right on transformers "
        f"{verdict.loads_right_on} "
        f"(installed: {verdict.transformers})"
    )
    if encoder is not None:
        one = encoder.shared.weight is encoder.encoder.embed_tokens.weight
        print(
            f"tying      {SHARED} and {EMBED} are {'one parameter' if one else 'two parameters'} "
            "in memory"
        )
        print(
            f"rows       {verdict.rows_compared} of {verdict.rows_total} compared with the file: "
            "equal"
        )
        print(
            f"silencing  hides the tied-weight report: {not shown_while_silenced(REPORT)}; "
            f"hides a report of another missing key: {not shown_while_silenced(OTHER)}"
        )
    print(
        f"{verdict.verdict}: {verdict.reason}"
        + (f"\n           {verdict.remedy}" if verdict.remedy else "")
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="test_umt5_weights.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--teacher_path",
        default=str(EMBEDDED_TEACHER),
        help="hub id, pipeline or text encoder folder",
    )
    parser.add_argument(
        "--repair", metavar="OUT", help="write a clean copy of the text encoder to this new folder"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the verdict as JSON and nothing else"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--cache_dir", help="where hub files are kept")
    parser.add_argument(
        "--allow_pickle", action="store_true", help="also read .bin weights, if you trust them"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    where = dict(revision=args.revision, cache_dir=args.cache_dir)
    try:
        if args.repair:
            from wan_distill.umt5.inspect import locate
            from wan_distill.umt5.repair import repair_on_disk

            encoder, verdict = None, repair_on_disk(locate(args.teacher_path, **where), args.repair)
        else:
            encoder, verdict = check(args.teacher_path, allow_pickle=args.allow_pickle, **where)
    except TextEncoderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(verdict.to_json()))
    else:
        tell(encoder, verdict)
    return 1 if verdict.verdict == "BROKEN" else 0


# ---------------------------------------------------------------------- the same checks, for pytest


def test_the_table_in_use_is_the_files():
    from wan_distill.umt5.verify import verify

    encoder, verdict = check(EMBEDDED_TEACHER)
    assert verdict.verdict == "PASS" and verdict.rows_compared == verdict.rows_total > 100
    assert verify(encoder, EMBEDDED_TEACHER).matches


def test_both_names_are_one_parameter():
    encoder, _ = check(EMBEDDED_TEACHER)
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_only_the_tied_weight_report_is_hidden():
    assert not shown_while_silenced(REPORT)
    assert shown_while_silenced(OTHER)
    assert shown_while_silenced(
        REPORT.replace("\n\nNotes", "\nencoder.block.0.x | UNEXPECTED |\n\nNotes")
    )


def test_the_script_says_pass(capsys):
    assert main(["--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] == "PASS"
    assert {"reason", "remedy", "keys_in_file", "rows_compared", "transformers"} <= set(verdict)


if __name__ == "__main__":
    sys.exit(main())
