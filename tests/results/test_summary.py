"""The page's first screen: how good, how fast, what it cost, is it healthy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from wan_distill.layout import RunFolder
from wan_distill.results import summary
from wan_distill.results.progress import Segment
from wan_distill.settings.config import Config

ROW = dict(evaluations=4, paired_distance=0.1, motion=1.0, diversity=1.0, luminance_drift=0.0)
CONFIG = Config(method="dmd", real_score="samples", output_dir="out", max_train_steps=8)
CHECK = dict(monitor_luminance=0.0, monitor_motion=1.0, monitor_diversity=1.0, monitor_score=0.5)


def evaluation(student: float = 1.0, few: float = 2.0, **changes) -> dict:
    distances = {"teacher 6 guided": 0.5, "teacher 4 guided": few, "student 4": student}
    seconds = {"teacher 6 guided": 3.0, "teacher 4 guided": 2.0, "student 4": 1.5}
    rows = [
        ROW | dict(sampler=name, frechet=value, seconds_per_sample=seconds[name])
        for name, value in distances.items()
    ]
    values = dict(kind="sets", rows=rows, gap_closed=0.9, gap_closed_interval=[0.85, 0.95])
    return values | dict(samples=256, samples_needed=256, components=64) | changes


def trained(*lines: dict, exported: int | None = None, expert: str = "high") -> list[Segment]:
    own = [dict(expert=expert, step=10) | line for line in lines]
    return [Segment(CONFIG, expert, f"{expert} expert", RunFolder(Path("out")), own, 0, exported)]


def test_quality_comes_with_its_interval_and_what_must_be_remarked():
    tile = summary.quality([], evaluation())
    assert (tile.value, tile.mark) == ("90 %", "good") and "85 % to 95 %" in tile.words
    assert summary.quality([], evaluation(student=3.0)).mark == "bad"
    above = summary.quality([], evaluation(gap_closed=1.04))
    assert above.value == "104 %" and "cannot be told from its teacher" in above.words
    few = summary.quality([], evaluation(gap_closed=1.26, samples=64))
    assert few.mark == "plain" and "Too few samples to be sure: 64 of 256" in few.words
    unknown = evaluation()
    del unknown["gap_closed_interval"]  # of two samples
    assert "interval" not in summary.quality([], unknown).words
    pairs = evaluation(kind="pairs", nearer=0.3, nearer_interval=[0.2, 0.4])
    for row in pairs["rows"]:
        row["paired_distance"] = row.pop("frechet")
    assert summary.quality([], pairs).value == "30 %"
    assert "20 % to 40 %" in summary.quality([], pairs).words


def test_before_the_evaluation_quality_is_the_distance_at_the_last_check():
    assert summary.quality([], None).value == "not yet"
    lines = [CHECK | dict(monitor_score=0.5), CHECK | dict(monitor_score=0.25)]
    tile = summary.quality(trained(*lines), None)
    assert tile.value == "0.25" and "began at 0.5" in tile.words


def test_speed_is_evaluations_and_where_measured_seconds(small_config):
    config = small_config()
    before = summary.speed(config, None)
    assert before.value == "3 ×" and "4 instead of 12" in before.words
    assert "2.0 × as fast, 1.5 s instead of 3 s" in summary.speed(config, evaluation()).words


def test_cost_is_gpu_hours_and_dollars_and_of_a_cpu_hours(small_config):
    config = small_config(gpu_hour_price=2.5)
    spent = dict(seconds={"a": 1800.0, "b": 1800.0}, processes=8, device="H100", finished=None)
    tile = summary.cost(config, spent | dict(gpu=True))
    assert (tile.title, tile.value) == ("Cost so far", "8 GPU-hours") and "$20.00" in tile.words
    measured_on_one = spent | dict(gpu=True, processes=1, device_seconds=8 * 3600.0)
    assert summary.cost(config, measured_on_one).value == "8 GPU-hours"
    tile = summary.cost(config, spent | dict(gpu=False, device="cpu", finished="now"))
    assert tile.title == "Cost" and "no dollars" in tile.words
    minutes = spent | dict(gpu=False, device="cpu", seconds={"all": 2040.0})
    assert summary.cost(config, minutes).value == "34 minutes"  # which fits a phone
    assert summary.cost(config, {}).value == "unknown"


def test_health_is_that_of_the_exported_student():
    frozen = CHECK | dict(monitor_motion=0.1)
    assert summary.health(CONFIG, [], None).value == "Not checked"
    before = [frozen | dict(monitor_updates=0)]  # nothing to warn of before training
    assert summary.health(CONFIG, trained(*before), None).value == "Healthy"
    good_first = [CHECK | dict(monitor_updates=4), frozen | dict(monitor_updates=8)]
    assert (
        summary.health(CONFIG, trained(*good_first), None).value == "Warning"
    )  # still learning: the last
    exported = summary.health(CONFIG, trained(*good_first, exported=4), None)
    assert exported.value == "Healthy" and "update 4, exported" in exported.words
    measured = summary.health(CONFIG, trained(*good_first, exported=8), evaluation())
    assert measured.mark == "good" and "motion 1.00" in measured.words
    still = evaluation()
    still["rows"][-1]["motion"] = 0.2
    assert summary.health(CONFIG, trained(CHECK, exported=8), still).mark == "bad"
    for name, value in dict(departure=0.2, first_frame=3.0).items():  # image to video
        ill = evaluation()
        ill["rows"][-1][name] = value
        assert "the picture" in summary.health(CONFIG, trained(CHECK, exported=8), ill).words
    assert summary.health(CONFIG, trained(CHECK, exported=0), evaluation()).value == "No progress"
    (refined,) = trained(CHECK, exported=0)
    refined.config = dataclasses.replace(CONFIG, init_student_from="out/trajectory")
    said = summary.health(CONFIG, [*trained(CHECK, exported=8), refined], evaluation())
    assert said.value == "Healthy" and "first stage's student is exported" in said.words


@pytest.mark.parametrize("student, words", [(1.0, "nearer to"), (3.0, "farther from")])
def test_the_sentence_compares_with_the_yardstick(small_config, student, words):
    said = summary.sentence(small_config(), [], evaluation(student=student), {})
    assert "with 4 evaluations where its teacher needs 12" in said
    assert f"clips are {words} the teacher's" in said and "makes with 8" in said


@pytest.mark.parametrize(
    "spent, words",
    [
        (dict(now="high expert", finished=None), "In training: high expert, 3 of 8 updates"),
        (
            dict(now="high expert", left=700.0),
            "of the student; about 12 minutes left in all. It will",
        ),
        (dict(now=None, finished=None), "The run was stopped: high expert, 3 of 8 updates"),
        (dict(now=None, finished="now"), "trained and was not measured"),
    ],
)
def test_a_run_that_is_not_measured_says_where_it_is(small_config, spent, words):
    segments = trained(dict(student_updates=3))
    assert words in summary.sentence(small_config(), segments, None, spent)
