"""Which of a teacher's files `--variant` and `--allow_pickle` load, and which are refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file, save_file

from wan_distill.errors import UsageError
from wan_distill.model import hub_files
from wan_distill.model.hub_files import patterns_of
from wan_distill.model.loading import Teacher
from wan_distill.planning.teacher_files import check_files, part_variants
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.system.runtime import Runtime

WEIGHTS = "diffusion_pytorch_model.safetensors"
FP16 = "diffusion_pytorch_model.fp16.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded teacher."""
    return Path(shutil.copytree(EMBEDDED_TEACHER, tmp_path / "teacher"))


def described(folder: Path) -> TeacherInfo:
    return read_teacher(Config(teacher_path=str(folder)))


def check(folder: Path, **flags: Any) -> str:
    return check_files(described(folder), Config(teacher_path=str(folder), **flags))


def test_parts_without_the_variant_are_loaded_plain(folder):
    for part in ("transformer", "transformer_2"):
        shutil.copy(folder / part / WEIGHTS, folder / part / FP16)
    experts = {"transformer": "fp16", "transformer_2": "fp16"}
    plain = {"text_encoder": None, "vae": None}
    assert part_variants(described(folder), "fp16") == plain | experts
    assert set(part_variants(described(folder), None).values()) == {None}


def test_a_variant_of_the_vae_alone_is_taken(folder):
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / FP16)
    assert "whole" in check(folder, variant="fp16")
    with pytest.raises(UsageError, match=r"vae: no weight file .* loads with --variant fp16"):
        check(folder)


def test_a_variant_that_no_part_has_is_refused(folder):
    with pytest.raises(UsageError, match="--variant ema: no part"):
        check(folder, variant="ema")


def test_two_experts_of_different_variants_are_refused(folder):
    shutil.copy(folder / "transformer" / WEIGHTS, folder / "transformer" / FP16)
    with pytest.raises(UsageError, match="transformer_2 has none"):
        check(folder, variant="fp16")


def pickle_weights(file: Path) -> None:
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


@pytest.mark.parametrize("part", ["transformer", "transformer_2", "vae"])
def test_pickles_need_permission_before_anything_is_loaded(folder, part):
    pickle_weights(folder / part / WEIGHTS)
    with pytest.raises(UsageError, match=f"{part}: holds only .bin weights.* --allow_pickle"):
        check(folder)
    assert "whole" in check(folder, allow_pickle=True)


@pytest.mark.parametrize(("name", "value"), [("offload", True), ("base_precision", "int8")])
def test_flags_that_read_safetensors_only_refuse_pickled_experts(folder, name, value):
    pickle_weights(folder / "transformer_2" / WEIGHTS)
    with pytest.raises(UsageError, match=f"--{name}.* safetensors only, and transformer_2"):
        check(folder, allow_pickle=True, **{name: value})


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_the_teacher_loads_the_files_of_the_variant(folder, suffix):
    """The plain files hold other values."""
    for part in ("transformer", "vae"):
        weights = load_file(folder / part / WEIGHTS)
        shutil.copy(folder / part / WEIGHTS, folder / part / FP16)
        save_file({k: v + 1 for k, v in weights.items()}, folder / part / WEIGHTS)
        if suffix == ".bin":
            pickle_weights(folder / part / FP16)
    settings = dict(teacher_path=str(folder), variant="fp16", allow_pickle=suffix == ".bin")
    config = Config(method="trajectory", mixed_precision="no", **settings)
    teacher = Teacher(described(folder), config, Runtime(config))
    for part, model in (("transformer", teacher.load_expert("high")), ("vae", teacher.load_vae())):
        original = load_file(EMBEDDED_TEACHER / part / WEIGHTS)
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], original[name].float()) for name in original), part


def test_an_offloaded_expert_is_of_the_same_variant(folder):
    weights = load_file(folder / "transformer" / WEIGHTS)
    save_file({k: 1.3 * v for k, v in weights.items()}, folder / "transformer" / FP16)
    info = described(folder)
    sample = torch.randn(1, info.transformer["in_channels"], 2, 4, 4)
    prompt = torch.randn(1, 3, info.transformer["text_dim"])

    def velocity(**flags: Any) -> torch.Tensor:
        config = Config(
            teacher_path=str(folder), method="trajectory", mixed_precision="no", **flags
        )
        model = Teacher(info, config, Runtime(config)).load_expert("high")
        with torch.no_grad():
            return model(sample, torch.tensor([500.0]), prompt).sample

    fp16 = velocity(variant="fp16")
    assert torch.equal(velocity(variant="fp16", offload=True), fp16)
    assert torch.equal(velocity(offload=True), velocity())
    assert not torch.allclose(velocity(), fp16)


# ----------------------------------------------------------------------------------------- offline


