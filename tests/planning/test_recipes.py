"""The recipes are settings that work, and their second line is what the plan says.

python tests/planning/test_recipes.py       writes those lines anew
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from conftest import REPOSITORY
from wan_shapes import A14B, A14B_I2V, teacher_of

from wan_distill.data.prompts import split_prompts
from wan_distill.planning.hardware import GPUS, USABLE
from wan_distill.planning.parts import parts
from wan_distill.planning.plan import plan_numbers
from wan_distill.settings.command_line import parse_args
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages
from wan_distill.settings.yaml_file import load_yaml

RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))
TEACHERS = {  # by their configurations alone, without the hub
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": dict(transformer=A14B),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": dict(
        transformer=A14B_I2V, takes_picture=True, boundary_ratio=0.9
    ),
}
PROMPTS = 552  # that are built in
BEGIN, END = "<!-- plan -->", "<!-- end of plan -->"
README = REPOSITORY / "README.md"
PLANNED = re.compile(r"^# Plan for (\S+): .*$", re.M)


def plan_line(file: Path, folder: Path) -> str:
    """The line of a recipe that says what the plan predicts for the card that it names."""
    gpu = PLANNED.search(file.read_text(encoding="utf-8"))[1]
    if gpu == "cpu":
        return f"# Plan for cpu: {demo_work(parse_args([f'--config={file}']))}"
    numbers = plan_of(file, gpu, folder)
    host = max(numbers["host_bytes"].values(), default=0)
    dollars = (
        f", ${numbers['dollars']:.0f}" if gpu.startswith("h100") else ""
    )  # of the default price
    return (
        f"# Plan for {gpu}: {numbers['gpu_hours']:.0f} GPU-hours{dollars}; peak "
        f"{gigabytes(numbers['peak_bytes'])} of {gigabytes(usable(numbers))} GB; "
        + (f"{gigabytes(host)} GB of host memory; " if host else "")
        + f"{gigabytes(sum(numbers['disk_bytes'].values()))} GB of disk"
    )


def plan_of(file: Path, gpu: str, folder: Path) -> dict[str, Any]:
    """The numbers of the plan."""
    config = parse_args([f"--config={file}", f"--gpu={gpu}", "--dry_run"])
    source = config.teacher_path or ""
    info = teacher_of(folder=folder, source=source, name=Path(source).name, **TEACHERS[source])
    numbers = plan_numbers(resolve_stages(config, info), info, PROMPTS)
    assert numbers["fits"], f"{file.name}: {numbers['peak_bytes']:.3g} of {usable(numbers):.3g}"
    return numbers


def usable(numbers: dict[str, Any]) -> float:
    return USABLE * numbers["hardware"]["memory"]


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.0f}"


def readme_plan(folder: Path) -> str:
    """The three lines of README.md about one card of 80 GB."""
    numbers = plan_of(REPOSITORY / "recipes" / "a14b-1x80gb.yaml", "h100", folder)
    price = numbers["config"]["gpu_hour_price"]
    return (
        f"{BEGIN}\n- one H100 of 80 GB is enough: a predicted peak of "
        f"{gigabytes(numbers['peak_bytes'])} of {gigabytes(usable(numbers))} GB\n"
        f"- about {numbers['gpu_hours']:.0f} GPU-hours, ${numbers['dollars']:.0f} at ${price:g} an "
        f"hour, at {GPUS['h100'].share:.0%} of the card's rate\n"
        f"- {gigabytes(sum(numbers['disk_bytes'].values()))} GB of disk, beside the teacher's "
        f"weights\n{END}"
    )


def demo_work(config: Config) -> str:
    """Of the embedded teacher: operations, since a CPU's rate differs from day to day."""
    info = read_teacher(config)
    stages = resolve_stages(config, info)
    flops = sum(
        part.flops for part in parts(stages, info, sum(map(len, split_prompts(stages[-1], info))))
    )
    return f"{flops / 1e12:.0f} TFLOP, some minutes on two cores"


def test_there_is_one_for_each_need():
    assert len(RECIPES) >= 8
    page = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
    for file in RECIPES:
        assert f"`recipes/{file.name}`" in page
        first, second, *_ = file.read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ") and PLANNED.match(second)
        assert load_yaml(str(file)) is not None


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_its_plan_is_the_plan(file, tmp_path):
    line = PLANNED.search(file.read_text(encoding="utf-8"))[0]
    assert line == plan_line(file, tmp_path), "python tests/planning/test_recipes.py"


@pytest.mark.journey  # as long as a whole run
def test_the_readme_tells_what_the_plan_does(tmp_path):
    told = README.read_text(encoding="utf-8")
    assert readme_plan(tmp_path) in told, "python tests/planning/test_recipes.py"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        told = README.read_text(encoding="utf-8")
        before, after = told.split(BEGIN)[0], told.split(END)[1]
        README.write_text(before + readme_plan(Path(made)) + after, encoding="utf-8", newline="\n")
    for each in RECIPES:
        with tempfile.TemporaryDirectory() as made:
            told = plan_line(each, Path(made))
        content = each.read_text(encoding="utf-8")
        each.write_text(PLANNED.sub(told, content), encoding="utf-8", newline="\n")
        print(each.name, told)
