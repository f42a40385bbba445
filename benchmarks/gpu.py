"""Everything that only a GPU can show, in one command of at most nine minutes, without network.

    python benchmarks/gpu.py                    on one card of 80 GB: gpu.json and gpu.md
    python benchmarks/gpu.py --rehearse         the same of a tiny model, on any machine

First what matters most: A14B's updates of `dmd` and `trajectory` at 81x480x832 (peak, seconds by
role, share of the matrix rate), then whole runs of the embedded teacher in bf16 to their very end,
side by side, then each flag of speed and memory on a short clip. What no time is left for is said
to be left out. Exit code 1 where anything failed, or where a bar is missed: a peak of at most
76 GB, and half of the matrix rate.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_model import CLIP, random_info
from update_bench import Bench

from wan_distill.errors import one_line
from wan_distill.planning.matrix_rate import matrix_rate
from wan_distill.planning.memory import estimate
from wan_distill.settings.config import Config
from wan_distill.settings.resolve import resolve
from wan_distill.training.rehearsal import first_step

REPOSITORY = Path(__file__).resolve().parent.parent
MOST_BYTES = 76e9
LEAST_SHARE = 0.5
FULL_CLIP = dict(num_frames=81, height=480, width=832)
SHORT_CLIP = FULL_CLIP | dict(num_frames=17)
Settings = dict[str, Any]
UPDATES: dict[str, Settings] = {
    "dmd": dict(method="dmd"),
    "trajectory": dict(method="trajectory"),
    "trajectory, --compile": dict(method="trajectory", compile=True),
}
FLAGS: dict[str, Settings] = {
    "no flag": {},
    "compile": dict(compile=True),
    "fp8, compile": dict(base_precision="fp8", compile=True),
    "keep_attention": dict(keep_attention=True),
    "fp8": dict(base_precision="fp8"),
    "int8": dict(base_precision="int8"),
    "nf4": dict(base_precision="nf4"),
    "offload": dict(offload=True),
    "8-bit Adam": dict(use_8bit_adam=True),
}
RUNS: dict[str, list[str]] = {
    "bf16": ["--method=dmd"],
    "fp8": ["--method=dmd", "--base_precision=fp8"],
    "int8": ["--method=dmd", "--base_precision=int8"],
    "nf4": ["--method=dmd", "--base_precision=nf4"],
    "compile": ["--method=trajectory", "--compile"],  # three roles compile for minutes
}
LONGEST_RUN = 200.0  # seconds, so that there is time for the flags
RUN = ["--mixed_precision=bf16", "--gradient_checkpointing", "--save_merged"]
COUNTS = {
    False: dict(max_train_steps=20, num_trajectories=64, eval_samples=16, critic_warmup_steps=10),
    True: dict(max_train_steps=1, num_trajectories=4, eval_samples=2, critic_warmup_steps=1),
}
NEEDS = {"updates": 130.0, "runs": 60.0, "flags": 25.0}  # seconds, before one more is begun


def figures(model: str, settings: Settings, folder: Path) -> dict[str, Any]:
    """One update of each role of the high expert, and an evaluation without gradient."""
    info = random_info(model, folder)
    given = Config(teacher_path="random", output_dir=str(folder), **settings)
    bench = Bench(resolve(given, info), info)
    config, device = bench.config, bench.device
    evaluation = min(_evaluation(bench) for _ in range(2))  # the first one warms up
    seconds, flops = {}, bench.flops()
    for role in bench.method.roles:
        for _ in range(2 if bench.config.compile else 1):  # the first one compiles
            _, seconds[role] = bench.update(first_step(bench.method, role))
    result = dict(
        seconds_per_update=seconds,
        seconds_per_evaluation=evaluation,
        predicted_peak_bytes=estimate(config, info).peak,
    )
    if device.type == "cuda":
        rate = matrix_rate(device, bench.runtime.dtype).rate
        result |= dict(
            peak_bytes=torch.cuda.max_memory_allocated(device),
            matmul_rate=rate,
            matmul_share=sum(flops[role] for role in seconds) / sum(seconds.values()) / rate,
        )
    return result


@torch.no_grad()
def _evaluation(bench: Bench) -> float:
    """Seconds of the teacher's velocity of one clip."""
    shape = bench.info.latent_shape(bench.config)
    x = torch.randn(1, *shape, device=bench.device)
    prompt = bench.inputs.run.condition(["a prompt"])
    started = bench._time()
    bench.denoiser.velocity(x, torch.tensor([0.95]), prompt, role="teacher")
    return bench._time() - started


