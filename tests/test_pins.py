"""What must not move when code does: names of caches, `--help`, and the files and tensors that a
tiny run leaves.

To record anew after a wanted change: delete the file in tests/recorded, run the test twice, look at
the difference.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY, SMALL
from safetensors import safe_open

import train_distillation
from wan_distill.data.embeddings import PromptBank
from wan_distill.data.run import Sources
from wan_distill.data.samples import anchors, handovers, trajectories
from wan_distill.model.loading import Teacher
from wan_distill.results.evaluation import Evaluation, samplers
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.checks import resolve
from wan_distill.settings.command_line import build_parser
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime

RECORDED = Path(__file__).parent / "recorded"


def compare(name: str, found) -> None:
    """`found` equals what tests/recorded/<name> holds; where there is no such file, it is written
    and the test fails.
    """
    file, text = RECORDED / name, json.dumps(found, indent=1) + "\n"
    if not file.exists():
        file.write_text(text, encoding="utf-8")
        pytest.fail(f"recorded {name}: look at it, run again, and commit it")
    assert json.loads(text) == json.loads(file.read_text(encoding="utf-8"))


def test_the_names_of_cached_samples(tmp_path):
    config = Config(output_dir=str(tmp_path), num_trajectories=4)
    config = resolve(config, read_teacher(config))
    runtime = Runtime(config)
    bank = PromptBank(
        tmp_path / "prompts",
        dict(encoder="of this test", length=16, dtype="no"),
        16,
        torch.device("cpu"),
    )
    sources = Sources(
        config,
        Teacher(read_teacher(config), config, runtime),
        bank,
        ["a red ball", "a blue box"],
        torch.zeros(1),
        runtime,
    )
    made = [
        kind(config, sources.teacher, bank, sources.prompts, runtime)
        for kind in (trajectories, anchors)
    ]
    student = tmp_path / "high_noise_lora.safetensors"
    student.write_bytes(b"a student")
    made.append(handovers(config, sources.teacher, bank, sources.prompts, runtime, steps=4))
    evaluation = Evaluation(config, sources.teacher, bank, sources.prompts, runtime)
    compare(
        "cache_names.json",
        {samples.folder.parent.name: samples.folder.name for samples in made}
        | {row.name: evaluation._cache_file(row).stem for row in samplers(config)},
    )


def test_help_is_the_one_in_the_docs():
    file = REPOSITORY / "docs" / "help.txt"
    assert build_parser().format_help() == file.read_text(encoding="utf-8"), (
        "python train_distillation.py --help > docs/help.txt"
    )


def test_the_files_and_tensors_that_a_run_leaves(random_teacher, tmp_path):
    flags = SMALL | dict(
        teacher_path=random_teacher,
        prompts=EMBEDDED_TEACHER / "prompts.txt",
        method="dmd",
        output_dir=tmp_path / "out",
        validation_steps=1,
        monitor_steps=1,
        monitor_samples=4,
        critic_warmup_steps=1,
        critic_updates=1,
        validation_prompt="a cat",
    )
    argv = [f"--{k}={v}" for k, v in flags.items()] + ["--save_merged", "--evaluate"]
    assert train_distillation.main(argv) == 0
    left = {}
    for file in sorted((tmp_path / "out").rglob("*")):
        if file.is_file():
            # Digests depend on the bytes of configurations that diffusers writes, so on its
            # version.
            name = re.sub(
                r"\b[0-9a-f]{16,64}\b", "DIGEST", file.relative_to(tmp_path / "out").as_posix()
            )
            left[name] = None
            if file.suffix == ".safetensors" and not name.startswith(("prompts/", "student/")):
                with safe_open(file, framework="pt") as tensors:
                    left[name] = {
                        key: tensors.get_slice(key).get_shape() for key in sorted(tensors.keys())
                    }
    compare("files.json", left)
