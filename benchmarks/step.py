"""What an update costs, and what the training loop adds to it, with random weights of true shape.

    python benchmarks/step.py --model tiny
    python benchmarks/step.py --model middle --json step.json
    python benchmarks/step.py --model a14b --height 480 --width 832 --num_frames 81 --method dmd

`overhead` is the time of an update divided by that of a bare loop of the same transformer forwards
and backwards. Both are measured in turns in the same run, so that other load on the machine affects
both.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_model import CLIP, MODELS, random_info
from update_bench import Bench

from wan_distill.settings.config import Config
from wan_distill.settings.resolve import resolve

SETTINGS = (
    "height",
    "width",
    "num_frames",
    "train_batch_size",
    "gradient_accumulation_steps",
    "rank",
    "mixed_precision",
    "gradient_checkpointing",
    "keep_attention",
    "base_precision",
    "offload",
    "use_8bit_adam",
    "compile",
    "real_score",
    "score_draws",
    "diversity_weight",
)


def bench(args: argparse.Namespace, folder: Path) -> Bench:
    """The bench that the command line describes; `folder` is for its files."""
    info = random_info(args.model, folder)
    given = {name: getattr(args, name) for name in SETTINGS}
    settings = CLIP.get(args.model, {}) | {k: v for k, v in given.items() if v is not None}
    if not torch.cuda.is_available():
        settings = {"mixed_precision": "no", "gradient_checkpointing": False} | settings
    config = Config(
        teacher_path="random",
        method=args.method,
        output_dir=str(folder),
        max_train_steps=10_000,
        critic_warmup_steps=0,
        **settings,
    )
    return Bench(resolve(config, info), info)


def table(model: str, result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = [
        ("overhead over a bare loop", f"{result['overhead']:.3f}"),
        ("guidance in one forward over two", f"{result['guidance_in_one']:.3f}"),
    ]
    for role, seconds in result["seconds_per_update"].items():
        rows.append((f"seconds per update, {role}", f"{seconds:.4f}"))
    for role, number in result["evaluations_per_update"].items():
        rows.append((f"evaluations per update, {role}", f"{number:.1f}"))
    rows += [
        ("achieved of the measured matrix rate", f"{result['matmul_share']:.2f}"),
        ("measured matrix rate", f"{result['matmul_rate'] / 1e12:.3g} TFLOP/s"),
        ("peak memory", f"{result['peak_bytes'] / 1e9:.3g} GB"),
        ("peak predicted by --dry_run", f"{result['predicted_peak_bytes'] / 1e9:.3g} GB"),
    ]
    lines = [f"| {model}, {result['settings']['method']}, {result['device']} | |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    methods = ("trajectory", "dmd", "consistency")
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--method", choices=methods, default="trajectory")
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    for name in ("height", "width", "num_frames", "train_batch_size", "rank", "score_draws"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--diversity_weight", type=float)
    parser.add_argument("--real_score", choices=("guided", "samples", "paired"))
    parser.add_argument("--mixed_precision", choices=("no", "bf16"))
    parser.add_argument("--base_precision", choices=("bf16", "fp8", "int8", "nf4"))
    switches = ("gradient_checkpointing", "keep_attention", "offload", "use_8bit_adam", "compile")
    for name in switches:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction)
    parser.add_argument("--json", type=Path, help="also writes the figures to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = bench(args, Path(folder)).figures(args.updates)
    print(table(args.model, result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
