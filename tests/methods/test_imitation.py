"""What the benchmark's on-policy imitation asks of the teacher: a few evaluations a step."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
from imitation import integrate


@pytest.mark.parametrize(("stages", "grows"), [(2, 1 + 0.5 + 0.125), (3, 1 + 0.5 + 0.125 + 1 / 48)])
def test_a_step_is_exact_up_to_the_power_of_its_stages(stages, grows):
    """dx/dsigma = -x from sigma 1 to 0.5: x grows by exp(0.5), whose series the method follows."""
    asked = []

    def velocity(x, sigma):
        asked.append(float(sigma[0]))
        return -x

    x = integrate(velocity, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), 1.0, 0.5, stages, 1)
    assert float(x) == pytest.approx(grows) and len(asked) == stages
    assert min(asked) > 0.5  # the low expert's sigmas, or 0, are never asked for
    twice = integrate(velocity, torch.ones_like(x), 1.0, 0.5, stages, 2)
    assert abs(float(twice) - 1.6487213) < abs(float(x) - 1.6487213) / 3
