"""What is read from a teacher's folder, and which folders are refused."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
from conftest import write_pipeline

from wan_distill.errors import UsageError
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher


@pytest.fixture
def folder(random_teacher, tmp_path) -> Path:
    """A two-expert pipeline folder that a test may change."""
    return shutil.copytree(random_teacher, tmp_path / "teacher")


def read(folder: Path) -> TeacherInfo:
    return read_teacher(Config(teacher_path=str(folder)))


def change(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def flip(file: Path, position: int) -> None:
    """Changes one byte and leaves the size as it is."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def test_what_a_folder_says(folder):
    info = read(folder)
    assert (info.source, info.folder, info.name) == (str(folder), folder, "teacher")
    assert (info.boundary_ratio, info.experts) == (0.875, ("high", "low"))
    assert not info.embedded and not info.expand_timesteps
    assert info.sampling_defaults == dict(
        teacher_shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0
    )
    change(folder / "model_index.json", expand_timesteps=True)
    assert read(folder).expand_timesteps


def test_without_a_path_it_is_the_embedded_teacher():
    info = read_teacher(Config())
    assert info.embedded and info.folder == EMBEDDED_TEACHER and info.name == "tiny_wan22"


def test_a_teacher_is_named_after_its_folder_however_it_is_given(folder, monkeypatch):
    monkeypatch.chdir(folder / "vae")
    assert {read(Path(path)).name for path in ("..", "../.", f"{folder}/")} == {"teacher"}


def test_one_transformer_is_one_expert(tmp_path):
    info = read(write_pipeline(tmp_path / "wan21", two_experts=False))
    assert (info.boundary_ratio, info.experts) == (None, ("high",))
    assert info.sampling_defaults == dict(
        teacher_shift=5.0, guidance_scale=5.0, guidance_scale_2=5.0
    )


def test_latents_have_channels_frames_height_and_width_in_this_order(folder):
    config = Config(height=48, width=80, num_frames=17)
    assert read(folder).latent_shape(config) == (16, 5, 6, 10)  # 4 frames, 8 x 8 pixels per latent
    change(folder / "vae" / "config.json", scale_factor_spatial=16, scale_factor_temporal=8)
    assert read(folder).latent_shape(config) == (16, 3, 3, 5)


def test_sides_are_whole_patches(folder):
    assert read(folder).side_multiple == 16  # 8 pixels per latent, 2 latents per patch
    change(folder / "vae" / "config.json", scale_factor_spatial=16)
    assert read(folder).side_multiple == 32


# ------------------------------------------------------------------------------------- fingerprint


def test_equal_folders_have_equal_fingerprints(folder, random_teacher):
    assert read(folder).fingerprint() == read(random_teacher).fingerprint()
    assert len(read(folder).fingerprint()) == 32


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae"])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors", "large"])
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_the_fingerprint_changes_with_each_file(part, name, place, folder):
    (folder / part / "large").write_bytes(bytes(1 << 20))
    info = read(folder)
    before = info.fingerprint()
    file = folder / part / name
    size = file.stat().st_size
    flip(file, min(int(place * size), size - 1))
    assert info.fingerprint() != before


def test_the_fingerprint_changes_with_names_sizes_and_the_index(folder):
    info = read(folder)
    known = {info.fingerprint()}
    file = folder / "transformer_2" / "diffusion_pytorch_model.safetensors"
    file = file.rename(file.with_name("model.safetensors"))
    known.add(info.fingerprint())
    with file.open("ab") as data:
        data.write(b"\0")
    known.add(info.fingerprint())
    change(folder / "model_index.json", expand_timesteps=True)
    known.add(info.fingerprint())
    assert len(known) == 4


def test_the_fingerprint_is_of_the_parts_that_are_asked_for(folder):
    info = read(folder)
    encoder = info.fingerprint(("text_encoder", "tokenizer"))
    flip(folder / "transformer" / "config.json", 0)
    assert info.fingerprint(("text_encoder", "tokenizer")) == encoder
    flip(folder / "tokenizer" / "tokenizer.json", 0)
    assert info.fingerprint(("text_encoder", "tokenizer")) != encoder


# --------------------------------------------------------------------------------------------- hub


def test_a_hub_teacher_is_known_by_its_commit(folder, tmp_path, monkeypatch):
    asked = []

    def arrive(source, *, revision, cache_dir, allow_patterns) -> str:
        asked.append((source, revision, cache_dir))
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert not any(fnmatch.fnmatch(weights, pattern) for pattern in allow_patterns)
        return str(tmp_path / "snapshots" / commit)

    monkeypatch.setattr("huggingface_hub.snapshot_download", arrive)
    fingerprints = []
    for commit in ("0a1b", "2c3d"):
        shutil.copytree(folder, tmp_path / "snapshots" / commit)
        config = Config(teacher_path="some/Wan", revision="main", cache_dir=str(tmp_path))
        info = read_teacher(config)
        assert (info.name, info.source, info.commit) == ("Wan", "some/Wan", commit)
        before = info.fingerprint()
        flip(info.folder / "vae" / "config.json", 0)  # more files arrive when they are needed
        assert info.fingerprint() == before
        fingerprints.append(before)
    assert fingerprints[0] != fingerprints[1]
    assert asked == [("some/Wan", "main", str(tmp_path))] * 2


def test_a_hub_that_does_not_answer_is_named(monkeypatch):
    def fail(*_, **__) -> str:
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UsageError, match=r"--teacher_path some/Wan: .*no route to host") as error:
        read_teacher(Config(teacher_path="some/Wan"))
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("file", "values", "reason"),
    [
        ("model_index.json", dict(_class_name="FluxPipeline"), "is a FluxPipeline"),
        ("model_index.json", dict(boundary_ratio=None), "boundary_ratio None"),
        ("model_index.json", dict(boundary_ratio=1.0), "boundary_ratio 1.0"),
        ("transformer/config.json", dict(in_channels=36), "image-to-video transformer"),
        ("transformer/config.json", dict(image_dim=1280), "image-to-video transformer"),
        ("transformer/config.json", dict(num_layers="2"), "num_layers 2"),
        ("transformer/config.json", dict(ffn_dim=0), "ffn_dim 0"),
        ("transformer/config.json", dict(text_dim=True), "text_dim True"),
        ("transformer/config.json", dict(patch_size=[1, 2]), r"patch_size \[1, 2\]"),
        ("transformer/config.json", dict(patch_size=[1, 2, 0]), r"patch_size \[1, 2, 0\]"),
        ("vae/config.json", dict(scale_factor_spatial=0), "scale_factor_spatial 0"),
        ("vae/config.json", dict(scale_factor_temporal="4"), "scale_factor_temporal 4"),
        ("vae/config.json", dict(latents_mean=[0.0] * 15), "latents_mean is not 16 numbers"),
        ("vae/config.json", dict(latents_std=[float("nan")] * 16), "latents_std is not 16"),
        ("vae/config.json", dict(z_dim=8), "latents_mean is not 16 numbers"),
    ],
)
def test_what_is_not_a_text_to_video_wan_is_refused(file, values, reason, folder):
    change(folder / file, **values)
    with pytest.raises(UsageError, match=f"--teacher_path {folder}: .*{reason}"):
        read(folder)


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "is missing"),
        (b"{", "cannot be read"),
        (b"\xff", "cannot be read"),
        (b"[]", "object"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(file, content, reason, folder):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(UsageError, match=reason) as error:
        read(folder)
    assert Path(file).name in str(error.value) and "\n" not in str(error.value)
