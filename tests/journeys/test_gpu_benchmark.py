"""The one command for a GPU, rehearsed with a tiny model: it must not fail on a card that is paid
by the hour.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

import gpu

UPDATES_AND_FLAGS = {*gpu.UPDATES, *gpu.FLAGS}
COMPILED = {name for name in UPDATES_AND_FLAGS if "compile" in name}


def rehearsed(folder: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--rehearse", *flags]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert (folder / "gpu.md").read_text() in ended.stdout
    return json.loads((folder / "gpu.json").read_text())


def test_every_update_and_flag_is_measured_without_a_compiler(tmp_path):
    """Whole runs of this kind are the other journeys."""
    result = rehearsed(tmp_path, "--leave_out", *COMPILED, "runs")
    measured = {
        name: part
        for kind in ("updates", "flags")
        for name, part in result[kind].items()
        if "left_out" not in part
    }
    assert set(measured) == UPDATES_AND_FLAGS - COMPILED
    for part in measured.values():
        assert all(seconds > 0 for seconds in part["seconds_per_update"].values())
        assert part["seconds_per_evaluation"] > 0 and part["predicted_peak_bytes"] > 1e6
    assert set(measured["dmd"]["seconds_per_update"]) >= {"student", "fake_score"}
    assert not result["failures"]


@pytest.mark.long
def test_whole_runs_too(tmp_path):
    result = rehearsed(tmp_path, "--minutes", "30")
    assert all(part["seconds"] > 0 for part in result["runs"].values())
    assert set(result["runs"]) == set(gpu.RUNS) and not result["failures"]


def test_bars_failures_and_lack_of_time_are_told(capsys):
    done = gpu.Measurements(minutes=9, leave_out=["int8"])
    fine = dict(
        seconds_per_update={"student": 50.0},
        seconds_per_evaluation=4.0,
        predicted_peak_bytes=63e9,
        peak_bytes=64e9,
        matmul_share=0.55,
    )
    done.add("updates", {"dmd": lambda folder: fine | dict(peak_bytes=77e9)})
    done.add("updates", {"trajectory": lambda folder: fine | dict(matmul_share=0.4)})
    done.add("flags", {"int8": lambda folder: fine})

    def broken(folder: Path) -> dict[str, Any]:
        raise RuntimeError("a kernel\nis missing")

    done.add("flags", {"fp8": broken})
    done.end = 0.0
    done.add("runs", {"bf16": lambda folder: dict(seconds=1.0)}, together=True)
    assert done.failures() == [
        "dmd: a peak of 77.0 GB",
        "trajectory: 0.40 of the matrix rate",
        "flags fp8: RuntimeError: a kernel is missing",
    ]
    text = gpu.table(dict(device="a card", torch="2", seconds=1.0, **done.parts))
    assert "| dmd, full clip | student 50.00 | 4.00 | 0.55 | 77.0 GB | 63.0 GB |" in text
    assert "| trajectory, 17 frames, int8 | as asked |" in text
    assert "s were left" in text and "a kernel is missing" in text
