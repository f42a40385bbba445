"""Fails unless a run's evaluation reached what is asked.

python benchmarks/assert_quality.py OUTPUT_DIR --gap_closed 0.95
python benchmarks/assert_quality.py REFINED_DIR --gap_closed 0.95 --no_worse_than OUTPUT_DIR
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path)
    parser.add_argument(
        "--gap_closed", type=float, required=True, help="least gap closed at every step count"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        help="motion and diversity: largest relative deviation",
    )
    parser.add_argument(
        "--no_worse_than",
        type=Path,
        metavar="OUTPUT_DIR",
        help="the students' Fréchet distances must not be above those of this run",
    )
    args = parser.parse_args()
    table = json.loads((args.output_dir / "evaluation.json").read_text(encoding="utf-8"))
    failures = [
        f"gap closed in {n} steps is {value:.3f}"
        for n, value in table["gap_closed_by_steps"].items()
        if value < args.gap_closed
    ]
    before = {}
    if args.no_worse_than:
        other = json.loads((args.no_worse_than / "evaluation.json").read_text(encoding="utf-8"))
        before = {row["sampler"]: row["frechet"] for row in other["rows"]}
    for row in table["rows"]:
        name = row["sampler"]
        if name.startswith("student"):
            failures += [
                f"{name}: {what} is {row[what]:.3f} of the teacher's"
                for what in ("motion", "diversity")
                if abs(row[what] - 1) > args.tolerance
            ]
            if args.no_worse_than and row["frechet"] > before.get(name, -math.inf):
                failures.append(
                    f"{name}: Fréchet distance {row['frechet']:.2f}, it was "
                    f"{before.get(name, math.nan):.2f}"
                )
    print("\n".join(failures) or f"quality holds: gap closed {table['gap_closed_by_steps']}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
