"""The embedded image-to-video teacher: stock diffusers loads it, and its clips keep the picture and
obey the caption.
"""

from __future__ import annotations

import filecmp
import json

import pytest
import torch
from diffusers import WanImageToVideoPipeline

from wan_distill.data.pictures import read_pictures
from wan_distill.maths.first_frames import first_frame_statistics
from wan_distill.maths.tiny_judge import Judge
from wan_distill.maths.tiny_world import World
from wan_distill.settings.assets import ASSETS, EMBEDDED_TEACHER

FOLDER = ASSETS / "tiny_i2v"
WORLD = World(**json.loads((FOLDER / "world.json").read_text()))
MOST_ERROR = 0.12  # of the first frames; the mean is 0.05, and the VAE alone makes 0.03


@pytest.mark.journey  # as long as a whole run
def test_its_clips_keep_the_picture_and_obey_the_caption():
    pipeline = WanImageToVideoPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    records = read_pictures(FOLDER / "heldout_pictures")[:8]
    judge, obeyed = Judge(WORLD), []
    for seed, record in enumerate(records):
        size = (WORLD.height, WORLD.width)
        frames = pipeline(
            record.cropped(*size),
            record.caption,
            "",
            *size,
            WORLD.frames,
            num_inference_steps=40,
            guidance_scale=3.5,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
            max_sequence_length=16,
        ).frames
        clip = frames[0].transpose(0, 1) * 2 - 1
        picture = (record.pixels(*size).permute(1, 2, 0) + 1) / 2
        found = first_frame_statistics(frames.permute(0, 1, 3, 4, 2), picture[None])
        assert found["first_frame"] < min(MOST_ERROR, found["departure"])
        obeyed.append(judge.obeys(clip, record.caption))
    assert sum(obeyed) >= 7, obeyed


@pytest.mark.parametrize("folder", ["pictures", "heldout_pictures"])
def test_its_pictures_are_of_its_captions_four_of_each(folder):
    said = []
    records = read_pictures(FOLDER / folder, said.append)
    captions = WORLD.heldout_captions if "heldout" in folder else WORLD.training_captions
    assert [record.caption for record in records] == captions * 4 and not said
    assert {record.image().size for record in records} == {(WORLD.width, WORLD.height)}
    assert len({record.key for record in records}) == len(records)


def test_what_it_shares_with_the_other_embedded_teacher_is_the_same_in_each_byte():
    for part in ("tokenizer", "text_encoder", "vae"):
        compared = filecmp.dircmp(FOLDER / part, EMBEDDED_TEACHER / part, ignore=[])
        assert not (compared.left_only or compared.right_only), part
        assert filecmp.cmpfiles(
            FOLDER / part, EMBEDDED_TEACHER / part, compared.common_files, shallow=False
        )[1:] == ([], []), part
