"""A run that begins with a student in another program's layout is the run that begins with ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL, tiny_flags
from diffusers import WanPipeline, WanTransformer3DModel
from foreign_loras import LAYOUTS, write_in
from torch import Tensor

import train_distillation
from wan_distill.layout import RunFolder
from wan_distill.model.loading import Teacher
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime

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


@pytest.fixture(scope="module")
def stock(random_teacher: Path) -> WanPipeline:
    """The teacher in diffusers, without a line of this project."""
    return WanPipeline.from_pretrained(random_teacher)


@torch.no_grad()
def velocity(transformer: WanTransformer3DModel) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=rng), torch.randn(1, 12, 16, generator=rng)
    (predicted,) = transformer(x, torch.tensor([900.0]), text, return_dict=False)
    return predicted


def assert_same_in_diffusers(pipe: WanPipeline, teacher: Path, lora: Path) -> None:
    """Stock diffusers' velocity with `lora` is this tool's, whose own reader merges it."""
    plain = velocity(pipe.transformer)
    pipe.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="student")
    theirs = velocity(pipe.transformer)
    pipe.unload_lora_weights()
    config = Config(**SMALL, teacher_path=str(teacher), teacher_lora=(str(lora),))
    ours = Teacher(read_teacher(config), config, Runtime(config)).load_expert("high")
    error, change = (velocity(ours) - theirs).norm(), (theirs - plain).norm()
    assert error < 1e-5 * theirs.norm() and error < 1e-3 * change


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_loaded_trained_and_exported_for_stock_diffusers(
    layout: str,
    first: RunFolder,
    refined: bytes,
    random_teacher: Path,
    stock: WanPipeline,
    tmp_path: Path,
) -> None:
    """And the bytes are those of a run that begins with our own file: two updates are in them."""
    start = write_in(layout, first.lora("high"), tmp_path / "start_high.safetensors")
    out = tmp_path / "out"
    assert refine(random_teacher, out, start) == refined != first.lora("high").read_bytes()
    assert_same_in_diffusers(stock, random_teacher, RunFolder(out).lora("high"))


@pytest.mark.parametrize("rank", [2, 6])
def test_so_is_one_of_another_rank(
    rank: int, first: RunFolder, random_teacher: Path, stock: WanPipeline, tmp_path: Path
) -> None:
    start = write_in("kohya", first.lora("high"), tmp_path / "start_high.safetensors")
    out = tmp_path / "out"
    refine(random_teacher, out, start, rank=rank, lora_alpha=3.0)
    assert_same_in_diffusers(stock, random_teacher, RunFolder(out).lora("high"))


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
