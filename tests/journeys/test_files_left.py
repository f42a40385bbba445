"""The files, and the tensors in them, that a tiny run leaves behind."""

from __future__ import annotations

import re

from conftest import compare_recorded, tiny_flags
from safetensors import safe_open

import train_distillation


def test_the_files_and_tensors_that_a_run_leaves(random_teacher, tmp_path):
    out = tmp_path / "out"
    flags = tiny_flags(
        random_teacher,
        out,
        method="dmd",
        validation_steps=5,  # at the start and at the end
        monitor_steps=1,
        monitor_samples=4,
        validation_prompt="a cat",
        save_merged=True,
        evaluate=True,
        eval_samples=4,  # all are shown, so none is chosen by its distance
    )
    assert train_distillation.main(flags) == 0
    left = {}
    for file in sorted(out.rglob("*")):
        if not file.is_file():
            continue
        # Digests depend on the bytes of configurations that diffusers writes, so on its version.
        name = re.sub(r"\b[0-9a-f]{16,64}\b", "DIGEST", file.relative_to(out).as_posix())
        left[name] = None
        if file.suffix == ".safetensors" and not name.startswith(("prompts/", "student/")):
            with safe_open(file, framework="pt") as tensors:
                names = sorted(tensors.keys())
                left[name] = {key: tensors.get_slice(key).get_shape() for key in names}
    compare_recorded("files.json", left)
