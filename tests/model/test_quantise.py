"""Options that save memory or time must leave the gradient alone: each is compared with the plain
path.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, random_transformer
from diffusers import WanTransformer3DModel

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.quantise import StoredLinear, dequantise, load_stored, quantise
from wan_distill.planning import needs
from wan_distill.planning.preflight import check_optional
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.system.runtime import Runtime
from wan_distill.system.weight_files import weight_files
from wan_distill.training.learner import Learner

# Cosine of the adapter's gradient with the plain one's: what a rounding of the base of this size
# leaves.
AGREEMENT = {"int8": 0.999, "fp8": 0.99, "nf4": 0.95}


def gradient(model, checkpointing: bool = False, dtype=torch.float32) -> torch.Tensor:
    """The adapter's gradient of a velocity regression, flat; the adapter has an effect."""
    add_adapter(model, "student", rank=4, alpha=4, layers=("to_q", "to_v", "ffn.net.2"), seed=3)
    parameters = adapter_parameters(model, "student")
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    if checkpointing:
        model.enable_gradient_checkpointing()
    denoiser = Denoiser({"high": model}, None)
    x, prompt = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 6, 16, generator=rng)
    with denoiser.training("student"), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        velocity = denoiser.velocity(
            x, torch.tensor([0.9, 0.3], dtype=torch.float64), prompt, role="student"
        )
        (velocity - x).square().mean().backward()
    assert all(p.dtype == torch.float32 for p in parameters.values())
    return torch.cat([p.grad.flatten() for p in parameters.values()])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expert")
    random_transformer(7, layers=2).save_pretrained(folder)
    return folder


def loaded(folder, kind: str, dtype=torch.float32, offload: bool = False):
    return load_stored(folder, weight_files(folder), kind, dtype, torch.device("cpu"), offload)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", list(AGREEMENT))
def test_gradients_through_a_quantised_base_agree_with_the_plain_ones(kind, checkpointing, stored):
    plain = gradient(random_transformer(7, layers=2).requires_grad_(False))
    coarse = gradient(loaded(stored, kind), checkpointing)
    assert torch.cosine_similarity(plain, coarse, dim=0) > AGREEMENT[kind]


@pytest.mark.parametrize("kind", list(AGREEMENT))
def test_a_quantised_layer_is_exactly_the_layer_with_its_rounded_weights(kind, stored):
    """Arithmetic and backward are exact: all error is the rounding's."""
    model = random_transformer(7, layers=2).requires_grad_(False)
    for module in model.blocks.modules():
        if type(module) is torch.nn.Linear:
            codes, scale = quantise(module.weight, kind)
            module.weight.copy_(
                dequantise(codes, scale, kind, tuple(module.weight.shape), module.weight)
            )
    torch.testing.assert_close(
        gradient(loaded(stored, kind)), gradient(model), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_offloaded_base_gives_the_very_same_gradient(checkpointing, stored):
    plain = gradient(random_transformer(7, layers=2).requires_grad_(False))
    assert torch.equal(gradient(loaded(stored, "bf16", offload=True), checkpointing), plain)


@pytest.mark.parametrize("kind", ["bf16", *AGREEMENT])
def test_an_offloaded_matrix_works_on_another_device_and_stays_where_it_is(kind):
    """The meta device stands in for the card: operations there refuse tensors of the host."""
    layer = StoredLinear(8, 6, True, kind, torch.float32, offload=True)
    layer.fill(torch.randn(6, 8))
    layer.requires_grad_(False)
    x = torch.empty(2, 8, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.is_meta and x.grad.shape == x.shape
    assert layer.codes.device.type == "cpu"


@pytest.mark.parametrize(("kind", "checkpointing"), [("plain", True), ("int8", True)])
def test_compiled_blocks_give_the_same_gradient_and_leave_the_teacher_alone(
    kind, checkpointing, stored
):
    def made():
        return (
            random_transformer(7, layers=2).requires_grad_(False)
            if kind == "plain"
            else loaded(stored, kind)
        )

    model, reference = made(), made()
    model.compile_repeated_blocks()
    # Fused sums round anew.
    torch.testing.assert_close(
        gradient(model, checkpointing), gradient(reference), rtol=1e-4, atol=1e-6
    )
    rng = torch.Generator().manual_seed(6)
    x, prompt = torch.randn(2, 16, 2, 4, 4, generator=rng), torch.randn(2, 6, 16, generator=rng)
    sigma = torch.tensor([0.9, 0.3], dtype=torch.float64)
    with torch.no_grad():
        seen = {
            role: Denoiser({"high": model}, None).velocity(x, sigma, prompt, role=role)
            for role in ("teacher", "student")
        }
        plain = Denoiser({"high": made()}, None).velocity(x, sigma, prompt, role="teacher")
    torch.testing.assert_close(seen["teacher"], plain, rtol=1e-4, atol=1e-5)
    assert (seen["student"] - plain).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.01), ("fp8", 0.04), ("nf4", 0.12)])
def test_rounding_error_and_size_are_as_documented(kind, error):
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(0))
    codes, scale = quantise(weight, kind)
    again = dequantise(codes, scale, kind, (96, 160), weight)
    assert (again - weight).norm() / weight.norm() < error
    size = codes.numel() + 4 * scale.numel()
    assert size == pytest.approx(weight.numel() * needs.BASE_BYTES[kind], rel=0.05)


