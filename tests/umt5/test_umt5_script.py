"""The script's verdict and exit code, and a training run on a broken text encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from random_teachers import write_pipeline
from safetensors.torch import load_file, save_file
from umt5_layouts import EMBED, SHARED, write_layout

import test_umt5_weights as script
import train_distillation
from wan_distill.model.loading import Teacher
from wan_distill.settings.assets import EMBEDDED
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime


@pytest.mark.parametrize(
    "name, code, verdict",
    [
        ("shared only", 0, "PASS"),
        ("poisoned embed", 0, "REPAIRED"),
        ("poisoned shared", 0, "REPAIRED"),
        ("both healthy but different", 1, "BROKEN"),
        ("neither", 1, "BROKEN"),
        ("sharded", 0, "PASS"),
    ],
)
def test_the_scripts_verdict_and_exit_code(tmp_path, capsys, name, code, verdict):
    folder = write_layout(name, tmp_path / "encoder")
    assert script.main(["--teacher_path", str(folder), "--json"]) == code
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict


def test_the_readable_verdict_says_what_was_compared(tmp_path, capsys):
    folder = write_layout("poisoned embed", tmp_path / "encoder")
    assert script.main(["--teacher_path", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "holds both, different" in printed and "are one parameter in memory" in printed
    assert "96 of 96 compared" in printed and "REPAIRED: " in printed and "--repair OUT" in printed
    assert "hides the tied-weight report: True" in printed
    assert "hides a report of another missing key: False" in printed


def test_the_script_writes_a_clean_copy_and_never_overwrites(tmp_path, capsys):
    source = write_layout("poisoned embed", tmp_path / "source")
    arguments = ["--teacher_path", str(source), "--repair", str(tmp_path / "clean")]
    assert script.main(arguments) == 0
    assert "loaded back and verified" in capsys.readouterr().out
    written = (tmp_path / "clean" / "model.safetensors").read_bytes()
    assert script.main(arguments) == 2
    assert "already exists" in capsys.readouterr().err
    assert (tmp_path / "clean" / "model.safetensors").read_bytes() == written


def test_the_script_checks_a_variant(tmp_path, capsys):
    folder = write_layout("shared only", tmp_path / "encoder")
    write_layout("poisoned embed", folder, variant="fp16")
    assert script.main(["--teacher_path", str(folder), "--variant", "fp16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "REPAIRED"
    assert script.main(["--teacher_path", str(folder), "--variant", "ema"]) == 2
    assert "without --variant or with --variant fp16" in capsys.readouterr().err


def test_the_script_refuses_pickles_without_permission(tmp_path, capsys):
    folder = str(write_layout(".bin", tmp_path / "encoder"))
    clean = tmp_path / "clean"
    assert script.main(["--teacher_path", folder]) == 2
    assert script.main(["--teacher_path", folder, "--repair", str(clean)]) == 2
    assert capsys.readouterr().err.count("--allow_pickle") == 2
    assert script.main(["--teacher_path", folder, "--allow_pickle"]) == 0
    assert script.main(["--teacher_path", folder, "--allow_pickle", "--repair", str(clean)]) == 0


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_script_knows_the_names_of_embedded_teachers(name, capsys):
    assert script.main(["--teacher_path", name]) == 0
    assert "PASS: the table in use is the file's" in capsys.readouterr().out


def test_the_script_checks_an_image_to_video_teacher(random_picture_teacher, capsys):
    """Its text encoder is the same."""
    code = script.main(["--teacher_path", str(random_picture_teacher)])
    assert (code, "rows       " in capsys.readouterr().out) == (0, True)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--teacher_path", "no such place"], "neither a folder"),
        (["--teacher_path", __file__], "is one file; give the folder"),
        (["--teacher_path="], "--teacher_path: is empty"),
        (["--nonsense"], "--nonsense: there is no such flag"),
        (["--vari", "x"], "--vari: there is no such flag"),
        (["--repair", f"{__file__}/out"], "cannot be written (Not a directory); choose another"),
    ],
)
def test_the_script_refuses_bad_arguments_in_one_line(flags, reason, capsys):
    assert script.main(flags) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and reason in said.err and said.err.count("\n") == 1
    assert not said.out


def test_the_script_finds_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    write_layout("shared only", tmp_path / "encoder")
    assert script.main(["--teacher_path=~/encoder", "--repair=~/clean"]) == 0
    assert (tmp_path / "clean" / "model.safetensors").is_file()


def test_the_script_checks_the_tokenizer_too(random_teacher, tmp_path, capsys):
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    for source in (folder, folder / "text_encoder"):
        assert script.main(["--teacher_path", str(source)]) == 0
        assert "tokenizer  433 entries; embeddings of two unlike" in capsys.readouterr().out
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").unlink()
    for source in (folder, folder / "text_encoder"):
        assert script.main(["--teacher_path", str(source), "--json"]) == 1
        verdict = json.loads(capsys.readouterr().out)
        assert verdict["verdict"] == "BROKEN" and "holds no vocabulary" in verdict["reason"]
        assert "tokenizer's files" in verdict["remedy"]
    shutil.rmtree(folder / "tokenizer")
    assert script.main(["--teacher_path", str(folder)]) == 1
    assert "BROKEN: " in capsys.readouterr().out
    assert script.main(["--teacher_path", str(folder / "text_encoder")]) == 0  # it lies alone
    assert "not checked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(vocab_size=500), "do not fit its config.json"),
        (dict(d_model=16), "do not fit its config.json"),
        (dict(d_ff="wide"), "do not fit its config.json"),
        (dict(num_layers=3), "the file lacks 10 tensors, encoder.block.2"),
    ],
)
def test_a_configuration_of_another_encoder_is_no_traceback(changes, reason, tmp_path, capsys):
    folder = write_layout("shared only", tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert script.main(["--teacher_path", str(folder), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["verdict"] == "BROKEN" and reason in verdict["reason"]


def test_a_wrapped_encoder_is_named_as_such(tmp_path, capsys):
    folder = write_layout("shared only", tmp_path / "encoder")
    (file,) = folder.glob("*.safetensors")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(wrapped, file, {"format": "pt"})
    assert script.main(["--teacher_path", str(folder)]) == 1
    assert "names of a compiled model (_orig_mod.)" in capsys.readouterr().out


def test_a_file_that_cannot_be_read_is_no_traceback(tmp_path, monkeypatch, capsys):
    def fail(*_, **__) -> None:
        raise OSError(5, "Input/output error", "some/file")

    monkeypatch.setattr(script, "locate", fail)
    assert script.main([]) == 2
    assert "error: some/file: cannot be read (Input/output error)" in capsys.readouterr().err


@pytest.mark.parametrize("content", ['{"metadata": {}}', "[]", "{"])
def test_the_script_refuses_an_index_that_is_none(tmp_path, capsys, content):
    folder = write_layout("sharded", tmp_path / "encoder")
    (folder / "model.safetensors.index.json").write_text(content)
    assert script.main(["--teacher_path", str(folder)]) == 2
    assert "model.safetensors.index.json" in capsys.readouterr().err


# --------------------------------------------------------------------------- in the training script


def poisoned_pipeline(
    folder: Path, second_table: Callable[[torch.Tensor], torch.Tensor]
) -> list[str]:
    """Arguments of a one-update run on a pipeline whose file holds a second table beside the true
    one.
    """
    file = write_pipeline(folder / "teacher") / "text_encoder" / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {EMBED: second_table(weights[SHARED])}, file, {"format": "pt"})
    (folder / "prompts.txt").write_text("a red ball\na blue ball\n")
    flags = {k: v for k, v in SMALL.items() if k not in ("negative_prompt", "mixed_precision")}
    return [
        f"--teacher_path={folder / 'teacher'}",
        f"--prompts={folder / 'prompts.txt'}",
        f"--output_dir={folder / 'out'}",
        "--method=trajectory",
        "--negative_prompt=",
        "--mixed_precision=no",
        *(f"--{name}={value}" for name, value in flags.items()),
    ]


@pytest.mark.journey  # as long as a whole run
def test_training_on_a_poisoned_teacher_repairs_it_and_says_so(tmp_path, capsys):
    arguments = poisoned_pipeline(tmp_path, lambda table: torch.full_like(table, float("nan")))
    assert train_distillation.main(arguments) == 0
    said = capsys.readouterr().out
    assert "UMT5 has one token table under two names" in said and "Repaired in memory" in said
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["text_encoder"]
    assert recorded["verdict"] == "REPAIRED" and recorded["fingerprint"] and recorded["tokenizer"]


def test_training_on_an_undecidable_teacher_is_refused_before_anything_is_trained(tmp_path, capsys):
    arguments = poisoned_pipeline(tmp_path, lambda table: table.flip(0).contiguous())
    assert train_distillation.main(arguments) == 2
    assert "both look healthy" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_stored_embeddings_are_of_this_encoder_and_this_tokenizer(
    random_teacher, small_config, tmp_path
):
    """Each change makes new ones, in the same output folder; nothing else does."""
    folder = shutil.copytree(random_teacher, tmp_path / "teacher")
    config = small_config(teacher_path=str(folder))
    stored = Path(config.output_dir) / "prompts"

    def encode(**changes: object) -> int:
        changed = dataclasses.replace(config, **changes)
        runtime = Runtime(changed)
        teacher = Teacher(read_teacher(changed), changed, runtime)
        train_distillation.encode_prompts(changed, teacher, ["a red ball", ""], runtime)
        return len(list(stored.glob("*.safetensors")))

    assert encode() == 2
    (folder / "tokenizer" / ".DS_Store").write_bytes(b"Bud1")
    assert encode(seed=7) == 2
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 99}))
    assert encode() == 4
    file = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    save_file(tensors | {name: 1.5 * tensors[name]}, file, {"format": "pt"})
    assert encode() == 6
    assert encode(max_sequence_length=10) == 8
    assert encode(mixed_precision="bf16") == 10
