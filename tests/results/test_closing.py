"""The last lines of a run."""

from __future__ import annotations

from wan_distill.layout import LORA_FILE
from wan_distill.results.closing import closing
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher


def test_they_name_the_files_the_next_command_and_what_may_be_deleted(tmp_path):
    out = tmp_path / "my student"
    (out / "prompts").mkdir(parents=True)
    (out / "prompts" / "0a.safetensors").write_bytes(b"x" * 3000)
    (out / "high" / "checkpoint-2").mkdir(parents=True)
    (out / "high" / "checkpoint-2" / "student.safetensors").write_bytes(b"x" * 7000)
    for name in LORA_FILE.values():
        (out / name).write_bytes(b"x")
    config = Config(output_dir=str(out))
    text = "\n".join(closing(config, read_teacher(config), 'a "red" circle'))
    assert f"Done: {out}" in text
    for name in ("report.html", "README.md", " and ".join(LORA_FILE.values())):
        assert name in text
    command = f'Next: python sample.py --student "{out}" --prompt "a \\"red\\" circle"'
    assert command in text
    assert "3 KB of caches (the same command with --clean), 7 KB of checkpoints" in text