def test_bf16_adapters_stay_float32_and_agree(stored):
    from diffusers import WanTransformer3DModel

    half = WanTransformer3DModel.from_pretrained(stored, dtype=torch.bfloat16).requires_grad_(
        False
    )
    plain = gradient(random_transformer(7, layers=2).requires_grad_(False))
    assert torch.cosine_similarity(plain, gradient(half, dtype=torch.bfloat16), dim=0) > 0.99
    assert (
        torch.cosine_similarity(
            plain, gradient(loaded(stored, "int8", torch.bfloat16), dtype=torch.bfloat16), dim=0
        )
        > 0.98
    )


def test_8_bit_moments_train_alike_and_are_resumed_exactly(small_config):
    """bitsandbytes keeps tensors of fewer than 4096 values in 32 bits: these have more."""
    config = small_config(
        use_8bit_adam=True,
        learning_rate=1e-2,
        method="trajectory",
        lr_scheduler="constant",
        lr_warmup_steps=0,
    )
    assert check_optional(config) is None

    def learner(**changes) -> Learner:
        weight = torch.nn.Parameter(torch.zeros(64, 128))
        return Learner(
            "student", {"block.weight": weight}, dataclasses.replace(config, **changes), 10
        )

    def train(learner: Learner, first: int, last: int) -> torch.Tensor:
        (weight,) = learner.parameters.values()
        for step in range(first, last):
            rng = torch.Generator().manual_seed(step)
            weight.grad = 1 + torch.randn(weight.shape, generator=rng)
            learner.update(Runtime(config), torch.zeros(()))
        return weight.detach()

    coarse, exact = train(kept := learner(), 0, 6), train(learner(use_8bit_adam=False), 0, 6)
    assert torch.cosine_similarity(coarse.flatten(), exact.flatten(), dim=0) > 0.99
    assert not torch.equal(coarse, exact) and kept.update_norm() is None
    again = learner()
    again.restore({name: value.clone() for name, value in kept.tensors().items()}, kept.done)
    assert torch.equal(train(again, 6, 10), train(kept, 6, 10))
    with pytest.raises(KeyError, match="8bit"):
        learner(use_8bit_adam=False).restore(kept.tensors(), kept.done)


def test_options_whose_packages_are_missing_are_refused_in_one_line(small_config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        check_optional(small_config(use_8bit_adam=True))
    monkeypatch.setattr(torch, "compile", lambda given: given.no_compiler_here)
    with pytest.raises(UsageError, match="torch cannot compile here"):
        check_optional(small_config(compile=True))


def test_a_run_with_everything_that_saves_memory_trains_and_resumes(small_config):
    config = small_config(
        base_precision="int8",
        offload=True,
        use_8bit_adam=True,
        compile=True,
        evaluate=False,
        method="dmd",
        critic_warmup_steps=1,
        critic_updates=1,
        rank=64,
        diversity_weight=0.0,
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"),
        expert="high",
        max_train_steps=2,
    )
    assert train_distillation.run(config) == 0
    assert train_distillation.run(dataclasses.replace(config, max_train_steps=3)) == 0
    lines = [
        json.loads(line)
        for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["student_gradient_norm"] > 0 and lines[-1]["step"] > lines[0]["step"]


def test_a_run_with_a_quantised_base_trains_and_exports(small_config):
    config = small_config(
        base_precision="nf4",
        save_merged=True,
        evaluate=False,
        method="trajectory",
        expert="high",
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"),
    )
    assert train_distillation.run(config) == 0
    lines = [
        json.loads(line)
        for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines[-1]["student_gradient_norm"] > 0
    assert (Path(config.output_dir) / "student" / "transformer_2").is_dir()


LOADING = """
import json, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import torch
from diffusers import ContextParallelConfig, WanTransformer3DModel
from wan_distill.settings.config import Config
from wan_distill.model.loading import Teacher

def private():  # memory of this process alone, in bytes: files that are mapped do not count
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])

def watch():
    while watching:
        seen.append(private())
        time.sleep(0.0005)

folder, kind, offload = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
config = Config(teacher_path=str(folder), base_precision=kind, mixed_precision="bf16", offload=offload)
runtime = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16, sharded=False, together=False)
teacher = Teacher(SimpleNamespace(source=str(folder), folder=folder), config, runtime)
watching, seen, before = True, [], private()
thread = threading.Thread(target=watch)
thread.start()
model = teacher.load_expert("high")
watching = False
thread.join()
print(json.dumps(dict(held=private() - before, beyond=max(seen) - private())))
"""


@pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads the memory of a process from /proc, which Linux alone has",
)
def test_loading_holds_at_most_one_shard_beyond_what_stays(tmp_path):
    """Shards stream straight to their dtype and place: 300 MB of float32 files, as bf16, quantised,
    offloaded.
    """
    model = WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=4096,
        num_layers=4,
    )
    model.save_pretrained(tmp_path / "transformer", max_shard_size="50MB")
    shards = [file.stat().st_size for file in tmp_path.glob("transformer/*.safetensors")]
    assert len(shards) >= 6
    (tmp_path / "load.py").write_text(LOADING, encoding="utf-8")
    # Left alone, glibc keeps what is freed, and how much is chance; from this size on it gives it
    # back.
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MALLOC_MMAP_THRESHOLD_": "65536"}
    for kind, offload, share in (("bf16", False, 0.5), ("fp8", False, 0.3), ("bf16", True, 0.5)):
        command = [sys.executable, str(tmp_path / "load.py"), str(tmp_path), kind, str(offload)]
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        found = json.loads(ended.stdout.splitlines()[-1])
        assert found["beyond"] < max(shards) and found["held"] < 1.1 * share * sum(shards), (
            kind,
            offload,
            found,
        )
