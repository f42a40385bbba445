"""Whole runs with the options that save memory, and in bf16, as on a real teacher."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import train_distillation
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config

PROMPTS = str(EMBEDDED_TEACHER / "prompts.txt")


def metrics(config: Config) -> list[dict[str, Any]]:
    file = Path(config.output_dir) / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_run_with_everything_that_saves_memory_trains_and_resumes(
    small_config: Callable[..., Config],
) -> None:
    """In bf16: the exported LoRA is float32 and passes its verification all the same."""
    config = small_config(
        base_precision="int8",
        offload=True,
        use_8bit_adam=True,
        mixed_precision="bf16",
        evaluate=False,
        method="dmd",
        critic_warmup_steps=1,
        critic_updates=1,
        rank=64,
        diversity_weight=0.0,
        prompts=PROMPTS,
        expert="high",
        max_train_steps=2,
    )
    assert train_distillation.run(config) == 0
    before = metrics(config)
    assert train_distillation.run(dataclasses.replace(config, max_train_steps=3)) == 0
    after = metrics(config)
    assert after[-1]["student_gradient_norm"] > 0 and after[-1]["step"] > before[-1]["step"]
    lora = load_file(Path(config.output_dir) / "high_noise_lora.safetensors")
    matrices = {name: tensor for name, tensor in lora.items() if ".lora_" in name}
    assert {tensor.dtype for tensor in matrices.values()} == {torch.bfloat16}


def test_a_run_with_a_quantised_base_trains_and_exports(
    small_config: Callable[..., Config],
) -> None:
    config = small_config(
        base_precision="nf4",
        save_merged=True,
        evaluate=False,
        method="trajectory",
        expert="high",
        prompts=PROMPTS,
    )
    assert train_distillation.run(config) == 0
    assert metrics(config)[-1]["student_gradient_norm"] > 0
    assert (Path(config.output_dir) / "student" / "transformer_2").is_dir()
