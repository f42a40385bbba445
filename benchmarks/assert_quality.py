"""Exits with 1 unless the evaluation of a run reaches a given quality.

python benchmarks/assert_quality.py OUTPUT_DIR --gap_closed 0.95
python benchmarks/assert_quality.py REFINED_DIR --gap_closed 0.95 --no_worse_than OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def read_evaluation(output_dir: Path) -> dict[str, Any]:
    """The content of evaluation.json."""
    content: dict[str, Any] = json.loads(
        (output_dir / "evaluation.json").read_text(encoding="utf-8")
    )
    return content


def shortfalls(
    evaluation: dict[str, Any], before: dict[str, Any] | None, gap_closed: float, tolerance: float
) -> list[str]:
    """One line for each value that falls short.

    Args:
        before: evaluation of a run below whose 95 % interval the gap closed may not be (what is
            within it cannot be told apart), and whose motion and diversity may be no nearer to 1.
        gap_closed: smallest gap closed that is allowed, at every step count.
        tolerance: largest relative deviation of motion and diversity from the teacher's.
    """
    lines = [
        f"gap closed in {steps} steps is {value:.3f}"
        for steps, value in evaluation["gap_closed_by_steps"].items()
        if value < gap_closed
    ]
    if before and evaluation["gap_closed"] < (least := before["gap_closed_interval"][0]):
        lines.append(f"gap closed is {evaluation['gap_closed']:.3f}, it was {least:.3f} at least")
    for row in evaluation["rows"]:
        name = row["sampler"]
        if not name.startswith("student"):
            continue
        lines += [
            f"{name}: {what} is {row[what]:.3f} of the teacher's"
            for what in ("motion", "diversity")
            if abs(row[what] - 1) > tolerance
        ]
        old = next((r for r in before["rows"] if r["sampler"] == name), None) if before else None
        lines += [
            f"{name}: {what} is {row[what]:.3f} of the teacher's, it was {old[what]:.3f}"
            for what in ("motion", "diversity")
            if old and abs(row[what] - 1) > abs(old[what] - 1)
        ]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--gap_closed",
        type=float,
        required=True,
        help="smallest gap closed that is allowed, at every step count",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="largest relative deviation of motion and diversity from the teacher's (%(default)s)",
    )
    parser.add_argument(
        "--no_worse_than",
        type=Path,
        metavar="OUTPUT_DIR",
        help="the gap closed may not be below this run's 95 %% interval, motion and diversity no "
        "further from 1",
    )
    args = parser.parse_args()
    evaluation = read_evaluation(args.output_dir)
    before = read_evaluation(args.no_worse_than) if args.no_worse_than else None
    lines = shortfalls(evaluation, before, args.gap_closed, args.tolerance)
    print("\n".join(lines) or f"quality holds: gap closed {evaluation['gap_closed_by_steps']}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
