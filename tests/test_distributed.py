"""Two processes do exactly what one does with twice the accumulation, and one that fails ends them all.

    python -m pytest tests/test_distributed.py                 one method, one expert, under torchrun
    python tests/test_distributed.py                           all methods, torchrun and accelerate launch, a failure
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from wan_distill import metrics

REPOSITORY = Path(__file__).resolve().parent.parent
UPDATES = 10
FLAGS = ["--height", "32", "--width", "32", "--num_frames", "5", "--train_batch_size", "1", "--sample_batch_size", "8",
         "--num_trajectories", "8", "--teacher_steps", "6", "--rank", "4", "--max_sequence_length", "12",
         "--negative_prompt", "", "--mixed_precision", "no", "--checkpointing_steps", "100", "--lr_warmup_steps", "1",
         "--lr_scheduler", "constant", "--logging_steps", "2",
         "--prompts", str(REPOSITORY / "assets" / "tiny_wan22" / "prompts.txt"), "--no-evaluate", "--no-save_merged"]
METHODS = {  # ten updates an expert in all: of dmd's, five are the student's
    "trajectory": ["--max_train_steps", str(UPDATES)],
    "consistency": ["--max_train_steps", str(UPDATES)],
    "dmd": ["--max_train_steps", str(UPDATES // 2), "--critic_updates", "1", "--critic_warmup_steps", "0"],
}
LAUNCHERS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
                   "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
}


def launch(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def compare(teacher: Path, folder: Path, method: str, launcher: str, extra: tuple[str, ...] = (),
            alone_first: int = 0) -> float:
    """The largest relative difference of any tensor of any role, one process against two.

    With `alone_first` the two begin as one, which does that many student updates: a run may change its processes.
    """
    flags = ["--teacher_path", str(teacher), "--method", method, *METHODS[method], *FLAGS, *extra]
    script = str(REPOSITORY / "train_distillation.py")
    alone = [sys.executable, script, *flags, "--gradient_accumulation_steps", "2"]
    runs = [[*alone, "--output_dir", str(folder / "one")]]
    if alone_first:
        runs.append([*alone, "--output_dir", str(folder / "two"), "--max_train_steps", str(alone_first)])
    runs.append([*LAUNCHERS[launcher], script, *flags, "--output_dir", str(folder / "two")])
    for command in runs:
        ended = launch(command)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert ("Going on from" in ended.stdout) == bool(alone_first)
    worst, moved = 0.0, 0
    for file in sorted((folder / "one").glob("*/checkpoint-*/*.safetensors")):
        expected, found = load_file(file), load_file(folder / "two" / file.relative_to(folder / "one"))
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            worst = max(worst, float((tensor - found[name]).norm() / tensor.norm().clamp_min(1e-12)))
            moved += name.startswith("weight.") and ".lora_B." in name and bool(tensor.abs().max() > 0)
    assert moved, "nothing was trained"
    one, two = (metrics.read_lines(folder / name / "metrics.jsonl") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert all(abs(a[k] - b[k]) <= 1e-6 * abs(a[k]) for k in a if k.endswith("_loss")), (a, b)
    return worst


def test_two_processes_equal_one_with_accumulation(random_teacher, tmp_path):
    """To the bit: halves and doubles are exact. The two take over what one has begun."""
    assert compare(random_teacher, tmp_path, "dmd", "torchrun", ("--expert", "high"), alone_first=2) == 0


FAILING = """
import os, sys
import train_distillation
from wan_distill.runtime import Learner
update, calls = Learner.update, []

def fail(self, runtime):
    calls.append(0)
    if runtime.rank == 1 and len(calls) == 2:
        raise RuntimeError("the second card fell off the bus")
    return update(self, runtime)

Learner.update = fail
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def check_a_failing_rank(teacher: Path, folder: Path) -> float:
    """Seconds from the start of a run whose second rank fails until all have ended, its message shown."""
    script = folder / "failing.py"
    script.write_text(FAILING)
    started = time.monotonic()
    ended = launch([*LAUNCHERS["torchrun"], str(script), "--teacher_path", str(teacher), "--method",
                    "trajectory", *METHODS["trajectory"], *FLAGS, "--output_dir", str(folder / "out")])
    assert ended.returncode != 0
    assert "rank 1 of 2 failed: RuntimeError: the second card fell off the bus" in ended.stderr
    return time.monotonic() - started


def main() -> int:
    """Every method under both launchers; prints the worst relative difference of each."""
    import tempfile

    from conftest import write_pipeline

    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        teacher = write_pipeline(Path(folder) / "teacher")
        for launcher in LAUNCHERS:
            for method in METHODS:
                worst = compare(teacher, Path(folder) / launcher / method, method, launcher,
                                alone_first=2 * (launcher == "torchrun"))
                failed += worst != 0
                print(f"{launcher:<11} {method:<12} largest relative difference after {UPDATES} updates: {worst:.1e}",
                      flush=True)
        seconds = check_a_failing_rank(teacher, Path(folder))
        failed += not seconds < 60
        print(f"a failing rank ended both, with its message, {seconds:.0f} s after the start")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
