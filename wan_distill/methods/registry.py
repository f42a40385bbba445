"""Which methods there are."""

from __future__ import annotations

from wan_distill.data.run import Sources
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Method


def make_method(expert: Expert, sources: Sources) -> Method:
    """The objective that `--method` names, for one expert; its stored inputs are solved first."""
    from wan_distill.methods.consistency import Consistency
    from wan_distill.methods.dmd import PhasedDMD
    from wan_distill.methods.trajectory import Trajectory

    methods = {"trajectory": Trajectory, "dmd": PhasedDMD, "consistency": Consistency}
    return methods[sources.config.method](expert, sources)
