"""The teacher that makes the pictures: refused in one line, or given settings of its own."""

from __future__ import annotations

import re

import pytest
from random_teachers import write_pictures

import train_distillation
from wan_distill.settings.config import Config
from wan_distill.settings.picture_source import read_teachers, source_config
from wan_distill.settings.resolve import resolve


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(teacher_path="tiny-t2v"), "--image_source tiny-t2v: .*text-to-video teacher, which"),
        (dict(images="IMAGES"), "--image_source tiny-t2v: .*leave one out"),
        (dict(image_source="tiny-i2v"), "--image_source tiny-i2v: needs a picture itself; give"),
        (dict(image_source="./none"), "--image_source ./none: there is no such folder"),
        (dict(image_source="FILE"), "--image_source .*is one file"),
        (dict(height=24), "--height 24"),
        (dict(image_source=None, prompts="FILE"), "--prompts .*or --image_source too"),
    ],
)
def test_what_cannot_make_pictures_is_refused(changes, reason, tmp_path, capsys):
    given = dict(teacher_path="tiny-i2v", image_source="tiny-t2v") | changes
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    images = write_pictures(tmp_path / "images", 2)
    places = {"IMAGES": images, "FILE": file}
    flags = [f"--{name}={places.get(v, v)}" for name, v in given.items() if v is not None]
    flags.append(f"--output_dir={tmp_path / 'out'}")
    assert train_distillation.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(f"error: {reason}", error), error
    assert not (tmp_path / "out").exists()


def test_it_samples_in_its_own_way_at_the_size_of_the_job(tmp_path):
    asked = Config(
        teacher_path="tiny-i2v",
        image_source="tiny-t2v",
        output_dir=str(tmp_path / "out"),
        guidance_scale=2.0,
        boundary_ratio=0.9,
        flow_shift=7.0,  # would sit on the other's boundary
        num_frames=9,
    )
    info = read_teachers(asked)
    own = source_config(resolve(asked, info), info.picture_source)
    assert (own.guidance_scale, own.guidance_scale_2, own.boundary_ratio) == (4.0, 3.0, 0.875)
    assert (own.teacher_shift, own.num_frames, own.height) == (12.0, 9, 64)
    assert own.output_dir == str(tmp_path / "out" / "image_source")
    shared = Config(**{**vars(asked), "samples_dir": str(tmp_path / "shared")})
    own = source_config(resolve(shared, info), info.picture_source)
    assert own.output_dir == str(tmp_path / "shared" / "image_source")
