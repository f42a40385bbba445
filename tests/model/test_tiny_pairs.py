"""The embedded teacher of two shapes: stock diffusers loads it, and both shapes of its clips are
as the caption says.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from wan_distill.data.prompts import read_prompts
from wan_distill.maths.tiny_judge import Judge
from wan_distill.maths.tiny_world import World
from wan_distill.settings.assets import ASSETS, EMBEDDED_TEACHER

FOLDER = ASSETS / "tiny_pairs"
WORLD = World(**json.loads((FOLDER / "world.json").read_text()))


@pytest.mark.journey  # as long as a whole run
def test_its_clips_show_both_shapes_of_held_out_captions():
    pipeline = WanPipeline.from_pretrained(FOLDER)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    pipeline.set_progress_bar_config(disable=True)
    captions = WORLD.heldout_captions[::3]
    frames = pipeline(
        captions,
        "",
        WORLD.height,
        WORLD.width,
        WORLD.frames,
        num_inference_steps=40,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        max_sequence_length=16,
    ).frames
    judge, clips = Judge(WORLD), frames.transpose(1, 2) * 2 - 1
    obeyed = [judge.obeys(clip, text) for clip, text in zip(clips, captions, strict=True)]
    assert len(obeyed) == 20 and sum(obeyed) >= 16, obeyed  # of 600 it obeys nine of ten


def test_its_prompts_are_its_worlds_and_fit_its_clip():
    assert WORLD.pairs and len(WORLD.training_captions) == 300
    assert read_prompts(FOLDER / "prompts.txt") == WORLD.training_captions
    assert read_prompts(FOLDER / "heldout_prompts.txt") == WORLD.heldout_captions


def test_what_it_shares_with_the_first_embedded_teacher_is_the_same_in_each_byte():
    weights = Path("vae") / "diffusion_pytorch_model.safetensors"
    tokenizer = [path.relative_to(FOLDER) for path in (FOLDER / "tokenizer").iterdir()]
    assert len(tokenizer) == 3
    for file in (weights, *tokenizer):
        assert (FOLDER / file).read_bytes() == (EMBEDDED_TEACHER / file).read_bytes(), file


def test_no_configuration_names_the_folder_that_it_was_made_in():
    configs = sorted(FOLDER.glob("*/config.json"))
    assert len(configs) == 4
    for config in configs:
        assert "_name_or_path" not in json.loads(config.read_text()), config
