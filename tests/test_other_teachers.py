"""Wan models besides the two-expert one go through the whole chain: single experts, per-token
timesteps, one frame.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL, write_pipeline
from diffusers import WanPipeline, WanTransformer3DModel

import sample
import train_distillation
from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.maths.randomness import keyed_noise
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.checks import resolve
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher

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


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("others")
    return {name: write_pipeline(root / name, **shape) for name, shape in SHAPES.items()}


@pytest.mark.parametrize(("name", "method", "frames"), CASES)
def test_the_whole_chain_runs_and_the_stock_pipeline_samples_alike(
    name, method, frames, teachers, tmp_path
):
    settings = SMALL | dict(
        teacher_path=str(teachers[name]),
        output_dir=str(tmp_path),
        method=method,
        num_frames=frames,
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"),
        evaluate=True,
        save_merged=True,
        critic_warmup_steps=1,
        critic_updates=1,
        eval_samples=4,
        learning_rate=1e-2,
        lora_alpha=4.0,
        lr_scheduler="constant",
    )
    config = Config(**settings)
    assert train_distillation.run(config) == 0
    info = read_teacher(config)
    config = resolve(config, info)
    experts = {
        line["expert"]
        for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    }
    assert experts == set(info.experts)

    compare_with_stock(config, info, tmp_path)


def compare_with_stock(config, info, folder: Path) -> WanPipeline:
    """The merged pipeline in `folder` samples what our sampler does, and not what the bare teacher
    would.
    """
    pipe = WanPipeline.from_pretrained(folder / "student")
    pipe.set_progress_bar_config(disable=True)
    noise = keyed_noise(info.latent_shape(config), "other", 0)[None]
    stock = pipe(
        "a small red circle moving left",
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
        "a small red circle moving left",
        do_classifier_free_guidance=False,
        max_sequence_length=config.max_sequence_length,
    )[0]
    torch.testing.assert_close(
        ours(config, info, folder, noise, prompt), stock, rtol=1e-4, atol=1e-5
    )
    plain = ours(config, info, None, noise, prompt)
    assert not torch.allclose(plain, stock, rtol=1e-3, atol=1e-4), "the adapters have no effect"
    return pipe


def test_an_expert_that_a_warm_start_leaves_alone_is_carried_over_and_measured(
    small_config, tmp_path
):
    common = dict(
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"), learning_rate=1e-2, save_merged=True
    )
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        train_distillation.run(small_config(method="trajectory", output_dir=str(first), **common))
        == 0
    )
    config = small_config(
        method="dmd",
        expert="low",
        init_student_from=str(first),
        output_dir=str(second),
        critic_warmup_steps=1,
        critic_updates=1,
        evaluate=True,
        eval_samples=4,
        **common,
    )
    assert train_distillation.run(config) == 0
    high, low = LORA_FILE["high"], LORA_FILE["low"]
    assert (first / high).read_bytes() == (second / high).read_bytes()
    assert (first / low).read_bytes() != (second / low).read_bytes()
    compare_with_stock(config, read_teacher(config), second)
    with_high = json.loads((second / "evaluation.json").read_text())["rows"][-1]["frechet"]
    (second / high).unlink()
    assert train_distillation.run(dataclasses.replace(config, evaluate_only=True)) == 0
    assert json.loads((second / "evaluation.json").read_text())["rows"][-1]["frechet"] != with_high


def test_a_shallower_student_is_trained_whole_and_exported_as_a_pipeline(tmp_path):
    teacher, folder = write_pipeline(tmp_path / "teacher", layers=3), tmp_path / "out"
    settings = SMALL | dict(
        teacher_path=str(teacher),
        output_dir=str(folder),
        method="trajectory",
        student_layers=2,
        evaluate=True,
        prompts=str(EMBEDDED_TEACHER / "prompts.txt"),
        eval_samples=4,
        learning_rate=1e-2,
        lr_scheduler="constant",
        gradient_checkpointing=True,
    )
    assert train_distillation.run(Config(**settings)) == 0
    info = read_teacher(Config(**settings))
    pipe = compare_with_stock(resolve(Config(**settings), info), info, folder)
    assert len(pipe.transformer.blocks) == len(pipe.transformer_2.blocks) == 2
    before = WanTransformer3DModel.from_pretrained(teacher, subfolder="transformer")
    kept = dict(zip(range(2), (before.blocks[0], before.blocks[2]), strict=True))
    for (
        number,
        block,
    ) in kept.items():  # begins as the teacher's first and last block, and all of it moves
        for (name, now), then in zip(
            pipe.transformer.blocks[number].named_parameters(), block.parameters(), strict=True
        ):
            assert 0 < (now - then).abs().max() < 0.1, f"block {number} {name}"
    code = re.search(
        r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S
    ).group(1)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert result.returncode == 0 and (folder / "video.mp4").stat().st_size > 0, result.stderr
    assert (
        sample.main(
            [
                "--student",
                str(folder),
                "--prompt",
                "a square",
                "--compare",
                "--out",
                str(tmp_path / "both.mp4"),
            ]
        )
        == 0
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(student_layers=4), "give 1 to 1"),
        (dict(student_layers=0), "give 1 to 1"),
        (dict(student_layers=1, method="dmd"), "use --method trajectory"),
        (
            dict(student_layers=1, method="trajectory", base_precision="nf4"),
            "leave --base_precision nf4 out",
        ),
        (
            dict(student_layers=1, method="trajectory", save_merged=False),
            "leave --no-save_merged out",
        ),
    ],
)
def test_a_shallower_student_that_cannot_be_is_refused(changes, said, small_config):
    with pytest.raises(UsageError, match=said):
        small_config(**changes)


def ours(
    config, info, folder: Path | None, noise: torch.Tensor, prompt: torch.Tensor
) -> torch.Tensor:
    """Our sampler's latents, of the student in `folder` or of the bare teacher."""
    from wan_distill.layout import student_file
    from wan_distill.maths import flow
    from wan_distill.maths.sigmas import SUBFOLDER
    from wan_distill.model.denoiser import Denoiser
    from wan_distill.model.student_files import load_student

    experts = {}
    for expert in info.experts:
        experts[expert] = WanTransformer3DModel.from_pretrained(
            info.folder, subfolder=SUBFOLDER[expert]
        ).eval()
        if folder:
            load_student(experts[expert], student_file(folder, expert))
    denoiser = Denoiser(experts, config.boundary, info.expand_timesteps)
    role = "student" if folder else "teacher"
    with torch.no_grad():
        return flow.sample(
            lambda x, sigma: denoiser.velocity(x, sigma, prompt, role=role), noise, config.sigmas()
        )


def test_a_vae_of_16_pixels_a_latent_needs_sides_of_32(teachers, tmp_path):
    """Wan2.2 TI2V-5B: 16 pixels a latent times patches of 2."""
    folder = teachers["wan2.2-ti2v-5b"]
    vae = json.loads((folder / "vae" / "config.json").read_text())
    info = read_teacher(Config(teacher_path=str(folder)))
    coarse = type(info)(**vars(info) | dict(vae=vae | dict(scale_factor_spatial=16)))
    settings = SMALL | dict(teacher_path=str(folder))
    resolve(Config(**settings | dict(height=64)), coarse)
    with pytest.raises(UsageError, match="multiple of 32; use 32 or 64"):
        resolve(Config(**settings | dict(height=48)), coarse)
