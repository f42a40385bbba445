"""The last lines of a run."""

from __future__ import annotations

import os
import subprocess

import pytest

from wan_distill.layout import LORA_FILE, RunFolder
from wan_distill.results.closing import closing, outdated, quoted
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher


def test_they_name_the_files_the_next_command_and_what_may_be_deleted(tmp_path):
    out = tmp_path / "my student"
    (out / "prompts").mkdir(parents=True)
    (out / "prompts" / ("0a" * 16 + ".safetensors")).write_bytes(b"x" * 3000)
    (out / "high" / "checkpoint-2").mkdir(parents=True)
    (out / "high" / "checkpoint-2" / "student.safetensors").write_bytes(b"x" * 7000)
    for name in LORA_FILE.values():
        (out / name).write_bytes(b"x")
    config = Config(output_dir=str(out))
    prompt = 'a "red" circle'
    text = "\n".join(closing(config, read_teacher(config), prompt))
    assert f"Done: {out}" in text
    for name in ("report.html", "README.md", " and ".join(LORA_FILE.values())):
        assert name in text
    command = f"Next: python sample.py --student {quoted(str(out))} --prompt {quoted(prompt)}"
    assert command in text
    assert "3 KB of caches (the same command with --clean), 7 KB of checkpoints" in text
    assert "older" not in text


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("argument", ["out", "fünf n", "run(1)$x", 'it\'s "$5" `now`!', "a\\b"])
def test_the_next_command_can_be_pasted(argument):
    said = subprocess.run(["sh", "-c", f"printf %s {quoted(argument)}"], capture_output=True)
    assert said.stdout.decode() == argument


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("student/model_index.json", "--save_merged"),
        ("comfyui/high_noise_bf16.safetensors", "--export comfyui"),
        ("comfyui/low_noise_fp8_scaled.safetensors", "--export comfyui-fp8"),
    ],
)
def test_an_export_of_an_earlier_student_is_named(tmp_path, name, flag):
    export = tmp_path / name
    export.parent.mkdir()
    export.write_bytes(b"x")
    for file in LORA_FILE.values():
        (tmp_path / file).write_bytes(b"x")
        os.utime(tmp_path / file, (1000, 1000))
    os.utime(export, (2000, 2000))
    assert outdated(RunFolder(tmp_path)) == []
    os.utime(tmp_path / LORA_FILE["low"], (3000, 3000))  # one expert is trained on
    (line,) = outdated(RunFolder(tmp_path))
    place = f"{export.parent.name}/"
    assert line.split(maxsplit=1) == [
        place,
        f"is older and may hold an earlier student: {flag} writes it anew",
    ]
