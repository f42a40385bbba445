"""The teacher's parts as they are loaded."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partialmethod
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers import transformer_wan
from regression import adapter_gradient, inputs
from torch import Tensor
from torch.nn import functional

from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import GRAPHS_PER_BLOCK, Teacher
from wan_distill.model.quantise import StoredLinear
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.teacher_changes import TeacherChanges
from wan_distill.system.runtime import Runtime

MakeConfig = Callable[..., Config]


def teacher_of(config: Config) -> Teacher:
    return Teacher(read_teacher(config), config, Runtime(config))


# --------------------------------------------------------------------------------- the transformers


@pytest.mark.parametrize("expert", ["high", "low"])
def test_an_expert_is_the_file_of_its_name_frozen(
    small_config: MakeConfig, random_teacher: Path, expert: str
) -> None:
    transformer = teacher_of(small_config()).load_expert(expert)
    folder = {"high": "transformer", "low": "transformer_2"}[expert]
    expected = WanTransformer3DModel.from_pretrained(random_teacher, subfolder=folder)
    parameters = dict(transformer.named_parameters())
    assert all(torch.equal(parameters[name], p) for name, p in expected.named_parameters())
    assert not any(p.requires_grad for p in parameters.values()) and not transformer.training


def test_an_exact_expert_is_neither_quantised_nor_offloaded(small_config: MakeConfig) -> None:
    teacher = teacher_of(small_config(base_precision="nf4", offload=True))
    coarse, exact = teacher.load_expert("high"), teacher.load_expert("high", exact=True)
    assert any(isinstance(module, StoredLinear) for module in coarse.modules())
    assert not any(isinstance(module, StoredLinear) for module in exact.modules())


def float32_norm(self: torch.nn.RMSNorm, x: Tensor) -> Tensor:
    """As CUDA's autocast computes it."""
    weight = None if self.weight is None else self.weight.float()
    return functional.rms_norm(x.float(), tuple(self.normalized_shape), weight, self.eps)


