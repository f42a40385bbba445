"""The merged pipeline: whole, readable, and never in place of what the user put there."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import tiny_flags
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from written_students import write_student

import train_distillation
from wan_distill.errors import ExportError, UsageError
from wan_distill.layout import RunFolder
from wan_distill.model.student_files import load_student
from wan_distill.results import merged
from wan_distill.results.export import export_student
from wan_distill.results.merged import check_output, copy_part, probe, save_merged
from wan_distill.results.readme import readme
from wan_distill.system.files import lock_file


@pytest.fixture
def exported(make_run):
    """Makes a run whose LoRAs lie in its folder and are exported with the merged pipeline."""

    def make(**changes):
        run = make_run(**dict(method="trajectory", lora_alpha=4.0, save_merged=True) | changes)
        write_student(run, *run.config.experts)
        export_student(run)
        return run

    return make


def test_the_merged_pipeline_is_the_teacher_with_the_student_in_it(exported, random_teacher):
    run = exported()
    for expert, part in (("high", "transformer"), ("low", "transformer_2")):
        merged = WanTransformer3DModel.from_pretrained(run.folder.merged, subfolder=part)
        plain = run.teacher.load_expert(expert)
        assert not torch.equal(probe(merged), probe(plain))
        load_student(plain, run.folder.lora(expert))
        torch.testing.assert_close(probe(merged), probe(plain), rtol=0, atol=1e-5)
    index = json.loads((run.folder.merged / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "FlowMapEulerDiscreteScheduler"]
    for part in ("text_encoder", "vae", "tokenizer"):
        for file in (random_teacher / part).iterdir():
            assert (run.folder.merged / part / file.name).read_bytes() == file.read_bytes()


def test_a_merged_pipeline_that_differs_is_refused_and_the_one_before_stays(
    exported, monkeypatch, capsys
):
    run = exported()
    assert "student/transformer_2: loaded back; differs" in capsys.readouterr().out
    before = (run.folder.merged / "model_index.json").stat().st_mtime_ns
    real = WanTransformer3DModel.save_pretrained

    def forgetful(self, folder, **more):
        real(self, folder, **more)
        file = folder / "diffusion_pytorch_model.safetensors"
        weights = load_file(file)
        weights["proj_out.weight"] = torch.randn_like(weights["proj_out.weight"])
        save_file(weights, file, {"format": "pt"})

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", forgetful)
    with pytest.raises(ExportError, match="do not use it"):
        save_merged(run)
    assert (run.folder.merged / "model_index.json").stat().st_mtime_ns == before


def test_a_student_of_a_quantised_base_is_merged_into_the_files_own_weights(exported):
    run = exported(base_precision="nf4", mixed_precision="bf16")
    merged = WanTransformer3DModel.from_pretrained(run.folder.merged, subfolder="transformer")
    original = run.teacher.load_expert("high", exact=True)
    untouched = "patch_embedding.weight"
    assert torch.equal(
        merged.state_dict()[untouched].float(), original.state_dict()[untouched].float()
    )


# ------------------------------------------------------------------------------------ what is copie


def test_a_teacher_that_may_not_be_written_to_is_no_obstacle(exported, random_teacher, tmp_path):
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    for path in [*teacher.rglob("*"), teacher]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        run = exported(teacher_path=str(teacher))
    finally:
        for path in [teacher, *teacher.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)
    for path in run.folder.merged.rglob("*"):
        assert path.stat().st_mode & stat.S_IWUSR, path
    save_merged(run)  # and it can be replaced


def test_what_is_no_part_of_the_pipeline_is_not_copied(exported, random_teacher, tmp_path):
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    (teacher / "huge").mkdir()
    (teacher / "huge" / "other.safetensors").write_bytes(b"x")
    (teacher / "notes.md").write_text("mine")
    (teacher / "vae" / ".DS_Store").write_bytes(b"Bud1")
    (teacher / "vae" / ".ipynb_checkpoints").mkdir()
    vae = teacher / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copy(vae, vae.with_suffix(".old.safetensors"))
    run = exported(teacher_path=str(teacher))
    parts = ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer"]
    names = sorted(entry.name for entry in run.folder.merged.iterdir())
    assert names == [*parts, "transformer_2", "vae"]
    names = sorted(entry.name for entry in (run.folder.merged / "vae").iterdir())
    assert names == ["config.json", vae.name]


def test_a_variant_is_merged_into_a_pipeline_that_loads_without_it(
    exported, random_teacher, tmp_path
):
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    for file in teacher.rglob("*.safetensors"):
        tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file.with_suffix(".ema.safetensors"), {"format": "pt"})
    run = exported(teacher_path=str(teacher), variant="ema")
    pipe = WanPipeline.from_pretrained(run.folder.merged)
    ours = load_file(teacher / "vae" / "diffusion_pytorch_model.ema.safetensors")
    assert all(torch.equal(pipe.vae.state_dict()[name], value) for name, value in ours.items())


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("old_names", [False, True])
def test_shards_are_copied_with_their_index(random_teacher, tmp_path, variant, old_names):
    folder = shutil.copytree(random_teacher / "transformer", tmp_path / "part")
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    weight_map, middle = {}, f".{variant}" if variant else ""
    for i in (1, 2):
        number = f"-0000{i}-of-00002"
        name = f"{whole.stem}{number}{middle}" if old_names else f"{whole.stem}{middle}{number}"
        part = {key: tensors[key] for key in sorted(tensors)[i - 1 :: 2]}
        save_file(part, folder / f"{name}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(part, f"{name}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / f"{whole.name}.index{middle}.json").write_text(json.dumps(index))
    (folder / f"{whole.name}.index.other.json").write_text(json.dumps({"weight_map": {}}))
    copy_part(folder, tmp_path / "copy", variant)
    copied = WanTransformer3DModel.from_pretrained(tmp_path / "copy").state_dict()
    assert all(torch.equal(copied[name], tensor) for name, tensor in tensors.items())
    names = {file.name for file in (tmp_path / "copy").iterdir()}
    assert len(names) == 4 and not any("fp16" in name or "other" in name for name in names)


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_pipeline_that_would_lack_a_part_is_not_written(exported, random_teacher, tmp_path, part):
    teacher = shutil.copytree(random_teacher, tmp_path / "teacher")
    run = exported(teacher_path=str(teacher))
    shutil.rmtree(run.folder.merged)
    for file in (teacher / part).glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ExportError, match=f"--save_merged: .*{part}: no weight file"):
        save_merged(run)
    assert not run.folder.merged.exists()


# -------------------------------------------------------------------- the user's, and full disks


@pytest.mark.parametrize("change", ["a new file", "another file", "a folder of his own", "no note"])
def test_what_the_user_put_there_is_never_replaced(exported, change):
    run = exported()
    folder = run.folder.merged
    check_output(run.config)
    save_merged(run)
    if change == "a new file":
        (folder / "notes.txt").write_text("mine")
    elif change == "another file":
        (folder / "vae" / "config.json").write_text("{}")
    elif change == "a folder of his own":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "thesis.tex").write_text("mine")
    else:
        run.folder.merged_note.unlink()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match=r"student/ there was changed since.*--no-save_merged"):
        check_output(run.config)
    with pytest.raises(ExportError, match="was changed since"):
        save_merged(run)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_copy_whose_times_are_others_is_still_ours(exported):
    run = exported()
    config, weights = (
        run.folder.merged / name
        for name in ("vae/config.json", "transformer/diffusion_pytorch_model.safetensors")
    )
    for file in run.folder.merged.rglob("*"):
        os.utime(file, (1000, 1000))
    check_output(run.config)
    save_merged(run)
    for file in (config, weights):
        content = file.read_bytes()
        file.write_bytes(content[:-8] + content[-8:][::-1])  # as long as before
        with pytest.raises(UsageError, match="student/ there was changed since"):
            check_output(run.config)
        file.write_bytes(content)
        check_output(run.config)


def test_a_run_does_not_begin_where_it_would_overwrite(random_teacher, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("# My project")
    flags = tiny_flags(random_teacher, out, method="trajectory")
    assert train_distillation.main(flags) == 2
    assert "README.md that this tool did not write" in capsys.readouterr().err
    (out / "README.md").unlink()
    with lock_file(RunFolder(out).lock, True):
        assert train_distillation.main(flags) == 2
    assert "another run is writing into it" in capsys.readouterr().err
    assert [entry.name for entry in out.iterdir()] == [".lock"]


def test_a_readme_of_the_users_is_not_replaced(make_run):
    run = make_run(method="trajectory", save_merged=False)
    run.folder.readme.parent.mkdir(parents=True, exist_ok=True)
    for text in ("# My project", "Notes on models distilled to few steps"):
        run.folder.readme.write_text(text)
        with pytest.raises(UsageError, match=r"README\.md that this tool did not write"):
            check_output(run.config)
    run.folder.readme.write_text(readme(run.folder.path, run.config, run.info, None))
    check_output(run.config)


def states(folder: Path) -> dict[str, list[int]]:
    return {name: merged._state(file) for name, file in merged._files(folder).items()}


def test_a_disk_that_fills_leaves_the_earlier_pipeline_and_no_half_one(exported, monkeypatch):
    run = exported()
    before = states(run.folder.merged)

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")

    monkeypatch.setattr(WanTransformer3DModel, "save_pretrained", full)
    with pytest.raises(OSError) as error:
        save_merged(run)
    assert error.value.errno == errno.ENOSPC and error.value.filename
    assert states(run.folder.merged) == before
    assert not list(run.folder.path.glob(".student.p*"))


@pytest.mark.journey  # together as long as a whole run
@pytest.mark.parametrize("survived", range(6))
def test_a_kill_while_it_is_put_in_place_leaves_none_or_a_whole_one(
    exported, monkeypatch, survived
):
    """Each call that renames or deletes is once the last one."""

    class Killed(BaseException):
        pass

    run, calls, remove = exported(), [], shutil.rmtree
    whole = set(merged._files(run.folder.merged))

    def dying(real):
        def call(*args, **kwargs):
            if len(calls) == survived:
                if real is remove:  # it was in the middle of that
                    next(f for f in sorted(Path(args[0]).rglob("*")) if f.is_file()).unlink()
                raise Killed
            calls.append(1)
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", dying(Path.replace))
        patch.setattr(os, "replace", dying(os.replace))
        patch.setattr(shutil, "rmtree", dying(shutil.rmtree))
        with contextlib.suppress(Killed):
            save_merged(run)
    if run.folder.merged.exists():
        assert set(merged._files(run.folder.merged)) == whole
    save_merged(run)
    assert set(merged._files(run.folder.merged)) == whole
    assert not list(run.folder.path.glob(".student.[pe]*"))
