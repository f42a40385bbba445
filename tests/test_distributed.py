"""Two processes do exactly what one does with twice the accumulation, and one that fails ends them
all.

python -m pytest tests/test_distributed.py                 one method, one expert, under torchrun
python tests/test_distributed.py                           all methods, torchrun and accelerate
launch, a failure
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from wan_distill.training import metrics

UPDATES = 10
FLAGS = [
    "--height",
    "32",
    "--width",
    "32",
    "--num_frames",
    "5",
    "--train_batch_size",
    "1",
    "--sample_batch_size",
    "8",
    "--num_trajectories",
    "8",
    "--teacher_steps",
    "6",
    "--rank",
    "4",
    "--max_sequence_length",
    "12",
    "--negative_prompt",
    "",
    "--mixed_precision",
    "no",
    "--checkpointing_steps",
    "100",
    "--lr_warmup_steps",
    "1",
    "--lr_scheduler",
    "constant",
    "--logging_steps",
    "2",
    "--prompts",
    str(REPOSITORY / "assets" / "tiny_wan22" / "prompts.txt"),
    "--no-evaluate",
    "--no-save_merged",
]
METHODS = {  # ten updates an expert in all: of dmd's, five are the student's
    "trajectory": ["--max_train_steps", str(UPDATES)],
    "consistency": ["--max_train_steps", str(UPDATES)],
    "dmd": [
        "--max_train_steps",
        str(UPDATES // 2),
        "--critic_updates",
        "1",
        "--critic_warmup_steps",
        "0",
    ],
}
METHODS["dmd-samples"] = [*METHODS["dmd"], "--real_score", "samples"]  # as many of one role more

# Sums over tokens in another order differ by 1e-7; Adam, which divides by the gradient's own size,
# enlarges it.
ROUNDING = 1e-3
LAUNCHERS = {
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
    ],
    # with --cpu accelerate 1.15 starts one process whatever their number; --multi_gpu starts two,
    # also without a GPU
    "accelerate": [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ],
}


# diffusers counts accelerators before it spreads a clip's tokens, also where gloo does the work of
# the absent ones.
TOGETHER = """
import sys
import torch
torch.accelerator.device_count = lambda: 1
import train_distillation
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def launch(command: list[str]) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def compare(
    teacher: Path,
    folder: Path,
    method: str,
    launcher: str,
    extra: tuple[str, ...] = (),
    alone_first: int = 0,
    only_two: tuple[str, ...] = (),
) -> float:
    """The largest relative difference of any tensor of any role, one process against two.

    With `alone_first` the two begin as one, which does that many student updates: a run may change
    its processes.
    """
    flags = [
        "--teacher_path",
        str(teacher),
        "--method",
        method.removesuffix("-samples"),
        *METHODS[method],
        *FLAGS,
        *extra,
    ]
    script = str(REPOSITORY / "train_distillation.py")
    alone = [sys.executable, script, *flags, "--gradient_accumulation_steps", "2"]
    runs = [[*alone, "--output_dir", str(folder / "one")]]
    if alone_first:
        runs.append(
            [*alone, "--output_dir", str(folder / "two"), "--max_train_steps", str(alone_first)]
        )
    if "--context_parallel" in only_two:
        folder.mkdir(parents=True, exist_ok=True)
        script = str(folder / "together.py")
        Path(script).write_text(TOGETHER)
    runs.append(
        [*LAUNCHERS[launcher], script, *flags, *only_two, "--output_dir", str(folder / "two")]
    )
    for command in runs:
        ended = launch(command)
        assert ended.returncode == 0, ended.stderr[-2000:]
    assert ("Going on from" in ended.stdout) == bool(alone_first)
    worst, moved = 0.0, 0
    for file in sorted((folder / "one").glob("*/checkpoint-*/*.safetensors")):
        expected, found = (
            load_file(file),
            load_file(folder / "two" / file.relative_to(folder / "one")),
        )
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            worst = max(
                worst, float((tensor - found[name]).norm() / tensor.norm().clamp_min(1e-12))
            )
            moved += (
                name.startswith("weight.") and ".lora_B." in name and bool(tensor.abs().max() > 0)
            )
    assert moved, "nothing was trained"
    one, two = (metrics.read_lines(folder / name / "metrics.jsonl") for name in ("one", "two"))
    rounding = ROUNDING if "--context_parallel" in only_two else 1e-6
    for a, b in zip(
        one, two, strict=True
    ):  # Adam hides a gradient of half the size; its norm does not
        seen = [k for k in a if k.endswith(("_loss", "_gradient_norm"))]
        assert all(abs(a[k] - b[k]) <= rounding * abs(a[k]) for k in seen), (a, b)
    return worst


def test_two_processes_equal_one_with_accumulation(random_teacher, tmp_path):
    """To the bit: halves and doubles are exact. The two take over what one has begun."""
    assert (
        compare(
            random_teacher, tmp_path, "dmd-samples", "torchrun", ("--expert", "high"), alone_first=2
        )
        == 0
    )


