"""A wheel has everything: built here, installed elsewhere, run from a third folder."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None,
    reason="building a wheel without a network needs setuptools in this environment",
)
NEEDED = ("*.py", "*.toml", "*.txt", "*.md", "LICENSE")


def pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since building leaves files behind."""
    source = tmp_path_factory.mktemp("source") / "repository"
    source.mkdir()
    for pattern in NEEDED:
        for file in REPOSITORY.glob(pattern):
            shutil.copy(file, source)
    for folder in ("wan_distill", "assets"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(source))
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which it is installed."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    return target


def run(code: str, elsewhere: Path, cwd: Path) -> str:
    """What Python prints where only the installed files can be found."""
    environment = os.environ | {"PYTHONPATH": str(elsewhere)}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


def test_the_wheel_holds_every_package_and_its_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    files = (REPOSITORY / "wan_distill").rglob("*.*")
    code = [file for file in files if file.suffix in (".py", ".html", ".css", ".js")]
    expected = {file.relative_to(REPOSITORY).as_posix() for file in code}
    scripts = ("train_distillation", "sample", "test_umt5_weights", "convert_lora")
    expected |= {f"wan_distill_scripts/{script}.py" for script in scripts}
    assets = REPOSITORY / "assets"
    for file in assets.rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            expected.add(f"wan_distill_assets/{file.relative_to(assets).as_posix()}")
    assert "wan_distill/results/page.html" in expected
    assert expected - names == set()
    own = ("wan_distill/", "wan_distill_assets/", "wan_distill_scripts/", "wan_distill-")
    assert not [name for name in names if not name.startswith(own)]  # `import sample` is anybody's


def test_the_commands_are_installed(wheel):
    (entry_points,) = (
        name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("entry_points.txt")
    )
    text = zipfile.ZipFile(wheel).read(entry_points).decode()
    for line in (
        "wan-distill = wan_distill.commands:train",
        "wan-distill-sample = wan_distill.commands:sample",
        "wan-distill-check = wan_distill.commands:check",
        "wan-distill-convert = wan_distill.commands:convert",
    ):
        assert line in text


def test_the_installed_package_finds_the_embedded_teacher(elsewhere, tmp_path):
    code = (
        "from wan_distill import commands\n"
        "train_distillation = commands.script('train_distillation')\n"
        "for command in (commands.train, commands.sample, commands.check, commands.convert):\n"
        "    commands.sys.argv = ['wan-distill', '--nonsense']\n"
        "    assert command() == 2\n"
        "from wan_distill.settings.assets import EMBEDDED_TEACHER\n"
        "from wan_distill.settings.config import Config\n"
        "from wan_distill.settings.description import read_teacher\n"
        "assert read_teacher(Config()).embedded\n"
        "print(train_distillation.__file__, EMBEDDED_TEACHER, sep='\\n')\n"
    )
    script, teacher = run(code, elsewhere, tmp_path).splitlines()
    assert (
        Path(script).parent == elsewhere / "wan_distill_scripts"
        and elsewhere in Path(teacher).parents
    )
    assert (Path(teacher) / "model_index.json").exists()


@pytest.mark.long
def test_the_installed_package_plans_a_run(elsewhere, tmp_path):
    """Versions come from the package's metadata there, prompts and the teacher from its data."""
    code = (
        "import sys; from wan_distill.commands import train\n"
        "sys.argv = ['wan-distill', '--dry_run']; sys.exit(train())"
    )
    said = run(code, elsewhere, tmp_path)
    assert "embedded tiny teacher" in said and "Versions  " in said and "jinja2" in said.lower()
    assert re.search(r"Prompts +\d+ to train on", said)
