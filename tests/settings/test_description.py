"""What is read from a teacher's folder, and which folders are refused."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from random_teachers import write_pipeline
from safetensors.torch import load_file, save_file

from wan_distill.errors import UsageError
from wan_distill.settings import fingerprints
from wan_distill.settings.assets import EMBEDDED, EMBEDDED_TEACHER
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.settings.description import TeacherInfo, read_teacher


@pytest.fixture
def folder(random_teacher, tmp_path) -> Path:
    """A two-expert pipeline folder that a test may change."""
    return shutil.copytree(random_teacher, tmp_path / "teacher")


def read(folder: Path, **changes) -> TeacherInfo:
    return read_teacher(Config(teacher_path=str(folder), **changes))


def change(file: Path, **values) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


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
    wan = dict(height=480, width=832, num_frames=81, max_sequence_length=512)
    assert info.sampling_defaults == wan | dict(
        teacher_shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0, negative_prompt=""
    )
    change(folder / "model_index.json", expand_timesteps=True)
    assert read(folder).expand_timesteps


def test_what_an_image_to_video_folder_says(random_picture_teacher, tmp_path):
    info = read(random_picture_teacher)
    assert info.takes_picture and (info.boundary_ratio, info.mask_channels) == (0.9, 4)
    sampling = info.sampling_defaults
    assert sampling["teacher_shift"] == 5.0
    assert sampling["guidance_scale"] == sampling["guidance_scale_2"] == 3.5
    config = Config(height=32, width=48, num_frames=9)
    assert info.latent_shape(config) == (16, 3, 4, 6)  # the picture's channels are not sampled
    other = shutil.copytree(random_picture_teacher, tmp_path / "teacher")
    change(other / "model_index.json", expand_timesteps=True)
    with pytest.raises(UsageError, match=r"tokens a timestep of their own.*Wan2\.2-I2V"):
        read(other)


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_teachers_have_short_names(name, tmp_path, monkeypatch):
    info = read_teacher(Config(teacher_path=name))
    assert info.embedded and info.folder == EMBEDDED[name] and info.is_local
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()  # a folder of the user's own goes first
    with pytest.raises(UsageError, match=f"{name}: model_index.json is missing"):
        read_teacher(Config(teacher_path=name))


def test_without_a_path_it_is_the_embedded_teacher():
    info = read_teacher(Config())
    assert info.embedded and info.folder == EMBEDDED_TEACHER and info.name == "tiny_wan22"


def test_a_teacher_is_named_after_its_folder_however_it_is_given(folder, monkeypatch):
    monkeypatch.chdir(folder / "vae")
    assert {read(Path(path)).name for path in ("..", "../.", f"{folder}/")} == {"teacher"}


def test_one_transformer_is_one_expert(tmp_path):
    info = read(write_pipeline(tmp_path / "wan21", two_experts=False))
    assert (info.boundary_ratio, info.experts) == (None, ("high",))
    wan = dict(teacher_shift=5.0, guidance_scale=5.0, guidance_scale_2=5.0)
    assert wan.items() <= info.sampling_defaults.items()


def test_wans_negative_prompt_is_for_wans_text_encoder(folder):
    assert read(folder).sampling_defaults["negative_prompt"] == ""
    change(folder / "transformer" / "config.json", text_dim=4096)
    assert read(folder).sampling_defaults["negative_prompt"] == WAN_NEGATIVE_PROMPT


def test_a_tiny_teacher_says_what_clips_it_was_trained_with(folder):
    world = dict(frames=9, height=32, width=48, scale=0.5, pairs=False)
    (folder / "world.json").write_text(json.dumps(world), encoding="utf-8")
    wanted = dict(num_frames=9, height=32, width=48, max_sequence_length=16)
    assert wanted.items() <= read(folder).sampling_defaults.items()


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


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae", "text_encoder"])
def test_the_fingerprint_changes_with_each_tensor_and_each_setting(part, folder):
    info = read(folder)
    parts = ("transformer", "transformer_2", "vae", "text_encoder")
    before = info.fingerprint(parts)
    (file,) = folder.glob(f"{part}/*.safetensors")
    tensors = load_file(file)
    for name in (min(tensors), max(tensors)):
        changed = {name: tensors[name].clone()}
        changed[name].view(-1)[-1] += 1
        save_file(tensors | changed, file, {"format": "pt"})
        assert info.fingerprint(parts) != before, name
    save_file(tensors, file, {"format": "pt", "written": "again"})
    assert info.fingerprint(parts) == before
    change(folder / part / "config.json", _diffusers_version="0.1", transformers_version="9")
    assert info.fingerprint(parts) == before
    change(folder / part / "config.json", a_setting=1)
    assert info.fingerprint(parts) != before


def test_the_names_of_tensors_are_in_the_fingerprint(folder):
    before = read(folder).fingerprint()
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[f"{name}.renamed"] = tensors.pop(name)
    save_file(tensors, file, {"format": "pt"})
    assert read(folder).fingerprint() != before


def test_what_no_loader_reads_is_not_in_the_fingerprint(folder):
    info = read(folder)
    parts = ("transformer", "text_encoder", "tokenizer")
    before = info.fingerprint(parts)
    for part in parts:
        (folder / part / ".ipynb_checkpoints").mkdir()
        (folder / part / ".DS_Store").write_bytes(b"Bud1")
        (folder / part / "._model.safetensors").write_bytes(b"no weights")
        (folder / part / "README.md").write_text("about")
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, file.with_name("diffusion_pytorch_model.old.safetensors"))
    assert info.fingerprint(parts) == before


def test_the_same_weights_in_shards_or_under_a_variant_are_the_same_weights(folder):
    part = folder / "transformer"
    before = read(folder).fingerprint()
    whole = part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.rename(part / "diffusion_pytorch_model.fp16.safetensors")
    assert read(folder, variant="fp16").fingerprint() == before
    (part / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = ["diffusion_pytorch_model-1.safetensors", "diffusion_pytorch_model-2.safetensors"]
    for i, name in enumerate(names):
        save_file({k: tensors[k] for k in sorted(tensors)[i::2]}, part / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: names[i % 2] for i, k in enumerate(sorted(tensors))}}
    (part / f"{whole.name}.index.json").write_text(json.dumps(index))
    assert read(folder).fingerprint() == before


def test_another_variant_has_another_fingerprint(folder):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    other = {name: 1.5 * tensor for name, tensor in load_file(file).items()}
    save_file(other, file.with_name("diffusion_pytorch_model.ema.safetensors"), {"format": "pt"})
    assert read(folder).fingerprint() != read(folder, variant="ema").fingerprint()


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_three_places_of_each_tensor_of_large_weights_are_read(place, folder, monkeypatch):
    monkeypatch.setattr(fingerprints, "READ_WHOLE", 0)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({"a": torch.zeros(1 << 16), "b": torch.zeros(1 << 16)}, file)
    before = fingerprints.fingerprint_part(file.parent)
    values = {name: torch.zeros(1 << 16) for name in "ab"}
    values["b"][min(int(place * (1 << 16)), (1 << 16) - 1)] = 1
    save_file(values, file)
    assert fingerprints.fingerprint_part(file.parent) != before


def test_the_fingerprint_changes_with_the_pipeline_and_the_kind_of_file(folder):
    known = {read(folder).fingerprint()}
    change(folder / "model_index.json", expand_timesteps=True)
    known.add(read(folder).fingerprint())
    change(folder / "model_index.json", boundary_ratio=0.5)
    known.add(read(folder).fingerprint())
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    known.add(read(folder).fingerprint())
    assert len(known) == 4
    file.with_suffix(".bin").unlink()
    with pytest.raises(UsageError, match="no weight file"):
        read(folder).fingerprint()


def test_the_fingerprint_is_of_the_parts_that_are_asked_for(folder):
    info = read(folder)
    encoder = info.fingerprint(("text_encoder", "tokenizer"))
    change(folder / "transformer" / "config.json", a_setting=1)
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
        assert dataclasses.replace(info, variant="ema").fingerprint() != before
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
        ("model_index.json", dict(boundary_ratio="0.875"), "write the number without quotes"),
        ("model_index.json", dict(transformer_2=None), r"transformer_2 is null, .*\[null, null\]"),
        (
            "model_index.json",
            dict(transformer_2=[None, None]),
            "boundary_ratio 0.875 but no transformer_2; write .*or null for boundary_ratio",
        ),
        ("model_index.json", dict(tokenizer=["transformers", "X"]), "UMT5's is T5TokenizerFast"),
        ("model_index.json", dict(vae=None), r"vae is null, .*AutoencoderKLWan"),
        ("model_index.json", dict(vae=...), r"vae is null, .*AutoencoderKLWan"),
        ("model_index.json", dict(transformer=...), "transformer is null, .*WanTransformer3DModel"),
        ("model_index.json", dict(expand_timesteps="yes"), 'expand_timesteps is "yes"; write true'),
        ("text_encoder/config.json", dict(d_model="64"), "d_model '64'"),
        ("text_encoder/config.json", dict(num_layers=0), "num_layers 0"),
        ("model_index.json", dict(scheduler=["unipc", "UniPC"]), "UniPC of unipc, .*UniPCMulti"),
        ("model_index.json", dict(transformer=["diffusers", "X"]), "transformer is X; this tool"),
        ("model_index.json", dict(text_encoder=["transformers", "T5EncoderModel"]), "is T5Encoder"),
        ("model_index.json", dict(boundary_ratio=1.0), "boundary_ratio 1.0"),
        (
            "model_index.json",
            dict(_class_name="WanImageToVideoPipeline"),
            r"says WanImageToVideoPipeline \(image to video\), but .* is for text to video",
        ),
        (
            "transformer/config.json",
            dict(in_channels=36),
            r"WanPipeline \(text .* with 36 channels in and 16 out is for image to video",
        ),
        (
            "transformer/config.json",
            dict(in_channels=33),
            "33 channels in and 16 out is for neither",
        ),
        ("transformer/config.json", dict(image_dim=1280), r"an image encoder \(Wan2.1\)"),
        ("model_index.json", dict(image_encoder=["transformers", "X"]), "an image encoder"),
        ("transformer/config.json", dict(num_layers="2"), "num_layers 2"),
        ("transformer/config.json", dict(ffn_dim=0), "ffn_dim 0"),
        ("transformer/config.json", dict(num_layers=1001), "num_layers 1001"),
        ("transformer/config.json", dict(rope_max_seq_len="x"), "rope_max_seq_len x"),
        ("transformer/config.json", dict(rope_max_seq_len=10**9), "rope_max_seq_len 1000000000"),
        ("vae/config.json", dict(num_res_blocks=10**9), "num_res_blocks 1000000000"),
        ("text_encoder/config.json", dict(num_layers=10**9), "num_layers 1000000000"),
        ("transformer/config.json", dict(text_dim=True), "text_dim True"),
        ("transformer/config.json", dict(patch_size=[1, 2]), r"patch_size \[1, 2\]"),
        ("transformer/config.json", dict(patch_size=[1, 2, 0]), r"patch_size \[1, 2, 0\]"),
        ("vae/config.json", dict(scale_factor_spatial=0), "scale_factor_spatial 0"),
        ("vae/config.json", dict(scale_factor_temporal="4"), "scale_factor_temporal 4"),
        ("vae/config.json", dict(latents_mean=[0.0] * 15), "latents_mean is not 16 numbers"),
        ("vae/config.json", dict(latents_std=[float("nan")] * 16), "latents_std is not 16"),
        ("vae/config.json", dict(z_dim=8), "latents_mean is not 16 numbers"),
        ("vae/config.json", dict(latents_std=[0.0] * 16), "latents_std holds a number that is not"),
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


@pytest.mark.parametrize("name", ["wan2.2_fp8_scaled.safetensors", "wan.gguf", "model_index.json"])
def test_one_file_is_no_teacher(name, tmp_path):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match="is one file; give the folder of a WanPipeline"):
        read_teacher(Config(teacher_path=str(tmp_path / name)))


def test_a_cache_that_cannot_be_written_is_not_a_spelling_error(monkeypatch, tmp_path):
    def fail(*_, **__) -> str:
        raise PermissionError(13, "Permission denied", str(tmp_path / "models--some--Wan"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UsageError, match=r"--cache_dir .*: Permission denied at .*models--some"):
        read_teacher(Config(teacher_path="some/Wan", cache_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "remedy"),
    [
        ("https://huggingface.co/Wan-AI/Wan2.2", "give Wan-AI/Wan2.2$"),
        ("https://huggingface.co/Wan-AI/Wan2.2/", "give Wan-AI/Wan2.2$"),
        ("https://hf.co/Wan-AI/Wan2.2/tree/v1/vae", "give Wan-AI/Wan2.2 and --revision v1$"),
        ("Wan-AI/Wan2.2/tree/main", "give Wan-AI/Wan2.2 and --revision main$"),
    ],
)
def test_an_address_is_not_an_id(source, remedy):
    with pytest.raises(UsageError, match=f"is an address of the hub; {remedy}"):
        read(source)


@pytest.mark.parametrize("source", ["/no/such/teacher", "./teacher", "../t", "some/where/else"])
def test_a_path_is_not_looked_for_on_the_hub(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(UsageError, match="there is no such folder; check the spelling"):
        read_teacher(Config(teacher_path=source))


def test_a_name_that_is_too_long_for_a_path_is_no_error_of_the_disk():
    with pytest.raises(UsageError, match="neither a folder here nor reachable"):
        read_teacher(Config(teacher_path="x" * 300))


@pytest.mark.parametrize(
    ("offline", "says"),
    [
        (True, "not in the hub's cache, and HF_HUB_OFFLINE is set; run once with the network"),
        (False, "not in that repository; give the one whose name ends in -Diffusers"),
    ],
)
def test_a_repository_without_a_pipeline_is_not_told_to_be_a_folder(
    offline, says, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(UsageError, match=f"some/Wan: model_index.json is {says}"):
        read_teacher(Config(teacher_path="some/Wan"))
