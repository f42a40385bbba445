"""Where each step of the student begins, and where it is led."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wan_distill.data.samples import Inputs
from wan_distill.methods import make_method
from wan_distill.methods.trajectory import Trajectory, TrajectoryBatch
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


class Student:
    """Its velocity is a weight; remembers where it was asked."""

    def __init__(self, velocity: float):
        self.weight = torch.tensor(velocity, requires_grad=True)
        self.asked: list[tuple[torch.Tensor, float]] = []

    def velocity(self, x, sigma, condition, role) -> torch.Tensor:
        self.asked.append((x, float(sigma[0])))
        return self.weight.expand_as(x)


def batch_of(method: Trajectory, step: int = 0) -> TrajectoryBatch:
    """The low expert's hand-overs of n sampling steps are at a level of 100 n."""
    students = {f"inputs {n}": Stored(100.0 * n) for n in method.config.sampling_steps}
    samples: dict[str, Any] = {"trajectories": Stored(0.0)}
    samples |= students if method.expert == "low" else {}
    return method.batch_at(Inputs(SimpleNamespace(), samples), step, step)


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_phase_begins_with_noise_or_the_distilled_high_ones_end_and_is_led_by_the_teacher(
    small_config, expert
):
    config = small_config(method="trajectory", sampling_steps=(2, 4), train_batch_size=16)
    method = make_method(config, expert)
    seen = set()
    for step in range(8):
        batch = batch_of(method, step)
        rows = torch.tensor(batch.condition, dtype=torch.float32)
        (count,) = (n for n, sigmas in method.phases.items() if sigmas == batch.sigmas)
        level = 100.0 * count if expert == "low" else 0.0
        assert batch.x[:, 0, 0, 0, 0].tolist() == pytest.approx(level + rows + batch.sigmas[0])
        for reached, sigma in zip(batch.teacher, batch.sigmas[1:], strict=True):
            assert reached[:, 0, 0, 0, 0].tolist() == pytest.approx(rows + sigma)
        source = f"inputs {count}" if expert == "low" else "trajectories"
        assert set(method.rows_at(step, step)) == {"trajectories", source}
        seen.add(count)
    assert seen == {2, 4}, "one of the sampling grids for each update"


def test_every_step_learns_where_the_student_arrives(small_config):
    method = make_method(small_config(method="trajectory", sampling_steps=(8,)), "high")
    batch, student = batch_of(method), Student(0.5)
    losses = []
    for loss in method.losses("student", student, batch, torch.Generator()):
        loss.value.backward()  # one graph at a time
        losses.append(float(loss.value.detach()))
    assert len(losses) == len(batch.teacher) == len(batch.sigmas) - 1 > 1
    x = batch.x
    for (asked, sigma), reached, loss, (begin, end) in zip(
        student.asked, batch.teacher, losses, itertools.pairwise(batch.sigmas), strict=True
    ):
        assert sigma == begin and torch.allclose(asked, x) and not asked.requires_grad
        error = 0.5 - (x - reached) / (begin - end)
        assert loss == pytest.approx(float(error.square().mean()) / len(losses), rel=1e-4)
        x = x - (begin - end) * 0.5


def test_every_stored_sample_comes_once_per_epoch(small_config):
    config = small_config(method="trajectory", train_batch_size=2, num_trajectories=8)
    method = make_method(config, "high")
    for epoch in range(2):
        rows = [method.rows_at(0, 4 * epoch + micro)["trajectories"] for micro in range(4)]
        assert sorted(itertools.chain(*rows)) == list(range(8))


def test_without_a_distilled_high_expert_it_begins_with_the_teachers_samples(small_config):
    config = small_config(method="trajectory")
    recipe = recipe_of(config)
    own = recipe.samples(config, "low", distilled=True)
    assert own["inputs 4"] == handovers(config, 4, True, complete=True) != trajectories(config)
    assert own["inputs 4"].sampler == "student"
    alone = recipe.samples(config, "low", distilled=False)
    assert alone == {"trajectories": trajectories(config), "inputs 4": trajectories(config)}
