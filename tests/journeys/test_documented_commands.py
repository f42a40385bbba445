"""The commands in code blocks of the documents run, with a small student in place of the reader's.

Left out are those that end in a comment `# needs ...` (a GPU, several of them), and those of
developers, which `.ci/run` makes.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY

import convert_lora
import sample
import test_umt5_weights
import train_distillation
from wan_distill.layout import LORA_FILE
from wan_distill.settings.assets import EMBEDDED_TEACHER

sys.path.insert(0, str(REPOSITORY / "tests" / "planning"))
from header_only import write_a14b

pytestmark = pytest.mark.long  # .ci/run makes them
SCRIPTS = {
    "train_distillation.py": train_distillation,
    "sample.py": sample,
    "test_umt5_weights.py": test_umt5_weights,
    "convert_lora.py": convert_lora,
}
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
SMALL = [
    "--max_train_steps=2",
    "--num_trajectories=8",
    "--refine_steps=1",
    "--critic_warmup_steps=1",
    "--eval_samples=8",
    "--monitor_samples=4",
    "--teacher_steps=6",
    "--solver_steps=4",
    "--no-save_merged",
]
HUB = "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
OF_GPUS = ("torchrun", "accelerate", "srun")


def code_lines(text: str) -> Iterator[str]:
    """The lines of code blocks, fenced or indented."""
    fenced = cluster = False
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            fenced, cluster = not fenced, False
        elif line.startswith("#SBATCH"):
            cluster = True  # a job for Slurm
        elif cluster:
            continue
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands() -> list[tuple[str, str]]:
    """(document that names it first, command) of everything that is to be run."""
    found: dict[str, str] = {}
    for document in DOCUMENTS:
        for line in code_lines(document.read_text(encoding="utf-8")):
            command, _, comment = line.partition("  #")
            if comment.strip().startswith("needs "):
                continue
            for part in command.split(" && "):
                program, *words = part.split() or [""]
                assert program not in OF_GPUS, f"{document.name}: mark it `# needs ...`: {line}"
                if program == "python" and words == ["train_distillation.py"]:
                    continue  # tests/journeys/test_main_job.py makes it
                if program == "python" and words[0] in SCRIPTS:
                    found.setdefault(part.strip(), document.name)
                elif program == "python" and words[0].endswith(".py"):
                    assert (REPOSITORY / words[0]).is_file(), line
    return [(document, command) for command, document in found.items()]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: a student, prompts, settings, teachers."""
    folder = tmp_path_factory.mktemp("desk")
    assert train_distillation.main([*SMALL, f"--output_dir={folder / 'student'}"]) == 0
    for name in LORA_FILE.values():
        shutil.copy(folder / "student" / name, folder)
    (folder / "my_prompts.txt").write_text("a red fox\na blue bird\na cat\n")
    (folder / "run.yaml").write_text(
        "sampling_steps: [2, 4]\nmixed_precision: no\nevaluate: false\n"
    )
    shutil.copytree(EMBEDDED_TEACHER, folder / "my_copy")
    a14b = write_a14b(folder / "a14b")
    shutil.copytree(REPOSITORY / "recipes", folder / "recipes")
    for recipe in (folder / "recipes").glob("a14b*.yaml"):
        recipe.write_text(recipe.read_text(encoding="utf-8").replace(HUB, str(a14b)))
    return folder


def prepared(command: str, desk: Path) -> list[str]:
    """Its arguments, with the small student, the embedded teacher and small settings."""
    _, script, *given = shlex.split(command)
    teacher = desk / "a14b" if script == "train_distillation.py" else EMBEDDED_TEACHER
    names = {HUB: str(teacher), "YOUR_PIPELINE": str(EMBEDDED_TEACHER)}
    given = [names.get(word, word) for word in given]
    given = [re.sub(r"^outputs/\S+$", str(desk / "student"), word) for word in given]
    if script == "train_distillation.py" and not {"--dry_run", "--clean"} & set(given):
        given += SMALL
    if "--clean" in given:
        given.append(f"--output_dir={desk / 'student'}")
    return given


@pytest.mark.parametrize(("document", "command"), commands())
def test_it_runs(document, command, desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    script = SCRIPTS[command.split()[1]]
    planned = "--dry_run" in command and ("a14b" in command or HUB in command)
    code = script.main(prepared(command, desk))
    said = capsys.readouterr()
    if planned:  # this machine may be too small for it, which the plan says at its end
        assert code in (0, 2) and "Time      about" in said.out, said.err
    else:
        assert code == 0, said.err


def test_there_are_such_commands_in_many_documents():
    assert len({document for document, _ in commands()}) >= 5
    assert {command.split()[1] for _, command in commands()} == set(SCRIPTS)