@pytest.fixture
def cached(folder, tmp_path, monkeypatch) -> Path:
    """The embedded teacher as some/Wan in the hub's cache, without the network: its snapshot."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--some--Wan"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(folder, repository / "snapshots" / commit))


def check_cached(cached: Path, **flags: Any) -> str:
    config = Config(teacher_path="some/Wan", cache_dir=str(cached.parents[2]), **flags)
    return check_files(read_teacher(config), config)


def test_a_whole_cache_is_enough(cached):
    assert "whole by their headers" in check_cached(cached)


@pytest.mark.parametrize("part", ["transformer_2", "vae", "text_encoder"])
@pytest.mark.parametrize("how", ["absent", "cut", "link"])
def test_a_cache_that_is_not_whole_is_refused_before_anything_loads(part, how, cached):
    file = sorted((cached / part).glob("*.safetensors"))[0]
    data = file.read_bytes()
    file.unlink()
    if how == "cut":
        file.write_bytes(data[:-1000])
    if how == "link":
        file.symlink_to(cached.parents[1] / "blobs" / "abc")
    with pytest.raises(UsageError, match="cache is not whole: delete that file") as error:
        check_cached(cached)
    assert part in str(error.value) and "download it again" not in str(error.value)


def test_offline_pickles_and_variants_are_refused_too(cached):
    for part in ("transformer", "transformer_2"):
        (cached / part / WEIGHTS).rename(cached / part / FP16)
    with pytest.raises(UsageError, match="no weight file"):
        check_cached(cached)
    assert "whole" in check_cached(cached, variant="fp16")


def test_a_teacher_that_is_not_in_the_cache_is_named(cached):
    config = Config(teacher_path="some/Other", cache_dir=str(cached.parents[2]))
    with pytest.raises(UsageError, match="nor in the hub's cache, and HF_HUB_OFFLINE is set"):
        read_teacher(config)
    config = Config(teacher_path="some/Wan", revision="v2", cache_dir=str(cached.parents[2]))
    with pytest.raises(UsageError, match="some/Wan at v2: "):
        read_teacher(config)


# -------------------------------------------------------------------------------------- on the hub


@pytest.fixture
def on_hub(folder, tmp_path, monkeypatch) -> Callable[..., TeacherInfo]:
    """The embedded teacher as a hub's repository of which only the JSON files are here yet."""

    def described(*renamed: tuple[str, str]) -> TeacherInfo:
        for old, new in renamed:
            (folder / old).rename(folder / new)
        names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        here = tmp_path / f"{len(renamed)}" / "0123abc"
        for name in names:
            if name.endswith(".json"):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, here / name)
        monkeypatch.setattr(HfApi, "list_repo_files", lambda self, source, revision: names)
        hub_files.listed.cache_clear()
        return dataclasses.replace(read_teacher(Config()), source="some/Wan", folder=here)

    yield described
    hub_files.listed.cache_clear()


def test_the_names_on_the_hub_are_looked_at_before_anything_is_downloaded(on_hub):
    assert "on the hub, 5 files of weights" in check_files(on_hub(), Config())
    with pytest.raises(UsageError, match="--variant ema: no part of some/Wan has files of it"):
        check_files(on_hub(), Config(variant="ema"))


def test_what_the_hub_does_not_have_is_refused(on_hub):
    info = on_hub((f"transformer/{WEIGHTS}", f"transformer/{FP16}"))
    with pytest.raises(UsageError, match="--teacher_path some/Wan: transformer: no weight file"):
        check_files(info, Config())
    with pytest.raises(UsageError, match="of two experts only one has files of it"):
        check_files(info, Config(variant="fp16"))
    pickle = WEIGHTS.replace("safetensors", "bin")
    info = on_hub((f"transformer/{FP16}", f"transformer/{pickle}"))
    with pytest.raises(UsageError, match=r"holds only .bin weights.*--allow_pickle"):
        check_files(info, Config())
    with pytest.raises(UsageError, match="--offload: reads safetensors only"):
        check_files(info, Config(allow_pickle=True, offload=True))


def test_only_files_that_are_loaded_are_downloaded(on_hub, folder):
    shutil.copy(folder / "transformer" / WEIGHTS, folder / "transformer" / FP16)
    shutil.copy(folder / "transformer_2" / WEIGHTS, folder / "transformer_2" / FP16)
    info = on_hub()
    assert patterns_of(info, Config(), "transformer") == [
        "transformer/*.json",
        f"transformer/{WEIGHTS}",
    ]
    assert f"transformer/{FP16}" in patterns_of(info, Config(variant="fp16"), "transformer")
    shards = patterns_of(info, Config(variant="fp16"), "text_encoder")
    assert shards[1:] == [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]


def test_a_hub_that_does_not_list_its_files_gives_all_of_a_part(on_hub, monkeypatch):
    def fail(*_, **__) -> None:
        raise OSError("no network")

    info = on_hub()
    monkeypatch.setattr(HfApi, "list_repo_files", fail)
    hub_files.listed.cache_clear()
    assert patterns_of(info, Config(), "vae") == ["vae/*"]
    assert check_files(info, Config()) == "on the hub; downloaded when needed"


def test_a_part_of_the_hub_is_checked_when_it_arrives(on_hub, folder, monkeypatch):
    """The tokenizer, which has no weights, too: the merged pipeline takes it along."""
    info = on_hub()
    arrived = []

    def arrive(source, *, revision, cache_dir, allow_patterns) -> str:
        arrived.append(allow_patterns)
        for file in (f for pattern in allow_patterns for f in folder.glob(pattern)):
            copy = info.folder / file.relative_to(folder)
            copy.write_bytes(file.read_bytes()[: 1000 if file.suffix == ".safetensors" else None])
        return str(info.folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", arrive)
    config = Config(mixed_precision="no")
    teacher = Teacher(info, config, Runtime(config))
    assert teacher.fetch("tokenizer") == info.folder and arrived == [["tokenizer/*"]]
    with pytest.raises(UsageError, match=r"vae.*safetensors: truncated.*cache is not whole"):
        teacher.fetch("vae")
