"""LoRAs from one layout into another, by the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign_loras import write_in
from random_teachers import random_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from written_students import write_student

import convert_lora
from wan_distill.lora.files import LoraFile
from wan_distill.model.expert_weights import ExpertWeights
from wan_distill.settings.lora_headers import LoraHeader


@pytest.fixture
def student(make_run, tmp_path: Path) -> Path:
    run = make_run(method="trajectory", lora_alpha=2.0, output_dir=str(tmp_path / "run"))
    write_student(run, "high")
    return run.folder.lora("high")


def convert(*arguments: object) -> int:
    return convert_lora.main([str(argument) for argument in arguments])


def assert_same(file: Path, other: Path) -> None:
    a, b = (LoraFile(LoraHeader(path, "--flag")) for path in (file, other))
    assert a.header.layers.keys() == b.header.layers.keys()
    for module in a.header.layers:
        layer, again = a.read(module), b.read(module)
        shape = torch.Size((layer.up.shape[0], layer.down.shape[1]))
        torch.testing.assert_close(again.change(shape), layer.change(shape))


@pytest.mark.parametrize("layout", ["diffusers", "kohya", "comfyui"])
def test_there_and_back(student, tmp_path, capsys, layout):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert convert(student, there, "--to", layout) == 0
    assert f"14 layers, comfyui -> {layout}" in capsys.readouterr().out
    assert LoraHeader(there, "--flag").layout == layout
    assert_same(student, there)
    with safe_open(there, framework="pt") as file:
        assert "wan_distill" in file.metadata()
    assert convert(there, back) == 0
    assert_same(student, back)
    if layout != "diffusers":  # there alpha is multiplied in
        assert load_file(back).keys() == load_file(student).keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2])
def test_every_float_that_a_lora_may_be_stored_as_is_written(student, tmp_path, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in load_file(student).items()}
    save_file(stored, tmp_path / "in.safetensors")
    assert convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors") == 0
    assert_same(tmp_path / "in.safetensors", tmp_path / "out.safetensors")


@pytest.mark.parametrize(
    "flags", [("--rank=8",), ("--dtype=bf16",), ("--expert=high", "--extract", "a", "b")]
)
def test_a_flag_that_would_do_nothing_is_refused(student, tmp_path, capsys, flags):
    files = [tmp_path / "out.safetensors"] if "--extract" in flags else [student, tmp_path / "o.s"]
    files = [files[0], files[-1].with_suffix(".safetensors")][-1 if "--extract" in flags else 0 :]
    assert convert(*files, *flags) == 2
    assert f"{flags[0].replace('=', ' ')}: does nothing with" in capsys.readouterr().err


def test_what_a_layout_has_no_place_for_is_said(student, tmp_path, capsys):
    theirs = write_in("lightning with extras", student, tmp_path / "theirs.safetensors")
    assert convert(theirs, tmp_path / "out.safetensors", "--to", "diffusers") == 0
    assert "left out, since it has no place for them: 2" in capsys.readouterr().out
    assert convert(theirs, tmp_path / "kept.safetensors", "--to", "kohya") == 0
    assert "left out" not in capsys.readouterr().out
    assert "lora_unet_blocks_0_norm3.diff" in load_file(tmp_path / "kept.safetensors")


def test_one_expert_of_two_is_chosen(student, tmp_path, capsys):
    theirs = load_file(write_in("diffusers", student, tmp_path / "one.safetensors"))
    second = {n.replace("transformer.", "transformer_2.", 1): 2 * t for n, t in theirs.items()}
    both = tmp_path / "both.safetensors"
    save_file(theirs | second, both)
    out = tmp_path / "out.safetensors"
    assert convert(both, out) == 2
    assert "holds LoRAs of both experts; give --expert high or low" in capsys.readouterr().err
    assert convert(both, out, "--expert", "high") == 0
    assert_same(student, out)


@pytest.mark.parametrize("layout", ["comfyui", "diffusers", "kohya"])
def test_the_difference_of_two_experts_is_a_lora(tmp_path, capsys, layout):
    base, tuned = random_transformer(1), random_transformer(1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in tuned.named_parameters():
            if name.endswith("to_q.weight"):
                a, b = torch.randn(2, 24, generator=rng), torch.randn(24, 2, generator=rng)
                tensor += b @ a
        tuned.proj_out.bias += 1
    base.save_pretrained(tmp_path / "base")
    save_file(tuned.state_dict(), tmp_path / "tuned.safetensors")
    out = tmp_path / "out.safetensors"
    paths = (tmp_path / "base", tmp_path / "tuned.safetensors")
    flags = ("--rank", 2, "--dtype", "float32", "--to", layout)
    assert convert(out, "--extract", *paths, *flags) == 0
    said = capsys.readouterr().out
    assert "rank 2; relative error" in said and float(said.split("error ")[1].split(";")[0]) < 1e-3
    assert "left out, since no LoRA holds them: 1 tensors (proj_out.bias" in said
    lora = LoraFile(LoraHeader(out, "--flag"))
    assert lora.header.layers.keys() == {"blocks.0.attn1.to_q", "blocks.0.attn2.to_q"}
    before, after = ExpertWeights([paths[0] / "diffusion_pytorch_model.safetensors"]), tuned
    for module in lora.header.layers:
        name = f"{module}.weight"
        change = after.state_dict()[name] - before[name]
        torch.testing.assert_close(
            lora.read(module).change(change.shape), change, rtol=0, atol=1e-4
        )


def test_bad_input_is_one_line(student, tmp_path, capsys, monkeypatch):
    def refusal(*arguments: object) -> str:
        assert convert(*arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    out = tmp_path / "out.safetensors"
    assert "give IN and OUT" in refusal(student)
    assert "give OUT alone" in refusal(student, out, "--extract", "a", "b")
    assert "exists already" in refusal(student, student)
    assert "ends in .safetensors" in refusal(student, tmp_path / "out.pt")
    assert "there is no such file" in refusal(tmp_path / "gone.safetensors", out)
    assert "--rank 0: must be greater" in refusal(out, "--extract", "a", "b", "--rank", 0)
    assert "--extract" in refusal(out, "--extract", tmp_path, tmp_path)
    base, other = tmp_path / "base.safetensors", tmp_path / "other.safetensors"
    save_file(random_transformer(1).state_dict(), base)
    save_file(random_transformer(1, channels=48).state_dict(), other)
    assert "not of the same model" in refusal(out, "--extract", base, other)
    assert "differs from" in refusal(out, "--extract", base, base)
    assert "is a LoRA; give a whole expert" in refusal(out, "--extract", student, student)
    assert "is for the high one" in refusal(student, out, "--expert", "low")
    (tmp_path / "model_index.json").touch()
    assert "is a pipeline; give its" in refusal(out, "--extract", tmp_path, tmp_path)
    broken = tmp_path / "broken.safetensors"
    save_file({name: tensor + torch.nan for name, tensor in load_file(student).items()}, broken)
    assert "values that are no numbers" in refusal(broken, out)
    assert "--to gguf: is none of comfyui, " in refusal(student, out, "--to", "gguf")
    assert "error: FILE: give IN and OUT" in refusal()
    forbidden = tmp_path / "forbidden"
    forbidden.mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: path != forbidden)  # root may do all
    assert f"may not write into {forbidden}" in refusal(student, forbidden / "out.safetensors")
    assert not out.exists()


def test_damaged_files_and_the_home_folder(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert convert(student, "~/there.safetensors") == 0
    assert (tmp_path / "there.safetensors").is_file()
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\n")
    for given in ((pointer, "~/a.safetensors"), ("~/b.safetensors", "--extract", pointer, pointer)):
        assert convert(*given) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "git lfs pull" in said and said.count("\n") == 1

    def fail(*_, **__) -> None:
        raise PermissionError(13, "Permission denied", "some/file")

    monkeypatch.setattr(convert_lora, "LoraHeader", fail)
    assert convert(student, "~/c.safetensors") == 1
    assert "error: some/file: cannot be read (Permission denied)" in capsys.readouterr().err
