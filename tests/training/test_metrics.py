"""metrics.jsonl: means over an interval and over ranks, also where a stop cuts it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from wan_distill.training.metrics import Metrics, read_lines


def new_metrics(file, groups: int = 1, is_main: bool = True) -> Metrics:
    runtime = SimpleNamespace(sample_groups=groups, device=torch.device("cpu"), is_main=is_main)
    return Metrics(file, runtime)


def test_a_line_has_the_means_of_its_interval(tmp_path):
    metrics = new_metrics(tmp_path / "metrics.jsonl")
    metrics.add(loss=1.0, norm=torch.tensor(3.0))
    metrics.add(loss=torch.tensor(4.0, requires_grad=True))
    metrics.add(other=7.0)
    metrics.note(monitor_score=0.5)
    line = metrics.write(expert="high", step=2)
    assert list(line)[:2] == ["expert", "step"] and line.pop("seconds") >= 0
    assert line == dict(expert="high", step=2, loss=2.5, norm=3.0, other=7.0, monitor_score=0.5)
    metrics.add(loss=9.0)
    assert metrics.write(expert="high", step=3)["loss"] == 9.0  # nothing of the line before
    assert "monitor_score" not in metrics.write(expert="high", step=4)
    written = read_lines(tmp_path / "metrics.jsonl")
    assert [(each["step"], each.get("loss")) for each in written] == [(2, 2.5), (3, 9.0), (4, None)]


def test_only_the_main_process_writes(tmp_path):
    other = new_metrics(tmp_path / "metrics.jsonl", is_main=False)
    other.add(loss=1.0)
    assert other.write(expert="high", step=1)["loss"] == 1.0
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_interval_that_a_stop_cuts_is_still_the_mean_of_all_ranks(tmp_path, monkeypatch):
    other_rank = 3.0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.add_(other_rank))
    before, after = (new_metrics(tmp_path / "metrics.jsonl", groups=2) for _ in range(2))
    before.add(loss=1.0)
    after.resume(before.state(), "high", 1)  # 2 on both: the mean of 1 and 3
    after.add(loss=5.0)  # 1 on the other
    assert after.write(expert="high", step=2)["loss"] == (2 + 5 + 3) / 2 / 2


def test_what_is_not_written_yet_survives_as_plain_values(tmp_path):
    before, after = (new_metrics(tmp_path / "metrics.jsonl") for _ in range(2))
    before.add(loss=1.0)
    before.add(loss=2.0)
    before.note(monitor_score=0.5)
    state = json.loads(json.dumps(before.state()))
    after.resume(state, "high", 2)
    after.add(loss=6.0)
    line = after.write(expert="high", step=3)
    assert (line["loss"], line["monitor_score"]) == (3.0, 0.5)


@pytest.mark.parametrize("torn", ['{"expert": "low", "st', ""])
def test_lines_of_lost_updates_are_dropped(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    lines = [dict(expert=expert, step=step) for expert in ("high", "low") for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    metrics = new_metrics(file)
    metrics.resume({}, "low", 2)
    left = [(line["expert"], line["step"]) for line in read_lines(file)]
    assert left == [("high", 1), ("high", 2), ("high", 3), ("low", 1), ("low", 2)]
    metrics.write(expert="low", step=3)
    assert len(read_lines(file)) == 6 and file.read_text().endswith("}\n")
