"""Tied weights with every version that matters: versions x files x paths, and for each cell the
verdict that is right.

    python tests/compat/run_matrix.py                    all versions
    python tests/compat/run_matrix.py --versions 5.2.0   one of them
    python tests/compat/run_matrix.py --write_docs       also writes docs/UMT5_MATRIX.md

Each version is installed once, into .cache/compat. Exit code 0 when every cell is as expected: the
right verdict and, after our loader, embeddings that equal those of an encoder built from the true
table to 1e-6.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
CACHE = Path(os.environ.get("WAN_DISTILL_COMPAT_CACHE", REPOSITORY / ".cache" / "compat"))
VERSIONS = ("4.57.6", "5.0.0", "5.2.0", "5.3.0", "5.15.1", "newest")
# diffusers 0.42 needs huggingface_hub >= 1.32, transformers 4.57 needs < 1. So 4.57 gets an older
# diffusers, whose group offloading needs an accelerator (n/a on a machine without one).
COMPANIONS = {"4.57.6": ["diffusers==0.37.1"]}
TOLERANCE = 1e-6


def install(version: str) -> Path:
    """A folder that holds this transformers (and what it needs besides torch), installed once."""
    folder = CACHE / version
    if not (folder / "done").exists():
        name = "transformers" if version == "newest" else f"transformers=={version}"
        pip = [sys.executable, "-m", "pip", "install", "-q", "--upgrade", "--target", str(folder)]
        subprocess.run([*pip, name, *COMPANIONS.get(version, [])], check=True)
        (folder / "done").write_text("")
    return folder


def expected_verdict(version: tuple[int, int], layout: str, path: str) -> str:
    """PASS: this version loads it right and tied. REPAIRED: it does not, and we repair it. BROKEN:
    it is not known which table is right.
    """
    if layout in ("both healthy but different", "neither"):
        return "BROKEN"
    if "poisoned" in layout:
        return "REPAIRED"
    if version < (5, 0):
        return "PASS"
    if path == "meta + assign":  # assigning leaves the second name on meta, or the two names untied
        return "REPAIRED"
    if version < (5, 3):
        return "REPAIRED"  # 5.0 to 5.2 never tie: the table in use is garbage, or a second copy
    return "REPAIRED" if layout in ("both equal", ".bin both") and version < (5, 15) else "PASS"


def run_version(version: str) -> dict:
    """What cells.py prints under this version of transformers."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(install(version)), str(REPOSITORY)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "cells.py")], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{version}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def failures(result: dict) -> list[str]:
    """Cells that are not as expected, in words."""
    version = tuple(int(part) for part in result["transformers"].split(".")[:2])
    wrong = []
    for name, cell in result["cells"].items():
        layout, path = name.split("|")
        wanted = expected_verdict(version, layout, path)
        if cell["verdict"] == "n/a" and version < (5, 0) and path == "group offload":
            continue
        if cell["verdict"] != wanted:
            wrong.append(f"{result['transformers']} {name}: expected {wanted}, got {cell}")
        elif wanted != "BROKEN" and not cell["error"] <= TOLERANCE:
            wrong.append(
                f"{result['transformers']} {name}: embeddings differ by {cell['error']:.1e}"
            )
    return wrong


INTRODUCTION = f"""# Tied weights, measured

Written by `python tests/compat/run_matrix.py --write_docs`. Each cell shows what stock code gives
on this path (`ok`; `BROKEN`: wrong embeddings without an error; or the name of the error), then our
verdict. After every `PASS` and `REPAIRED` the embeddings equal those of an encoder with the true
table to {TOLERANCE:g} (for bf16: an encoder in bf16, for int8: one quantised in the same way).
`n/a`: transformers 4.57 needs an older diffusers, which group-offloads on an accelerator only.
"""


def as_markdown(results: list[dict]) -> str:
    """The document: one table per version, a row per layout, a column per path."""
    lines = [INTRODUCTION]
    for result in results:
        paths = list(dict.fromkeys(name.split("|")[1] for name in result["cells"]))
        layouts = list(dict.fromkeys(name.split("|")[0] for name in result["cells"]))
        lines += [
            f"## transformers {result['transformers']} (diffusers {result['diffusers']})",
            "",
            "| file holds | " + " | ".join(paths) + " |",
            "|---" * (len(paths) + 1) + "|",
        ]
        for layout in layouts:
            cells = [result["cells"][f"{layout}|{path}"] for path in paths]
            lines.append(
                f"| {layout} | "
                + " | ".join(f"{c['stock']} → {c['verdict']}" for c in cells)
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--versions", nargs="+", default=VERSIONS, metavar="X.Y.Z")
    parser.add_argument("--write_docs", action="store_true", help="write docs/UMT5_MATRIX.md")
    args = parser.parse_args()
    results: list[dict] = []
    wrong: list[str] = []
    for version in args.versions:
        result = run_version(version)
        failed = failures(result)
        broken = sum(cell["stock"] == "BROKEN" for cell in result["cells"].values())
        print(
            f"transformers {result['transformers']:<8} {len(result['cells'])} cells, {broken} "
            f"silently broken in stock code, {len(failed)} not as expected after ours",
            flush=True,
        )
        results.append(result)
        wrong += failed
    if args.write_docs:
        (REPOSITORY / "docs" / "UMT5_MATRIX.md").write_text(as_markdown(results), encoding="utf-8")
    print(*wrong, sep="\n")
    print(f"{sum(len(r['cells']) for r in results) - len(wrong)} passed, {len(wrong)} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