def whole_run(flags: list[str], rehearsal: bool, limit: float, folder: Path) -> dict[str, Any]:
    """A run of the embedded teacher by the command line, to its end. Raises where its exit code is
    not 0, and after `limit` seconds.
    """
    counts = [f"--{name}={number}" for name, number in COUNTS[rehearsal].items()]
    counts += ["--monitor_samples=4"] if rehearsal else []
    script = str(REPOSITORY / "train_distillation.py")
    command = [sys.executable, script, *RUN, *counts, *flags, f"--output_dir={folder}"]
    threads = str(max(1, (os.cpu_count() or 1) // len(RUNS)))  # the runs go on side by side
    environment = os.environ | dict(OMP_NUM_THREADS=threads)
    started = time.perf_counter()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    if ended.returncode:
        raise RuntimeError(f"exit code {ended.returncode}: {ended.stderr.strip()[-400:]}")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [json.loads(line).get("student_loss", 0.0) for line in lines]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError("a loss is not finite")
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return dict(seconds=time.perf_counter() - started, evaluation=bool(evaluation))


Measure = Callable[[Path], dict[str, Any]]


class Measurements:
    """Parts by kind and name, as long as there is time."""

    def __init__(self, minutes: float, leave_out: Iterable[str]):
        self.end = time.perf_counter() + 60 * minutes
        self.leave_out = set(leave_out)
        self.parts: dict[str, dict[str, Any]] = {"updates": {}, "runs": {}, "flags": {}}

    def left(self) -> float:
        """Seconds until the end of the time that was given."""
        return self.end - time.perf_counter()

    def add(self, kind: str, parts: dict[str, Measure], together: bool = False) -> None:
        """Measures parts, one by one or all `together`; a failure is part of the result."""
        if together:
            with ThreadPoolExecutor(len(parts)) as pool:
                list(pool.map(lambda part: self._add(kind, *part), parts.items()))
            return
        for name, measure in parts.items():  # in this thread: a run takes over the signals
            self._add(kind, name, measure)

    def _add(self, kind: str, name: str, measure: Measure) -> None:
        left = self.left()
        if self.leave_out & {kind, name}:
            result: dict[str, Any] = {"left_out": "as asked"}
        elif left < NEEDS[kind]:
            result = {"left_out": f"{left:.0f} s were left"}
        else:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = measure(Path(folder) / "out")
                except Exception as error:  # the other parts are measured all the same
                    result = {"failed": f"{type(error).__name__}: {one_line(error)}"}
        self.parts[kind][name] = result
        print(f"{kind} {name}: {json.dumps(result)}", flush=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def failures(self) -> list[str]:
        """What failed, and which bars are missed."""
        found = []
        for kind, parts in self.parts.items():
            for name, part in parts.items():
                if "failed" in part:
                    found.append(f"{kind} {name}: {part['failed']}")
                if kind == "updates" and part.get("peak_bytes", 0) > MOST_BYTES:
                    found.append(f"{name}: a peak of {part['peak_bytes'] / 1e9:.1f} GB")
                if kind == "updates" and part.get("matmul_share", 1) < LEAST_SHARE:
                    found.append(f"{name}: {part['matmul_share']:.2f} of the matrix rate")
        return found


def measure_all(rehearsal: bool, minutes: float, leave_out: Iterable[str]) -> Measurements:
    """All parts, in the order of their worth."""
    done = Measurements(minutes, leave_out)
    model = "tiny" if rehearsal else "a14b"
    full = CLIP["tiny"] | dict(mixed_precision="bf16") if rehearsal else FULL_CLIP
    short = full if rehearsal else SHORT_CLIP

    def update(clip: Settings, changes: Settings) -> Measure:
        # Of one micro-batch: the others of an update are like it.
        always = dict(gradient_checkpointing=True, gradient_accumulation_steps=1)
        settings = clip | always | changes
        return lambda folder: figures(model, settings, folder)

    def run(flags: list[str]) -> Measure:
        limit = math.inf if rehearsal else LONGEST_RUN
        return lambda folder: whole_run(flags, rehearsal, min(done.left(), limit), folder)

    if importlib.util.find_spec("bitsandbytes") is None:
        done.leave_out.add("8-bit Adam")
    done.add("updates", {name: update(full, changes) for name, changes in UPDATES.items()})
    done.add("runs", {name: run(flags) for name, flags in RUNS.items()}, together=True)
    of_a_clip = dict(method="trajectory")
    done.add("flags", {name: update(short, of_a_clip | more) for name, more in FLAGS.items()})
    return done


def table(result: dict[str, Any]) -> str:
    """The result in Markdown, for RESULTS.md."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['seconds']:.0f} s in all", ""]
    lines += ["| update | seconds | an evaluation | of the matrix rate | peak | predicted |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind in ("updates", "flags"):
        for name, part in result[kind].items():
            title = f"{name}, full clip" if kind == "updates" else f"trajectory, 17 frames, {name}"
            lines.append(f"| {title} | {_cells(part)} |")
    lines += ["", "| whole run | seconds |", "|---|---|"]
    for name, part in result["runs"].items():
        said = part.get("failed") or part.get("left_out")
        lines.append(f"| {name} | {said or format(part['seconds'], '.0f')} |")
    return "\n".join(lines) + "\n"


def _cells(part: dict[str, Any]) -> str:
    if said := part.get("failed") or part.get("left_out"):
        return f"{said} | | | |"
    seconds = ", ".join(f"{role} {s:.2f}" for role, s in part["seconds_per_update"].items())
    share = f"{part['matmul_share']:.2f}" if "matmul_share" in part else ""
    peak = f"{part['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in part else ""
    predicted = f"{part['predicted_peak_bytes'] / 1e9:.1f} GB"
    evaluation = f"{part['seconds_per_evaluation']:.2f}"
    return f"{seconds} | {evaluation} | {share} | {peak} | {predicted}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on any machine")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--leave_out", nargs="*", default=[], help="names of parts, or of a kind")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="without its suffix")
    args = parser.parse_args()
    if not (args.rehearse or torch.cuda.is_available()):
        parser.error("there is no GPU here; --rehearse goes through the same on any machine")
    started = time.perf_counter()
    done = measure_all(args.rehearse, args.minutes, args.leave_out)
    failures = done.failures()
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = dict(
        device=torch.cuda.get_device_name() if on_gpu else "cpu",
        torch=torch.__version__,
        seconds=time.perf_counter() - started,
        failures=failures,
        **done.parts,
    )
    args.output.with_suffix(".json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    args.output.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(f"\n{table(result)}", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
