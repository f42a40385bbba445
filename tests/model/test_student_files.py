"""What is exported is what was trained, however it is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_distill.errors import ExportError, UsageError
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import (
    load_student,
    save_lora,
    save_student,
    to_original_names,
)
from wan_distill.model.verification import transformer_without_weights, verify_lora
from wan_distill.results.recorded import student_hashes
from wan_distill.settings.config import Config
from wan_distill.settings.description import TEACHER_PARTS, TEXT_PARTS, read_teacher
from wan_distill.settings.lora_names import is_in_block, read_name
from wan_distill.settings.students import read_metadata
from wan_distill.system.runtime import Runtime

RANK = 4


@dataclass
class Exported:
    """A LoRA file, the adapter it was written from, and the teacher beneath."""

    file: Path
    adapter: dict[str, Tensor]
    teacher: Teacher
    config: Config

    @property
    def transformer_config(self) -> dict[str, Any]:
        return self.teacher.info.transformer

    def expert(self) -> WanTransformer3DModel:
        return self.teacher.load_expert("high")


Export = Callable[..., Exported]


@pytest.fixture
def export(small_config: Callable[..., Config], tmp_path: Path) -> Export:
    """Writes the LoRA of a random adapter on the high expert. alpha / rank is no power of two."""

    def made(alpha: float = 3.0, **changes: Any) -> Exported:
        config = small_config(lora_alpha=alpha, rank=RANK, **changes)
        info = read_teacher(config)
        teacher = Teacher(info, config, Runtime(config))
        expert = teacher.load_expert("high")
        add_adapter(expert, "student", rank=RANK, alpha=alpha, layers=config.lora_layers, seed=0)
        adapter = random_adapter(expert)
        file = tmp_path / LORA_FILE["high"]
        save_lora(file, adapter, config, info, "high")
        return Exported(file, adapter, teacher, config)

    return made


def random_adapter(transformer: WanTransformer3DModel) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    parameters = adapter_parameters(transformer, "student")
    return {name: torch.randn(p.shape, generator=rng) for name, p in parameters.items()}


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a LoRA file; its metadata stays."""
    with safe_open(file, framework="pt") as lora:
        metadata = lora.metadata()
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata)


def first_stem(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(".alpha")).removesuffix(".alpha")


# ------------------------------------------------------------------------------------ verification


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_diffusers_and_comfyui_read_the_same_matrices(export: Export, precision: str) -> None:
    """Also of a bf16 teacher's student: that no weight is loaded is why nothing is rounded."""
    made = export(mixed_precision=precision)
    worst = verify_lora(made.transformer_config, made.file)
    # alpha / rank is no power of two: diffusers rounds where it multiplies it in.
    assert worst < (1e-6 if precision == "no" else 3e-3)


