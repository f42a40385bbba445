"""docs/try_it.ipynb runs from top to bottom on a CPU, with a small student."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.long  # .ci/run makes them
NOTEBOOK = REPOSITORY / "docs" / "try_it.ipynb"
FLAGS = 'flags = "--output_dir outputs/try_it"'
SMALL = (
    "--max_train_steps 2 --num_trajectories 8 --refine_steps 1 --critic_warmup_steps 1 "
    "--eval_samples 8 --monitor_samples 4 --teacher_steps 6 --solver_steps 4 --no-save_merged"
)


def cells() -> list[str]:
    """The code of the notebook."""
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    for cell in content["cells"]:
        assert cell["cell_type"] == "markdown" or not cell["outputs"]  # pictures of another run
    return ["".join(c["source"]) for c in content["cells"] if c["cell_type"] == "code"]


def shell(line: str) -> None:
    """A line that begins with `!`."""
    words = line.replace("pip ", f"{sys.executable} -m pip ", 1) if line[:4] == "pip " else line
    words = words.replace("python ", f"{sys.executable} ", 1) if words[:7] == "python " else words
    ended = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{line}\n{ended.stdout[-1000:]}{ended.stderr[-2000:]}"


def execute(code: str, names: dict[str, object]) -> None:
    """A cell, as Jupyter does: commands of the shell stand in lines of their own."""
    pending: list[str] = []
    for line in [*code.splitlines(), "!"]:
        if not line.startswith("!"):
            pending.append(line)
            continue
        exec("\n".join(pending), names)
        pending = []
        if line != "!":
            shell(line[1:].format(**names))


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    shown: list[object] = []
    display = types.ModuleType("IPython.display")
    display.Image = lambda file: Path(file).read_bytes()  # type: ignore[attr-defined]
    display.Video = lambda file, **_: Path(file).read_bytes()  # type: ignore[attr-defined]
    display.display = shown.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    copy = tmp_path / "repository"
    (copy / "docs").mkdir(parents=True)
    for file in (*REPOSITORY.glob("*.py"), REPOSITORY / "requirements.txt"):
        shutil.copy(file, copy)
    for folder in ("wan_distill", "assets"):
        shutil.copytree(REPOSITORY / folder, copy / folder)
    monkeypatch.chdir(copy / "docs")  # where Jupyter begins
    code = "\n#cell\n".join(cells())
    assert code.count(FLAGS) == 1
    small = code.replace(FLAGS, f'{FLAGS[:-1]} {SMALL}"')
    names: dict[str, object] = {}
    for cell in small.split("\n#cell\n"):
        execute(cell, names)
    assert len(shown) == 2 and all(shown)
    assert Path("outputs/try_it/report.html").exists()
