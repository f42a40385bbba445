"""Settings that only some teachers allow: fewer blocks, sides of a multiple of 32."""

from __future__ import annotations

import dataclasses

import pytest

from wan_distill.errors import UsageError
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(student_layers=4), "give 1 to 1"),
        (dict(student_layers=0), "give 1 to 1"),
        (dict(student_layers=1, method="dmd"), "use --method trajectory"),
        (
            dict(student_layers=1, method="trajectory", base_precision="nf4"),
            "leave --base_precision nf4 out",
        ),
        (
            dict(student_layers=1, method="trajectory", save_merged=False),
            "leave --no-save_merged out",
        ),
    ],
)
def test_a_shallower_student_that_cannot_be_is_refused(changes, said, small_config):
    with pytest.raises(UsageError, match=said):
        small_config(**changes)


def test_a_vae_of_16_pixels_per_latent_needs_sides_of_32(small_config):
    """Wan2.2 TI2V-5B: 16 pixels per latent times patches of 2."""
    config = small_config()
    info = read_teacher(config)
    coarse = dataclasses.replace(info, vae=info.vae | dict(scale_factor_spatial=16))
    resolve(dataclasses.replace(config, height=64), coarse)
    with pytest.raises(UsageError, match="multiple of 32; use 32 or 64"):
        resolve(dataclasses.replace(config, height=48), coarse)
