"""Weights saved from a wrapped, compiled, quantised or foreign model are named as such."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_distill.errors import UsageError
from wan_distill.planning.teacher_files import check_files
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.weight_names import explain_names

Weights = dict[str, Tensor]


def beginning(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


def renamed(old: str, new: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name.replace(old, new): t for name, t in weights.items()}


def more(ending: str) -> Callable[[Weights], Weights]:
    """A further tensor beside each matrix, and another name for that."""

    def add(weights: Weights) -> Weights:
        scales = {f"{name}{ending}": torch.ones(1) for name in weights}
        return beginning("model.diffusion_model.")(weights) | scales

    return add


@pytest.fixture
def complaint(random_teacher: Path, tmp_path: Path) -> Callable[..., str]:
    """What is said about a teacher after the weights of a part were changed."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")

    def make(part: str, change: Callable[[Weights], Weights]) -> str:
        (file,) = (folder / part).glob("*.safetensors")
        save_file(change(load_file(file)), file, {"format": "pt"})
        config = Config(teacher_path=str(folder))
        with pytest.raises(UsageError) as error:
            check_files(read_teacher(config), config)
        return str(error.value)

    return make


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        (beginning("_orig_mod."), "compiled model (_orig_mod.)", "take it off the names"),
        (renamed("blocks.0.", "blocks.0._orig_mod."), "compiled model", "take it off the names"),
        (beginning("module."), "begin with module. (of a wrapped", "take it off the names"),
        (beginning("model."), "begin with model. (of a wrapped", "take it off the names"),
        (beginning("model.diffusion_model."), "model.diffusion_model. (of a wrapped", "take it"),
        (renamed("blocks.0", "blocks.0._fsdp_wrapped_module"), "FSDP", "take it off the names"),
        (renamed("attn1.to_q", "self_attn.q"), "Wan's original names", "ends in -Diffusers"),
        (renamed("to_q.weight", "to_q.base_layer.weight"), "LoRA adapters", "fuse_lora"),
        (more(".scale_weight"), "scaled fp8 weights", "--base_precision fp8"),
        (more(".absmax"), "quantised already", "--base_precision"),
    ],
)
def test_a_transformer_under_other_names(change, says, remedy, complaint):
    said = complaint("transformer_2", change)
    assert "transformer_2 holds" in said and says in said and remedy in said
    assert "download" not in said and "\n" not in said


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_other_parts_under_other_names(part, complaint):
    said = complaint(part, beginning("module."))
    assert f"{part}" in said and "begin with module." in said and "download" not in said


def test_a_shape_that_does_not_fit_is_not_told_to_download(complaint):
    def widen(weights: Weights) -> Weights:
        return weights | {"proj_out.bias": torch.zeros(3)}

    said = complaint("transformer", widen)
    assert "proj_out.bias as [3]" in said and "of one checkpoint" in said


def test_names_that_are_right_or_show_nothing():
    assert explain_names(["a", "b"], ["a"]) is None
    assert explain_names(["b"], ["a"]) is None
