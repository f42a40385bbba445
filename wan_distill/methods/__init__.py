"""Objectives: what each role learns. One file per method."""

from __future__ import annotations

from typing import Any

from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Method
from wan_distill.methods.consistency import Consistency
from wan_distill.methods.dmd import PhasedDMD
from wan_distill.methods.trajectory import Trajectory
from wan_distill.settings.config import Config

METHODS: dict[str, type[Method[Any]]] = {
    "dmd": PhasedDMD,
    "trajectory": Trajectory,
    "consistency": Consistency,
}


def make_method(config: Config, expert: Expert) -> Method[Any]:
    """The objective that `--method` names, for one expert."""
    return METHODS[config.method](config, expert)
