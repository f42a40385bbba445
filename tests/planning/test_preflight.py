"""What stops a run beforehand: the teacher's files, the disk, the memory, versions, processes."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from lessons import make_lesson
from safetensors.torch import load_file, save_file

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.model.student_files import save_lora
from wan_distill.planning import disk, preflight, room
from wan_distill.planning.memory import shape_of
from wan_distill.planning.trace import trace
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.description import read_teacher

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def broken(random_teacher, tmp_path, capsys):
    """Copies the teacher, lets a test break the copy, and returns what a dry run says about it."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")

    def complaint(damage=lambda folder: None) -> str:
        damage(folder)
        flags = tiny_flags(folder, tmp_path / "out", dry_run=True)
        assert train_distillation.main(flags) == 2
        return capsys.readouterr().err

    return complaint


def test_a_teachers_own_folder_is_no_output_folder(random_teacher, tmp_path, capsys):
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    before = sorted(folder.rglob("*"))
    for out in (folder, folder / "transformer"):
        for dry_run in (True, False):
            assert train_distillation.main(tiny_flags(folder, out, dry_run=dry_run)) == 2
            assert "so it is a model's folder, whose files would" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before


def test_a_missing_expert_is_named(broken):
    said = broken(lambda folder: (folder / "transformer_2" / WEIGHTS).unlink())
    assert "transformer_2" in said and "no weight file" in said


def test_a_truncated_expert_is_named(broken):
    def cut(folder):
        file = folder / "transformer" / WEIGHTS
        file.write_bytes(file.read_bytes()[:-100])

    assert WEIGHTS in broken(cut)


def test_weights_of_another_shape_are_named(broken):
    def swap(folder):
        file = folder / "transformer_2" / WEIGHTS
        weights = load_file(file)
        weights["proj_out.weight"] = torch.zeros(3, 3)
        save_file(weights, file, {"format": "pt"})

    said = broken(swap)
    assert "transformer_2" in said and "proj_out.weight" in said


def test_weights_without_a_tensor_are_named(broken):
    said = broken(lambda folder: save_file({}, folder / "transformer" / WEIGHTS))
    assert "transformer stores" in said and "as nothing, its configuration asks for" in said


@pytest.mark.parametrize("part", ["transformer_2", "vae", "text_encoder"])
def test_weights_that_are_quantised_are_named(broken, part):
    """Loaders make floats of integers, without the scales that they need."""

    def in_integers(folder):
        (file,) = (folder / part).glob("*.safetensors")
        tensors = load_file(file)
        name = next(name for name, tensor in tensors.items() if tensor.ndim == 2 or part == "vae")
        save_file(tensors | {name: tensors[name].to(torch.int8)}, file, {"format": "pt"})

    assert "as I8, which is no float; give the bf16 weights" in broken(in_integers)


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_a_part_whose_configuration_says_that_it_is_quantised_is_named(broken, part):
    def quantised(folder):
        file = folder / part / "config.json"
        settings = json.loads(file.read_text()) | dict(quantization_config=dict(load_in_8bit=True))
        file.write_text(json.dumps(settings))

    assert "was quantised (quantization_config in its config.json)" in broken(quantised)


