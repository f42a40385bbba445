"""What each step of the student begins with, and where it is led."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_distill.data.samples import Inputs
from wan_distill.maths.flow import euler_step
from wan_distill.methods import make_method
from wan_distill.settings.recipes import recipe_of
from wan_distill.settings.sample_specs import handovers, trajectories


class Stored:
    """Samples whose every value says which they are: `level`, the row, the sigma."""

    def __init__(self, level: float):
        self.level = level

    def value(self, row: int, sigma: float) -> float:
        return self.level + row + sigma

    def at(self, rows, sigmas) -> torch.Tensor:
        values = [self.value(row, sigma) for row, sigma in zip(rows, sigmas, strict=True)]
        return torch.tensor(values).view(-1, 1, 1, 1, 1).expand(-1, 2, 1, 1, 1)

    def condition(self, rows) -> tuple[int, ...]:
        return tuple(rows)


@pytest.mark.parametrize("steps", [(4,), (2, 4)])
def test_the_low_expert_goes_on_from_the_distilled_high_one_to_where_the_teacher_is(
    small_config, steps
):
    config = small_config(method="trajectory", sampling_steps=steps, train_batch_size=16)
    method = make_method(config, "low")
    teacher, students = Stored(0.0), {f"inputs {n}": Stored(100.0 * n) for n in steps}
    samples: dict[str, Any] = {"trajectories": teacher} | students
    batch = method.batch_at(Inputs(SimpleNamespace(), samples), 0, 0)
    ends = {
        s: e for n in steps for s, e in zip(config.sigmas(n), config.sigmas(n)[1:], strict=False)
    }
    seen = set()
    for i, row in enumerate(batch.condition):
        sigma, begun = float(batch.sigma[i]), float(batch.x[i, 0, 0, 0, 0])
        grids = [n for n in steps if begun == pytest.approx(100 * n + row + sigma)]
        seen.update((n, sigma) for n in grids or [0])
        assert grids or begun == pytest.approx(row + sigma)
        end = torch.tensor([ends[sigma] if grids != [2] else 0.0], dtype=torch.float64)
        led = euler_step(batch.x[i : i + 1], batch.target[i : i + 1], batch.sigma[i : i + 1], end)
        assert float(led[0, 0, 0, 0, 0]) == pytest.approx(teacher.value(row, float(end)), rel=1e-4)
    begins = {(n, config.sigmas(n)[n // 2]) for n in steps}
    assert seen == begins | {(0, config.sigmas(4)[3])}


def test_the_high_expert_learns_from_the_teacher_alone(small_config):
    config = small_config(method="trajectory", train_batch_size=16)
    method = make_method(config, "high")
    batch = method.batch_at(Inputs(SimpleNamespace(), {"trajectories": Stored(0.0)}), 0, 0)
    expected = [row + float(s) for row, s in zip(batch.condition, batch.sigma, strict=True)]
    assert batch.x[:, 0, 0, 0, 0].tolist() == pytest.approx(expected)
    assert set(method.rows_at(0, 0)) == {"trajectories"}


def test_without_a_distilled_high_expert_it_begins_with_the_teachers_samples(small_config):
    config = small_config(method="trajectory")
    recipe = recipe_of(config)
    own = recipe.samples(config, "low", distilled=True)
    assert own["inputs 4"] == handovers(config, 4, True, complete=True) != trajectories(config)
    assert own["inputs 4"].sampler == "student"
    alone = recipe.samples(config, "low", distilled=False)
    assert alone == {"trajectories": trajectories(config), "inputs 4": trajectories(config)}
