"""A run that begins with a student in another program's layout is the run that begins with ours."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import tiny_flags
from foreign_loras import LAYOUTS, write_in

import train_distillation
from wan_distill.layout import RunFolder

# alpha / rank is a power of two, so that nothing is rounded where a layout multiplies it in.
SETTINGS = dict(method="trajectory", expert="high", rank=4, lora_alpha=2.0, learning_rate=1e-2)


def refine(teacher: Path, out: Path, start: Path | str, **changes: object) -> bytes:
    """The LoRA that two updates leave."""
    flags = tiny_flags(teacher, out, init_student_from=start, **(SETTINGS | changes))
    assert train_distillation.main(flags) == 0
    return RunFolder(out).lora("high").read_bytes()


@pytest.fixture(scope="module")
def first(random_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("foreign") / "first"
    assert train_distillation.main(tiny_flags(random_teacher, out, **SETTINGS)) == 0
    return RunFolder(out)


@pytest.fixture(scope="module")
def refined(first: RunFolder, random_teacher: Path) -> bytes:
    return refine(random_teacher, first.path.with_name("refined"), first.path)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "extras" not in name])
def test_every_layout_leads_to_the_same_bytes(
    layout: str, first: RunFolder, refined: bytes, random_teacher: Path, tmp_path: Path
) -> None:
    start = write_in(layout, first.lora("high"), tmp_path / "start_high.safetensors")
    assert refine(random_teacher, tmp_path / "out", start) == refined


def test_the_scores_can_begin_with_it_too(
    first: RunFolder, random_teacher: Path, tmp_path: Path
) -> None:
    plain, begun = (
        refine(
            random_teacher, tmp_path / str(also), first.path, method="dmd", critic_from_student=also
        )
        for also in (False, True)
    )
    assert plain != begun