@pytest.mark.parametrize("settings", [dict(), dict(base_precision="int8")])
def test_queries_keys_and_values_have_one_dtype_under_cudas_autocast(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    """CUDA's autocast returns float32 from norms; attention between processes refuses a mixture."""
    teacher = teacher_of(small_config(mixed_precision="bf16", **settings))
    dtypes: list[set[torch.dtype]] = []
    attend = transformer_wan.dispatch_attention_fn

    def record(query: Tensor, key: Tensor, value: Tensor, **options: object) -> Tensor:
        dtypes.append({query.dtype, key.dtype, value.dtype})
        return attend(query, key, value, **options)

    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", record)
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", float32_norm)
    adapter_gradient(teacher.load_expert("high"), checkpointing=True, dtype=torch.bfloat16)
    assert len(dtypes) >= 4 and all(seen == {torch.bfloat16} for seen in dtypes)


def test_norms_of_a_float32_base_are_left_alone(small_config: MakeConfig) -> None:
    transformer = teacher_of(small_config()).load_expert("high")
    assert not any(module._forward_hooks for module in transformer.modules())


# ---------------------------------------------------------------------------------------- compiling


@pytest.mark.parametrize("part", ["expert", "vae"])
def test_a_compiled_expert_that_is_dropped_is_freed_before_the_next_part_is_loaded(
    small_config: MakeConfig, part: str
) -> None:
    """Its blocks refer to themselves. Python collects such cycles seldom, and never since the card
    is full.
    """
    teacher = teacher_of(small_config(compile=True))
    gc.disable()
    try:
        weights = weakref.ref(teacher.load_expert("high").blocks[0])
        assert weights() is not None
        _ = teacher.load_expert("low") if part == "expert" else teacher.load_vae()
        assert weights() is None
    finally:
        gc.enable()


def test_compiling_keeps_a_graph_for_each_role(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[int] = []

    def compile_blocks(self: WanTransformer3DModel) -> None:
        limits.append(torch._dynamo.config.recompile_limit)

    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", compile_blocks)
    with torch._dynamo.config.patch(recompile_limit=8):
        teacher_of(small_config()).load_expert("high")
        assert limits == [] and torch._dynamo.config.recompile_limit == 8
        teacher_of(small_config(compile=True)).load_expert("high")
    assert limits == [GRAPHS_PER_BLOCK] and GRAPHS_PER_BLOCK >= 16


@pytest.mark.parametrize(
    ("precision", "backend"),
    [
        pytest.param("int8", "aot_eager", marks=pytest.mark.journey),  # compiling takes seconds
        pytest.param("bf16", "inductor", marks=pytest.mark.long),
    ],
)
def test_compiled_blocks_give_the_same_gradient_and_leave_the_teacher_alone(
    small_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, precision: str, backend: str
) -> None:
    """aot_eager traces as much as the default backend, and saves the time for its C++."""
    compiling = partialmethod(WanTransformer3DModel.compile_repeated_blocks, backend=backend)
    monkeypatch.setattr(WanTransformer3DModel, "compile_repeated_blocks", compiling)
    settings = small_config(base_precision=precision)
    reference = teacher_of(settings).load_expert("high")
    with torch._dynamo.config.patch(recompile_limit=8):
        model = teacher_of(small_config(base_precision=precision, compile=True)).load_expert("high")
        compiled = adapter_gradient(model, checkpointing=True)
        # Fused sums round anew.
        torch.testing.assert_close(compiled, adapter_gradient(reference), rtol=1e-4, atol=1e-6)
        denoiser, plain = (Denoiser({"high": m}, None) for m in (model, reference))
        x, sigma, condition = inputs(torch.Generator().manual_seed(6))
        with torch.no_grad():
            student, teacher = (
                denoiser.velocity(x, sigma, condition, role=role) for role in ("student", "teacher")
            )
            expected = plain.velocity(x, sigma, condition, role="teacher")
    torch.testing.assert_close(teacher, expected, rtol=1e-4, atol=1e-5)
    assert (student - expected).abs().max() > 0.01


# ------------------------------------------------------------------------------------------- memory


def private() -> int:
    """Memory of this process alone, in bytes: files that are mapped do not count."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure_loading(teacher: Teacher, measured: Connection) -> None:
    """In a process of its own: sends how many bytes stay once an expert is loaded, and how many
    more there were at most meanwhile.
    """
    # Left alone, glibc keeps what is freed, and how much is chance; from this size on it gives it
    # back.
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 65536)
    samples: list[int] = []
    loaded = threading.Event()
    before = private()

    def watch() -> None:
        while not loaded.wait(0.0005):
            samples.append(private())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = teacher.load_expert("high")
    finally:  # the process would not end before its threads
        loaded.set()
        thread.join()
    measured.send((private() - before, max(samples) - private()))
    del model


@pytest.mark.journey  # as long as a whole run
@pytest.mark.skipif(
    sys.platform != "linux",
    reason="reads the memory of a process from /proc, which Linux alone has",
)
def test_loading_takes_at_most_one_shard_beyond_what_stays(tmp_path: Path) -> None:
    """Shards stream straight to their dtype and place: 150 MB of float32 files, as bf16, quantised,
    offloaded.
    """
    model = WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=128,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        freq_dim=64,
        ffn_dim=2048,
        num_layers=3,
    )
    model.save_pretrained(tmp_path / "transformer", max_shard_size="25MB")
    del model
    shards = [file.stat().st_size for file in tmp_path.glob("transformer/*.safetensors")]
    assert len(shards) >= 6
    runtime = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.bfloat16, sharded=False, context_parallel=False
    )
    info = SimpleNamespace(
        source=str(tmp_path), folder=tmp_path, is_local=True, changes=TeacherChanges()
    )
    forking = multiprocessing.get_context("fork")  # so that torch is imported already
    for precision, offload, share in (
        ("bf16", False, 0.5),
        ("fp8", False, 0.3),
        ("bf16", True, 0.5),
    ):
        config = Config(
            teacher_path=str(tmp_path),
            base_precision=precision,
            mixed_precision="bf16",
            offload=offload,
        )
        receiver, sender = forking.Pipe(duplex=False)
        teacher = Teacher(info, config, runtime)  # type: ignore[arg-type]
        process = forking.Process(target=measure_loading, args=(teacher, sender))
        process.start()
        process.join()
        assert process.exitcode == 0
        stays, beyond = receiver.recv()
        assert beyond < max(shards), (precision, offload, beyond)
        assert stays < 1.1 * share * sum(shards), (precision, offload, stays)