def test_no_expert_is_loaded_to_verify_a_lora(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export()
    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", None)
    verify_lora(made.transformer_config, made.file)


def test_a_transformer_without_weights_takes_no_memory() -> None:
    """One block of the A14B's shape, 1.6 GB in float32."""
    config = dict(
        _class_name="WanTransformer3DModel",
        patch_size=[1, 2, 2],
        num_attention_heads=40,
        attention_head_dim=128,
        ffn_dim=13824,
        num_layers=1,
    )
    transformer = transformer_without_weights(config)
    assert sum(p.numel() for p in transformer.parameters()) > 4e8
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage() for p in transformer.parameters()
    }
    assert sum(storage.nbytes() for storage in storages.values()) < 1e5
    assert {p.dtype for p in transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize("missing", ["lora_up", "lora_down", "both halves"])
def test_a_layer_without_its_matrices_is_refused(export: Export, missing: str) -> None:
    made = export()

    def remove(tensors: dict[str, Tensor]) -> None:
        stem = first_stem(tensors)
        for half in ("lora_up", "lora_down") if missing == "both halves" else (missing,):
            del tensors[f"{stem}.{half}.weight"]

    rewrite(made.file, remove)
    with pytest.raises(ExportError, match="do not use it"):
        verify_lora(made.transformer_config, made.file)


@pytest.mark.parametrize(
    "place", ["blocks.7.self_attn.q", "blocks.0.self_attn.unknown", "blocks.0.cross_attn.k_img"]
)
def test_a_layer_that_loads_nowhere_is_refused(export: Export, place: str) -> None:
    """All of its tensors are there, but this teacher has no such layer."""
    made = export()

    def move(tensors: dict[str, Tensor]) -> None:
        stem = first_stem(tensors)
        for name in [name for name in tensors if name.startswith(stem + ".")]:
            tensors[name.replace(stem, f"diffusion_model.{place}")] = tensors.pop(name)

    rewrite(made.file, move)
    with pytest.raises(ExportError, match="do not use it"):
        verify_lora(made.transformer_config, made.file)


def test_a_file_that_diffusers_scales_differently_is_refused(
    export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if diffusers took another alpha than the one in the file."""
    made = export()
    read = WanPipeline.lora_state_dict

    def scaled(*args: Any, **options: Any) -> dict[str, Tensor]:
        return {
            name: t * 1.01 if ".ffn.net.2.lora_B" in name else t
            for name, t in read(*args, **options).items()
        }

    monkeypatch.setattr(WanPipeline, "lora_state_dict", scaled)
    with pytest.raises(ExportError, match=r"ffn\.2 differs by 0\.01"):
        verify_lora(made.transformer_config, made.file)


def test_weights_that_are_not_numbers_are_refused(export: Export) -> None:
    made = export()
    rewrite(made.file, lambda lora: lora[f"{first_stem(lora)}.lora_up.weight"].fill_(torch.nan))
    with pytest.raises(ExportError, match="differs by nan"):
        verify_lora(made.transformer_config, made.file)


def test_a_bf16_file_is_half_as_large_and_gives_the_same_merged_weights(export: Export) -> None:
    """Merged into a bf16 base: what the file's rounding adds to the base's own does not show."""
    files = {}
    for dtype in ("float32", "bf16"):
        made = export(lora_dtype=dtype, mixed_precision="bf16")
        files[dtype] = load_file(made.file)
    small, exact = (files[dtype] for dtype in ("bf16", "float32"))
    stems = [name.removesuffix(".alpha") for name in exact if name.endswith(".alpha")]
    for stem in stems:
        matrices = [f"{stem}.lora_{half}.weight" for half in ("up", "down")]
        assert {small[name].dtype for name in matrices} == {torch.bfloat16}
        up, down = (exact[name] for name in matrices)
        rng = torch.Generator().manual_seed(0)
        base = torch.randn(up.shape[0], down.shape[1], generator=rng)
        change = up @ down * (0.1 / (up @ down).std())  # a tenth of the base: much for a student
        rounded = small[matrices[0]].float() @ small[matrices[1]].float()
        rounded *= 0.1 / (up @ down).std()
        truth = base + change
        errors = [
            ((base + part).bfloat16().float() - truth).norm() / truth.norm()
            for part in (change, rounded)
        ]
        assert errors[1] < 1.02 * errors[0] < 0.003
        assert float(small[f"{stem}.alpha"]) == 3.0
    sizes = {
        dtype: sum(t.numel() * t.element_size() for t in tensors.values())
        for dtype, tensors in files.items()
    }
    assert sizes["bf16"] < 0.51 * sizes["float32"]


# ----------------------------------------------------------------------------- writing and reading


def test_names_there_and_back(export: Export) -> None:
    made = export()
    lora = to_original_names(made.adapter, 3.0)
    assert "diffusion_model.blocks.0.cross_attn.o.lora_up.weight" in lora
    assert {float(t) for name, t in lora.items() if name.endswith(".alpha")} == {3.0}
    assert all(name.split(".")[1] == "blocks" for name in lora if name.endswith(".alpha"))
    assert "diffusion_model.time_projection.1.lora_up.weight" in lora
    again = {}
    for name, tensor in lora.items():
        read = read_name(name)
        if read.part != "alpha":
            half = "A" if read.part == "down" else "B"
            if half == "B" and not is_in_block(read.module):
                tensor = tensor / (3.0 / RANK)  # multiplied in, since diffusers reads no alpha here
            again[f"{read.module}.lora_{half}.student.weight"] = tensor
    assert again.keys() == made.adapter.keys()
    for name, tensor in made.adapter.items():
        torch.testing.assert_close(again[name], tensor)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loaded_student_is_the_trained_one_in_float32(export: Export, precision: str) -> None:
    """Also on a bf16 base, to whose dtype diffusers rounds adapters."""
    made = export(mixed_precision=precision, lora_dtype="float32")
    expert = made.expert()
    before = {name: p.clone() for name, p in expert.named_parameters()}
    state = torch.random.get_rng_state()
    load_student(expert, made.file)
    assert torch.equal(torch.random.get_rng_state(), state)
    parameters = adapter_parameters(expert, "student")
    assert {p.dtype for p in parameters.values()} == {torch.float32}
    assert parameters.keys() == made.adapter.keys()
    for name, module in expert.named_modules():
        if hasattr(module, "get_delta_weight"):
            a, b = (made.adapter[f"{name}.lora_{half}.student.weight"] for half in "AB")
            torch.testing.assert_close(
                module.get_delta_weight("student"), b @ a * (3.0 / RANK), rtol=1e-5, atol=1e-6
            )
    base = {name.replace("base_layer.", ""): p for name, p in expert.named_parameters()}
    assert all(torch.equal(base[name], p) for name, p in before.items())


def test_the_metadata_is_one_key_with_what_a_sampler_must_know(export: Export) -> None:
    made = export()
    with safe_open(made.file, framework="pt") as lora:
        assert list(lora.metadata()) == ["wan_distill"]
    schedule = read_metadata(made.file)
    config = made.config
    assert schedule == json.loads(json.dumps(schedule))
    assert schedule["expert"] == "high" and schedule["subfolder"] == "transformer"
    assert schedule["sigmas"] == list(config.sigmas()) and schedule["guidance_scale"] == 1.0
    assert schedule["flow_shift"] == config.flow_shift and schedule["boundary_ratio"] == 0.875
    assert (schedule["height"], schedule["width"]) == (config.height, config.width)
    info = made.teacher.info
    assert schedule["teacher_files"] == info.part_fingerprints()
    assert set(schedule["teacher_files"]) == set(TEACHER_PARTS + TEXT_PARTS)
    teacher = (schedule["teacher"], schedule["teacher_commit"], schedule["teacher_variant"])
    assert teacher == (info.source, None, None) and schedule["teacher_embedded"] is False


def test_a_file_of_another_tool_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="carries no schedule"):
        read_metadata(tmp_path / "other.safetensors")


def test_a_whole_student_gives_all_its_weights_back(export: Export, tmp_path: Path) -> None:
    made = export(method="trajectory", student_layers=1, save_merged=True)
    expert = made.expert()
    with torch.no_grad():
        for p in expert.parameters():
            p.add_(1.0)
    weights = {name: p.detach() for name, p in expert.named_parameters()}
    save_student(tmp_path, weights, made.config, made.teacher.info, "high")
    file = RunFolder(tmp_path).student("high")
    assert file.name == "high_noise_student.safetensors"
    again = made.expert()
    load_student(again, file)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())


def test_an_earlier_student_of_the_other_kind_is_set_aside(export: Export, tmp_path: Path) -> None:
    """A whole one would go before the LoRA that was trained after it."""
    made = export(method="trajectory")
    whole = export(method="trajectory", student_layers=1, save_merged=True)
    weights = {"proj_out.weight": torch.ones(2, 2)}
    folder, info = RunFolder(tmp_path), made.teacher.info
    for _ in range(2):
        save_student(tmp_path, weights, whole.config, info, "high")
        assert folder.student("high").name == "high_noise_student.safetensors"
        assert not folder.lora("high").exists()
        save_student(tmp_path, made.adapter, made.config, info, "high")
        assert folder.student("high") == folder.lora("high")
    names = {file.name for file in tmp_path.glob("set-aside-*")}
    kinds = (LORA_FILE["high"], "high_noise_student.safetensors")
    assert names == {f"set-aside-{count}-{kind}" for kind in kinds for count in (0, 1)}


def test_a_student_is_known_by_its_weights_wherever_its_teacher_lies(
    export: Export, tmp_path: Path
) -> None:
    made, folder = export(), RunFolder(tmp_path)
    info, known, time = made.teacher.info, student_hashes(folder), made.file.stat().st_mtime_ns
    save_lora(made.file, made.adapter, made.config, info, "high")
    assert made.file.stat().st_mtime_ns == time  # the same bytes are not written again
    moved = dataclasses.replace(info, source="/elsewhere/teacher")
    save_lora(made.file, made.adapter, made.config, moved, "high")
    assert read_metadata(made.file)["teacher"] == "/elsewhere/teacher"
    assert student_hashes(folder) == known != {}
    other = {name: 2 * tensor for name, tensor in made.adapter.items()}
    save_lora(made.file, other, made.config, info, "high")
    assert student_hashes(folder) != known
    made.file.write_bytes(made.file.read_bytes()[:-1])  # damaged: nobody has measured it
    assert student_hashes(folder) == {}
