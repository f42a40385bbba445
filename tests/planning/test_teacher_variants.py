"""`--variant`: each part of a teacher is loaded with it where it has such files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from wan_distill.errors import UsageError
from wan_distill.planning.teacher_files import check_files, part_variants
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded teacher."""
    return Path(shutil.copytree(EMBEDDED_TEACHER, tmp_path / "teacher"))


def described(folder: Path) -> TeacherInfo:
    return read_teacher(Config(teacher_path=str(folder)))


def test_parts_without_the_variant_are_loaded_plain(folder):
    for part in ("transformer", "transformer_2"):
        shutil.copy(folder / part / WEIGHTS, folder / part / FP16)
    experts = {"transformer": "fp16", "transformer_2": "fp16"}
    plain = {"text_encoder": None, "vae": None}
    assert part_variants(described(folder), "fp16") == plain | experts
    assert set(part_variants(described(folder), None).values()) == {None}


def test_a_variant_of_the_vae_alone_is_taken(folder):
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / FP16)
    assert "whole" in check_files(described(folder), "fp16")
    with pytest.raises(UsageError, match=r"vae: no weight file .* loads with --variant fp16"):
        check_files(described(folder))


def test_a_variant_that_no_part_has_is_refused(folder):
    with pytest.raises(UsageError, match="--variant ema: no part"):
        check_files(described(folder), "ema")


def test_two_experts_of_different_variants_are_refused(folder):
    shutil.copy(folder / "transformer" / WEIGHTS, folder / "transformer" / FP16)
    with pytest.raises(UsageError, match="transformer_2 has none"):
        check_files(described(folder), "fp16")
