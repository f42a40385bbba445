"""The predicted peaks in docs/scaling.md are the plan's."""

from __future__ import annotations

import re

import pytest
from conftest import REPOSITORY
from wan_shapes import A14B, config_of, teacher_of

from wan_distill.planning.memory import estimate
from wan_distill.settings.command_line import parse_args

# | settings | GB with the guided score | GB with the score of samples |
ROWS = re.findall(
    r"^\| (default|`--.*?`) \| (\d+) GB \| (\d+) GB \|$",
    (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
DEFAULTS = parse_args([]).to_json()


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_documented_peaks_are_the_predicted_ones(row, tmp_path):
    settings, guided, samples = row
    assert len(ROWS) >= 5
    argv = [] if settings == "default" else settings.strip("`").split()
    given = parse_args(["--method=dmd", *argv]).to_json()
    changes = {name: value for name, value in given.items() if value != DEFAULTS[name]}
    info = teacher_of(A14B, tmp_path)
    need = estimate(config_of(info, real_score="guided", **changes), info)
    assert round(need.peak / 1e9) == int(guided)
    third_adapter = (need.adapters + need.optimizer) / 2  # the two have one each
    assert round((need.peak + third_adapter) / 1e9) == int(samples)
