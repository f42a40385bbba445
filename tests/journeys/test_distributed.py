"""Two processes do exactly what one does with twice the accumulation, and one that fails ends them
all.
"""

from __future__ import annotations

import shutil

import pytest
from conftest import REPOSITORY, tiny_flags
from processes import LAUNCHERS, METHODS, ROUNDING, SETTINGS, compare, launch

import train_distillation
from wan_distill.layout import RunFolder

CHECKED = dict(expert="high", monitor_steps=5, monitor_samples=4, validation_steps=5)


def test_two_processes_equal_one_with_accumulation(random_teacher, tmp_path):
    """To the bit: halves and doubles are exact. The two take over what one has begun."""
    changes = dict(
        expert="high",
        diversity_weight=0.0,  # the order in which several parts are summed differs
        score_draws=1,
        sample_batch_size=1,  # on some CPUs a sample's last bits depend on the size of its batch
    )
    worst = compare(random_teacher, tmp_path, "dmd-samples", "torchrun", alone_first=2, **changes)
    assert worst == 0


def test_two_processes_that_share_one_base_equal_one_that_has_it_whole(random_teacher, tmp_path):
    """With an odd number of samples: one process has one more to solve than the other."""
    changes = CHECKED | dict(num_trajectories=9, sample_batch_size=1, learning_rate=1e-4)
    worst = compare(random_teacher, tmp_path, "trajectory", only_two=dict(shard=True), **changes)
    assert worst < 1e-5  # on some CPUs the last bits depend on where in memory a matrix lies


def test_an_expert_that_is_carried_over_is_there_for_all_processes(random_teacher, tmp_path):
    """A process that looks too soon lets the low expert learn from its teacher's hand-overs."""
    settings = dict(max_train_steps=1, num_trajectories=8, sample_batch_size=2)
    first = tiny_flags(random_teacher, tmp_path / "first", method="trajectory", **settings)
    assert train_distillation.main(first) == 0
    given = [tmp_path / f"given_{expert}.safetensors" for expert in ("high", "low")]
    for expert, file in zip(("high", "low"), given, strict=True):
        shutil.copy(RunFolder(tmp_path / "first").lora(expert), file)
    settings |= dict(method="dmd", expert="low", init_student_from=",".join(map(str, given)))
    flags = tiny_flags(random_teacher, out := tmp_path / "out", **settings)
    ended = launch("forks", REPOSITORY / "train_distillation.py", flags)
    assert ended.returncode == 0, ended.stderr[-2000:]
    (made,) = (out / "handovers").iterdir()
    assert len(list(made.glob("0*.safetensors"))) == 8


SHARED = """
import sys
from pathlib import Path
import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from safetensors.torch import load_file
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.sharding import load_sharded
from wan_distill.system.runtime import process_state

process_state()
torch.accelerator.device_count = lambda: 1


def result(dtype, share):
    folder = Path(sys.argv[1])
    if share == "base":
        first = torch.distributed.get_rank() == 0  # the other one opens nothing
        weights = load_file(folder / "diffusion_pytorch_model.safetensors") if first else None
        base = load_sharded(folder, weights, dtype, torch.device("cpu"))
    else:
        base = WanTransformer3DModel.from_pretrained(folder, dtype=dtype).requires_grad_(False)
    if share == "clip":
        base.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    local = [getattr(p, "_local_tensor", p) for p in base.parameters()]
    size = sum(p.numel() * p.element_size() for p in local)
    add_adapter(base, "student", rank=4, alpha=4.0, layers=("to_q", "ffn.net.2"), seed=1)
    parameters = adapter_parameters(base, "student").values()
    for p in parameters:
        p.data.add_(0.05)
    base.enable_gradient_checkpointing()
    rng = torch.Generator().manual_seed(1)
    x, prompt = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 8, 16, generator=rng)
    sigma = torch.full((2,), 0.9, dtype=torch.float64)
    denoiser = Denoiser({"high": base}, None)
    low = dtype == torch.bfloat16
    with denoiser.training("student"), torch.autocast("cpu", torch.bfloat16, enabled=low):
        velocity = denoiser.velocity(x, sigma, Condition(prompt), role="student")
        velocity.square().mean().backward()
    return size, [velocity.detach(), *(p.grad for p in parameters)]


for dtype in (torch.float32, torch.bfloat16):
    (whole, ours), (part, theirs) = result(dtype, None), result(dtype, "base")
    assert 0.45 < part / whole < 0.6, part / whole
    for a, b in zip(ours, theirs, strict=True):
        assert a.abs().max() > 0 and torch.equal(a, b), dtype
(_, ours), (_, theirs) = result(torch.float32, None), result(torch.float32, "clip")
for gradient in theirs[1:]:
    torch.distributed.all_reduce(gradient)
for a, b in zip(ours, theirs, strict=True):
    assert float((a - b).norm() / a.norm()) < 1e-6
print("compared")
"""


def test_a_shared_base_or_clip_gives_the_same_gradients(random_teacher, tmp_path):
    """With gradient checkpointing, and with Wan's float32 tables inside bf16 blocks; half a base is
    half a base, and one process alone reads the file.
    """
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    ended = launch("forks", script, [str(random_teacher / "transformer")])
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("compared") == 2


# -------------------------------------------------------------------------- all of it: -m journey


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_under_every_launcher(random_teacher, tmp_path, method, launcher):
    """Losses of several parts are summed in another order; consistency's has one."""
    worst = compare(random_teacher, tmp_path, method, launcher)
    assert worst <= (0 if method == "consistency" else ROUNDING)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_a_shared_base(random_teacher, tmp_path, method):
    worst = compare(random_teacher, tmp_path, method, only_two=dict(shard=True))
    assert worst < ROUNDING  # on some CPUs the last bits depend on where in memory a matrix lies


TOGETHER = dict(context_parallel=True, gradient_accumulation_steps=2)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_each_clip_together(random_teacher, tmp_path, method):
    assert compare(random_teacher, tmp_path, method, only_two=TOGETHER) < ROUNDING


@pytest.mark.long
def test_clips_that_are_worked_on_together_are_checked_and_shown(random_teacher, tmp_path):
    worst = compare(random_teacher, tmp_path, "trajectory", only_two=TOGETHER, **CHECKED)
    assert worst < ROUNDING


FAILING = """
import sys
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


@pytest.mark.long
def test_a_process_that_fails_ends_all_and_says_why(random_teacher, tmp_path):
    """`launch` waits for all of them, and not for ever."""
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    settings = SETTINGS | METHODS["trajectory"]
    ended = launch("torchrun", script, tiny_flags(random_teacher, tmp_path / "out", **settings))
    assert ended.returncode != 0
    assert "rank 1 of 2 failed: RuntimeError: the second card fell off the bus" in ended.stderr