@pytest.mark.journey  # as long as a whole run
def test_a_configuration_of_another_version_is_read_as_diffusers_reads_it(random_teacher, tmp_path):
    """Settings that this diffusers does not know are left out."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    for part in ("transformer", "vae"):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(of_next_year=5)))
    assert train_distillation.main(tiny_flags(folder, tmp_path / "out", dry_run=True)) == 0


def test_networks_that_cannot_compute_the_clips_are_named(broken):
    def empty(folder):
        file = folder / "vae" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | dict(dim_mult=[])))

    said = broken(empty)
    assert "its transformer or VAE describes none that computes such clips" in said


def test_a_configuration_that_cannot_be_read_is_named(broken):
    def garble(folder):
        (folder / "tokenizer" / "tokenizer_config.json").write_text("{")

    assert "tokenizer/tokenizer_config.json: cannot be read" in broken(garble)


def test_a_tensor_in_two_shards_is_named(broken):
    def divide(folder):
        part = folder / "transformer"
        weights = load_file(part / WEIGHTS)
        (part / WEIGHTS).unlink()
        names = [WEIGHTS.replace(".", f"-0000{i}-of-00002.", 1) for i in (1, 2)]
        save_file(weights, part / names[0], {"format": "pt"})
        save_file({"proj_out.bias": weights["proj_out.bias"] + 1}, part / names[1])
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, names[0])}
        index["weight_map"]["proj_out.bias"] = names[1]
        (part / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    assert "holds proj_out.bias, which another shard beside it holds too" in broken(divide)


def test_what_is_lost_of_the_negative_prompt_is_said(random_teacher, tmp_path, capsys):
    flags = tiny_flags(random_teacher, tmp_path / "out", dry_run=True)
    for prompt, says in (
        ("left " * 20, "has 21, of which 12 are seen"),
        ("红 a", "50.0 % is unknown"),
    ):
        assert train_distillation.main([*flags, f"--negative_prompt={prompt}"]) == 0
        assert says in capsys.readouterr().out


def test_a_missing_vocabulary_stops_the_run(broken):
    said = broken(lambda folder: shutil.rmtree(folder / "tokenizer"))
    assert "tokenizer: holds no vocabulary" in said and "tokenizer's files" in said


@pytest.mark.journey  # as long as a whole run
def test_prompts_that_the_tokenizer_does_not_know_stop_the_run(random_teacher, tmp_path, capsys):
    file = tmp_path / "p.txt"
    file.write_text("红\n蓝\n", encoding="utf-8")
    flags = tiny_flags(random_teacher, tmp_path / "out", dry_run=True, prompts=file)
    assert train_distillation.main(flags) == 2
    assert "become the same tokens" in capsys.readouterr().err
    embedded = tiny_flags(EMBEDDED_TEACHER, tmp_path / "out", dry_run=True, prompts=file)
    assert train_distillation.main(embedded) == 0
    assert "100.0 % of their text unknown" in capsys.readouterr().out


def test_too_little_disk_stops_the_run(broken, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage(10, 10, 0))
    assert "--output_dir" in broken()


@pytest.mark.journey  # as long as a whole run
def test_a_place_that_cannot_be_written_stops_the_run(random_teacher, tmp_path, capsys):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "out"):
        assert train_distillation.main(tiny_flags(random_teacher, out, dry_run=True)) == 2
        assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err
    plan = tmp_path / "file" / "plan.json"
    flags = tiny_flags(random_teacher, tmp_path / "out", dry_run=True, plan_json=plan)
    assert train_distillation.main(flags) == 2
    assert f"--plan_json {plan}: cannot be written (Not a directory)" in capsys.readouterr().err


def disks(monkeypatch, free: dict, one: bool = False) -> None:
    """Each folder of `free` is a disk with so many bytes; with `one` all are on the same."""
    usage = collections.namedtuple("usage", "total used free")
    real, number = Path.stat, list(free).index

    def stat(path, **options):
        found = real(path, **options)
        if path not in free:
            return found
        fields = list(found)
        fields[2] = 0 if one else number(path)  # st_dev
        return os.stat_result(fields)

    monkeypatch.setattr(Path, "stat", stat)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage(0, 0, free[place]))


def test_solved_samples_need_the_room_where_they_are_kept(small_config, tmp_path, monkeypatch):
    out, shared = tmp_path / "out", tmp_path / "shared"
    shared.mkdir()
    out.mkdir()
    config = small_config(samples_dir=str(shared), output_dir=str(out))
    info = read_teacher(config)
    needs = disk.disk_needs((config,), info, trace(shape_of(config, info)))
    samples = needs["for solved samples"]
    rest = sum(needs.values()) - samples
    enough = {out: rest, shared: samples}
    disks(monkeypatch, enough)
    said = room.check_disk((config,), info)
    assert f"free at {out}, " in said and said.endswith(f"free at {shared}")
    for folder, name in ((out, "--output_dir"), (shared, "--samples_dir")):
        disks(monkeypatch, enough | {folder: enough[folder] - 1})
        with pytest.raises(UsageError, match=f"{name} {folder}: .* this run writes up to"):
            room.check_disk((config,), info)
    disks(monkeypatch, dict.fromkeys(enough, rest + samples), one=True)
    room.check_disk((config,), info)
    disks(monkeypatch, dict.fromkeys(enough, rest + samples - 1), one=True)
    with pytest.raises(UsageError, match=f"--samples_dir {shared}: "):
        room.check_disk((config,), info)


def test_a_run_that_goes_on_needs_only_what_it_has_not_written(small_config, tmp_path, monkeypatch):
    out, shared = tmp_path / "out", tmp_path / "shared"
    for folder in (out / "high", shared / "trajectories"):
        folder.mkdir(parents=True)
        (folder / "written.safetensors").write_bytes(bytes(1000))
    config = small_config(samples_dir=str(shared), output_dir=str(out))
    info = read_teacher(config)
    needs = disk.disk_needs((config,), info, trace(shape_of(config, info)))
    samples = needs["for solved samples"]
    left = {out: sum(needs.values()) - samples - 1000, shared: samples - 1000}
    disks(monkeypatch, left)
    with pytest.raises(UsageError, match=f"--output_dir {out}: "):  # files of something else
        room.check_disk((config,), info)
    RunFolder(out).plan.touch()
    for unused in (out / "high" / "set-aside-0-checkpoint-2", out / "high" / ".partial-3"):
        unused.mkdir()
        (unused / "student.safetensors").write_bytes(bytes(500))
    room.check_disk((config,), info)
    disks(monkeypatch, left | {out: left[out] - 1})  # what is not in use makes no room
    with pytest.raises(UsageError, match=f"--output_dir {out}: .* writes up to"):
        room.check_disk((config,), info)
    disks(monkeypatch, left | {shared: left[shared] - 1})
    with pytest.raises(UsageError, match=f"--samples_dir {shared}: .* writes up to"):
        room.check_disk((config,), info)


def test_a_samples_folder_that_cannot_be_written_stops_the_run(small_config, tmp_path):
    (tmp_path / "file").touch()
    config = small_config(samples_dir=str(tmp_path / "file" / "shared"))
    with pytest.raises(UsageError, match=r"--samples_dir .*file is a file, not a folder; choose"):
        room.check_disk((config,), read_teacher(config))


def test_too_little_memory_stops_the_run(broken, monkeypatch):
    import psutil

    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=1000))
    assert "of host memory" in broken()


def test_an_old_package_stops_the_run(broken, monkeypatch):
    real = preflight.importlib.metadata.version
    monkeypatch.setattr(
        preflight.importlib.metadata,
        "version",
        lambda name: "0.1" if name == "diffusers" else real(name),
    )
    assert "diffusers 0.1: need >=" in broken()


def test_a_missing_package_stops_the_run(broken, monkeypatch):
    real = preflight.importlib.metadata.version

    def version(name):
        if name == "jinja2":
            raise preflight.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(preflight.importlib.metadata, "version", version)
    assert "jinja2: not installed; pip install -r requirements.txt" in broken()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(shard=True, evaluate=False), "--shard: there is one process only"),
        (dict(shard=True, evaluate=True), "--shard: --evaluation sets runs in one process"),
        (dict(shard=True, base_precision="fp8"), "a quantised base is not sharded"),
        (dict(shard=True, offload=True), "--offload: does not go together with --shard"),
        (dict(shard=True, compile=True), "--compile: does not go together with --shard"),
        (dict(shard=True, context_parallel=True), "--context_parallel: does not go together"),
        (dict(context_parallel=True, compile=True), "--compile: does not go together"),
        (dict(context_parallel=True), "needs an accelerator"),
    ],
)
def test_processes_that_clash_with_the_rest_are_refused(small_config, monkeypatch, changes, said):
    if "there is one process" not in said:
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    config = small_config(**dict(evaluate=False) | changes)
    with pytest.raises(UsageError) as raised:
        preflight.check_processes(config, read_teacher(config))
    assert said in str(raised.value)


def test_clips_are_measured_by_all_processes(small_config, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = small_config(shard=True, evaluate=True, evaluation="pairs")
    preflight.check_processes(config, read_teacher(config))


def test_tokens_and_heads_must_be_shared_evenly(small_config, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    config = small_config(context_parallel=True, evaluate=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    preflight.check_processes(config, read_teacher(config))
    monkeypatch.setenv("WORLD_SIZE", "4")  # of two heads
    with pytest.raises(UsageError, match="2 heads are not shared evenly by 4 processes"):
        preflight.check_processes(config, read_teacher(config))


def test_a_plan_for_named_gpus_shares_tokens_and_heads_by_their_number(small_config, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    options = dict(context_parallel=True, evaluate=False, dry_run=True)
    config = small_config(gpu="h100:2", **options)
    preflight.check_processes(config, read_teacher(config))
    config = small_config(gpu="h100:4", **options)  # of two heads
    with pytest.raises(UsageError, match="2 heads are not shared evenly by 4 processes"):
        preflight.check_processes(config, read_teacher(config))


def test_a_missing_bitsandbytes_is_named(small_config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(UsageError, match="pip install bitsandbytes"):
        preflight.check_optional(small_config(use_8bit_adam=True))


def test_a_missing_compiler_is_named(small_config, monkeypatch):
    def fail(*given, **options):
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UsageError, match="--compile: torch cannot compile here"):
        preflight.check_optional(small_config(compile=True))


def test_a_run_does_not_write_over_what_it_begins_with(make_run, random_teacher, tmp_path):
    run = make_run(method="trajectory")
    weights = make_lesson(run, "high").learners["student"].exported()
    for expert, name in LORA_FILE.items():
        save_lora(tmp_path / name, weights, run.config, run.info, expert)
    config = dataclasses.replace(run.config, init_student_from=str(tmp_path))
    assert preflight.check_begin(config, run.info)
    here = dataclasses.replace(config, output_dir=str(tmp_path / "x" / ".."))
    with pytest.raises(UsageError, match="of this very folder, which would be replaced"):
        preflight.check_begin(here, run.info)
