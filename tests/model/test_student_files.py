"""What is exported is what was trained, however it is loaded."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from wan_distill.errors import ExportError
from wan_distill.layout import LORA_FILE
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import save_lora, verify_lora
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime


@pytest.fixture
def exported(small_config, tmp_path):
    """(a fresh high expert, its LoRA file)."""
    config = small_config()
    info = read_teacher(config)
    teacher = Teacher(info, config, Runtime(config))
    transformer = teacher.load_expert("high")
    add_adapter(transformer, "student", rank=4, alpha=8.0, layers=config.lora_layers, seed=0)
    random = {
        n: torch.randn(p.shape) for n, p in adapter_parameters(transformer, "student").items()
    }
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, random, config, info, "high")
    return teacher.load_expert("high"), file


def test_diffusers_and_comfyui_read_the_same_matrices(exported):
    transformer, file = exported
    before = {n: p.clone() for n, p in transformer.named_parameters()}
    assert verify_lora(transformer, file) < 1e-5
    assert {n: p.shape for n, p in transformer.named_parameters()} == {
        n: p.shape for n, p in before.items()
    }
    assert all(torch.equal(p, before[n]) for n, p in transformer.named_parameters())


def test_a_layer_that_loads_nowhere_is_noticed(exported):
    transformer, file = exported
    with safe_open(file, framework="pt") as lora:
        metadata = lora.metadata()
    tensors = load_file(file)
    stem = next(n for n in tensors if n.endswith(".alpha")).removesuffix(".alpha")
    for half in ("lora_up", "lora_down"):
        tensors.pop(f"{stem}.{half}.weight")
    save_file(tensors, file, metadata)
    with pytest.raises((ExportError, KeyError, ValueError)):
        verify_lora(transformer, file)