def test_two_processes_that_share_one_base_equal_one_that_has_it_whole(random_teacher, tmp_path):
    looks = (
        "--monitor_steps",
        "1",
        "--monitor_samples",
        "4",
        "--validation_steps",
        "2",
        "--num_trajectories",
        "80",
    )  # three shards of samples: one process has one more to solve than the other
    assert (
        compare(random_teacher, tmp_path, "trajectory", "torchrun", looks, only_two=("--shard",))
        < 1e-6
    )


def test_two_processes_on_each_clip_together_equal_one(random_teacher, tmp_path):
    looks = (
        "--monitor_steps",
        "1",
        "--monitor_samples",
        "4",
        "--validation_steps",
        "2",
        "--num_trajectories",
        "40",
        "--gradient_accumulation_steps",
        "2",
        "--expert",
        "high",
    )
    worst = compare(
        random_teacher, tmp_path, "trajectory", "torchrun", looks, only_two=("--context_parallel",)
    )
    assert worst < ROUNDING


SHARDED = """
import sys
import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.system.runtime import process_state
from wan_distill.model.loading import shard_base

process_state()
torch.accelerator.device_count = lambda: 1
dtype, together = getattr(torch, sys.argv[2]), sys.argv[3] == "together"
found = []
for share in (False, True):
    base = WanTransformer3DModel.from_pretrained(sys.argv[1], dtype=dtype).requires_grad_(False)
    if share and together:
        base.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    elif share:
        shard_base(base, torch.device("cpu"))
    held = sum(getattr(p, "_local_tensor", p).numel() * p.element_size() for p in base.parameters())
    add_adapter(base, "student", rank=4, alpha=4.0, layers=("to_q", "ffn.net.2"), seed=1)
    for p in adapter_parameters(base, "student").values():
        p.data.add_(0.05)
    base.enable_gradient_checkpointing()
    rng = torch.Generator().manual_seed(1)
    x, prompt = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 8, 16, generator=rng)
    denoiser = Denoiser({"high": base}, None)
    with denoiser.training("student"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        velocity = denoiser.velocity(x, torch.full((2,), 0.9, dtype=torch.float64), prompt, role="student")
        velocity.square().mean().backward()
    found.append((held, velocity, [p.grad for p in adapter_parameters(base, "student").values()]))
(whole, v, g), (part, w, h) = found
if together:
    for gradient in h:
        torch.distributed.all_reduce(gradient)
    assert all(float((a - b).norm() / a.norm()) < 1e-6 for a, b in zip([v, *g], [w, *h], strict=True))
    sys.exit()
assert 0.45 < part / whole < 0.6, part / whole
assert torch.equal(v, w) and all(a.abs().max() > 0 and torch.equal(a, b) for a, b in zip(g, h, strict=True))
"""


@pytest.mark.parametrize(
    ("dtype", "what"), [("float32", "base"), ("bfloat16", "base"), ("float32", "together")]
)
def test_a_shared_base_or_clip_gives_the_same_gradients(random_teacher, tmp_path, dtype, what):
    """With gradient checkpointing, and with Wan's float32 tables inside bf16 blocks; half a base is
    half a base.
    """
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    ended = launch(
        [*LAUNCHERS["torchrun"], str(script), str(random_teacher / "transformer"), dtype, what]
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


FAILING = """
import os, sys
import train_distillation
from wan_distill.training.learner import Learner
update, calls = Learner.update, []

def fail(self, runtime, loss):
    calls.append(0)
    if runtime.sample_rank == 1 and len(calls) == 2:
        raise RuntimeError("the second card fell off the bus")
    return update(self, runtime, loss)

Learner.update = fail
sys.exit(train_distillation.main(sys.argv[1:]))
"""


def check_a_failing_rank(teacher: Path, folder: Path) -> float:
    """Seconds from the start of a run whose second rank fails until all have ended, its message
    shown.
    """
    script = folder / "failing.py"
    script.write_text(FAILING)
    started = time.monotonic()
    ended = launch(
        [
            *LAUNCHERS["torchrun"],
            str(script),
            "--teacher_path",
            str(teacher),
            "--method",
            "trajectory",
            *METHODS["trajectory"],
            *FLAGS,
            "--output_dir",
            str(folder / "out"),
        ]
    )
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
                worst = compare(teacher, Path(folder) / launcher / method, method, launcher)
                failed += worst != 0
                print(
                    f"{launcher:<11} {method:<12} largest relative difference after {UPDATES} "
                    f"updates: {worst:.1e}",
                    flush=True,
                )
        for method in METHODS:
            worst = compare(
                teacher, Path(folder) / "shard" / method, method, "torchrun", only_two=("--shard",)
            )
            failed += not worst < 1e-6
            print(
                f"--shard     {method:<12} largest relative difference after {UPDATES} updates: "
                f"{worst:.1e}",
                flush=True,
            )
        for method in METHODS:
            worst = compare(
                teacher,
                Path(folder) / "together" / method,
                method,
                "torchrun",
                ("--gradient_accumulation_steps", "2"),
                only_two=("--context_parallel",),
            )
            failed += not worst < ROUNDING
            print(
                f"--context_parallel {method:<12} largest relative difference after {UPDATES} "
                f"updates: {worst:.1e}",
                flush=True,
            )
        seconds = check_a_failing_rank(teacher, Path(folder))
        failed += not seconds < 60
        print(f"a failing rank ended both, with its message, {seconds:.0f} s after the start")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
