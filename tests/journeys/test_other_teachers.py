"""Wan models besides the two-expert one go through the whole chain: single experts, per-token
timesteps, one frame.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_flags
from diffusers import WanPipeline, WanTransformer3DModel
from random_teachers import write_pipeline
from torch import Tensor

import sample
import train_distillation
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.maths import flow
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import load_student
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.resolve import resolve

SHAPES = {
    "wan2.1-t2v": dict(two_experts=False),
    "wan2.2-ti2v-5b": dict(two_experts=False, expand_timesteps=True, channels=48),
    "wan2.2-t2v-a14b": {},
}
CASES = [
    ("wan2.1-t2v", "trajectory", 5),
    ("wan2.1-t2v", "dmd", 5),
    ("wan2.2-ti2v-5b", "trajectory", 5),
    ("wan2.2-ti2v-5b", "dmd", 1),
    ("wan2.2-t2v-a14b", "dmd", 1),
    ("wan2.1-t2v", "consistency", 1),
]
STRONG = dict(learning_rate=1e-2, lora_alpha=4.0, lr_scheduler="constant", ema_decay=0.0)
PROMPT = "a small red circle moving left"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {name: write_pipeline(root / name, **shape) for name, shape in SHAPES.items()}


def distil(teacher: Path, out: Path, **changes: Any) -> tuple[Config, TeacherInfo]:
    """Runs the job; gives its resolved settings and its teacher."""
    flags = tiny_flags(teacher, out, **(dict(eval_samples=4) | STRONG | changes))
    assert train_distillation.main(flags) == 0
    config = parse_args(flags)
    info = read_teacher(config)
    return resolve(config, info), info


def last_frechet(folder: Path) -> float:
    """The student's distance in the evaluation that `folder` holds."""
    table = json.loads(RunFolder(folder).evaluation.read_text(encoding="utf-8"))
    return table["rows"][-1]["frechet"]


@pytest.mark.parametrize(("name", "method", "frames"), CASES)
def test_the_whole_chain_runs_and_the_stock_pipeline_samples_alike(
    name, method, frames, teachers, tmp_path
):
    config, info = distil(
        teachers[name], tmp_path, method=method, num_frames=frames, evaluate=True, save_merged=True
    )
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert {json.loads(line)["expert"] for line in text.splitlines()} == set(info.experts)
    compare_with_stock(config, info, tmp_path)


def compare_with_stock(config: Config, info: TeacherInfo, folder: Path) -> WanPipeline:
    """The merged pipeline in `folder` samples what our sampler does, and not what the bare teacher
    would.
    """
    pipe = WanPipeline.from_pretrained(folder / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = keyed_noise(info.latent_shape(config), "other", 0)[None]
    stock = pipe(
        PROMPT,
        height=32,
        width=32,
        num_frames=config.num_frames,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise.clone(),
        max_sequence_length=config.max_sequence_length,
        output_type="latent",
    ).frames
    prompt = pipe.encode_prompt(
        PROMPT, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length
    )[0]
    ours = our_latents(config, info, folder, noise, prompt)
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)
    plain = our_latents(config, info, None, noise, prompt)
    assert not torch.allclose(plain, stock, rtol=1e-3, atol=1e-4), "the adapters have no effect"
    return pipe


@torch.no_grad()
def our_latents(
    config: Config, info: TeacherInfo, folder: Path | None, noise: Tensor, prompt: Tensor
) -> Tensor:
    """Our sampler's latents, of the student in `folder` or of the bare teacher."""
    experts: dict[Expert, WanTransformer3DModel] = {}
    for expert in info.experts:
        experts[expert] = WanTransformer3DModel.from_pretrained(
            info.folder, subfolder=SUBFOLDER[expert]
        ).eval()
        if folder:
            load_student(experts[expert], RunFolder(folder).student(expert))
    denoiser = Denoiser(experts, config.boundary_ratio, info.expand_timesteps)
    role = "student" if folder else "teacher"
    return flow.sample(
        lambda x, sigma: denoiser.velocity(x, sigma, Condition(prompt), role=role),
        noise,
        config.sigmas(),
    )


def test_an_expert_that_a_warm_start_leaves_alone_is_carried_over_and_measured(
    random_teacher, tmp_path
):
    first, second = tmp_path / "first", tmp_path / "second"
    distil(random_teacher, first, method="trajectory", evaluate=False)
    settings = dict(method="dmd", expert="low", init_student_from=first, evaluate=True)
    config, info = distil(random_teacher, second, save_merged=True, **settings)
    high, low = LORA_FILE["high"], LORA_FILE["low"]
    assert (first / high).read_bytes() == (second / high).read_bytes()
    assert (first / low).read_bytes() != (second / low).read_bytes()
    compare_with_stock(config, info, second)
    with_high = last_frechet(second)
    (second / high).unlink()
    assert train_distillation.run(dataclasses.replace(config, evaluate_only=True)) == 0
    assert last_frechet(second) != with_high


def test_a_shallower_student_is_trained_whole_and_exported_as_a_pipeline(tmp_path, monkeypatch):
    teacher, folder = write_pipeline(tmp_path / "teacher", layers=3), tmp_path / "out"
    settings = dict(method="trajectory", student_layers=2, evaluate=True, save_merged=True)
    config, info = distil(teacher, folder, gradient_checkpointing=True, **settings)
    pipe = compare_with_stock(config, info, folder)
    assert len(pipe.transformer.blocks) == len(pipe.transformer_2.blocks) == 2
    before = WanTransformer3DModel.from_pretrained(teacher, subfolder="transformer")
    # It begins as the teacher's first and last block, and all of it moves.
    for number, original in {0: before.blocks[0], 1: before.blocks[2]}.items():
        block = pipe.transformer.blocks[number]
        for (name, now), then in zip(block.named_parameters(), original.parameters(), strict=True):
            assert 0 < (now - then).abs().max() < 0.1, f"block {number} {name}"
    text = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    monkeypatch.chdir(folder)
    exec(code, {})
    assert (folder / "video.mp4").stat().st_size > 0
    flags = [f"--student={folder}", "--prompt=a square", "--compare"]
    assert sample.main([*flags, f"--out={tmp_path / 'both.mp4'}"]) == 0
