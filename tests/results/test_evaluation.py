"""The evaluation on sets of samples: which rows there are, what is compared with what, and how the
student's weights are used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from conftest import PROMPTS
from diffusers import WanTransformer3DModel
from peft.tuners.lora import Linear
from written_students import write_student

from wan_distill.errors import UsageError
from wan_distill.results import evaluation, timing
from wan_distill.results.evaluation import Evaluation
from wan_distill.results.recorded import read_evaluation, worst_samples
from wan_distill.results.samplers import samplers
from wan_distill.results.table import as_markdown, remarks


@pytest.fixture
def measured(make_run, monkeypatch):
    """Makes (evaluation, its table) of a student with an effect, without encoding videos."""

    def make(**changes):
        monkeypatch.setattr(evaluation, "write_video", write_frames)
        run = make_run(**dict(method="trajectory", lora_alpha=4.0) | changes)
        write_student(run, *run.config.experts)
        subject = Evaluation(run, PROMPTS)
        return subject, subject.measure()

    return make


def write_frames(file: Path, frames: numpy.ndarray, fps: int) -> Path:
    """In place of `write_video`, which takes a tenth of a second for each clip."""
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(frames.tobytes())
    return file


# --------------------------------------------------------------------------------------- the rows


def test_the_table_has_what_it_promises(measured, capsys):
    subject, table = measured()
    names = ["teacher 6 guided", "teacher 4 guided", "teacher 4 unguided", "student 4"]
    assert [row["sampler"] for row in table["rows"]] == names
    assert [row["evaluations"] for row in table["rows"]] == [12, 8, 4, 4]
    assert read_evaluation(subject.run.folder) == json.loads(json.dumps(table))
    student, worst = table["rows"][3]["frechet"], table["rows"][2]["frechet"]
    expected = 1 - (student - table["floor"]) / (worst - table["floor"])
    assert table["gap_closed"] == pytest.approx(expected)
    assert all(name in as_markdown(table) for name in names)
    assert table["lacking"] == [] and "Half a student" not in as_markdown(table)


def test_half_a_student_is_called_that(measured):
    for changes, lacking in ((dict(), ["low"]), (dict(sampling_steps=(1,)), [])):
        _, table = measured(expert="high", eval_samples=2, **changes)
        assert table["lacking"] == lacking
        remark = "Half a student: the low expert is the teacher's, without guidance."
        assert (remark in as_markdown(table)) == bool(lacking)


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("steps", [(4,), (2,)])
def test_a_teacher_of_four_steps_still_has_rows_of_its_own(measured, steps):
    """Its own solution and its few-step sampling have as many steps; only the first one is what
    student and teacher are compared by.
    """
    subject, table = measured(teacher_steps=4, sampling_steps=steps)
    rows = samplers(subject.config)
    names = [row.name for row in [rows.independent, *rows.table]]
    assert len(set(names)) == len(names) == 5
    by_name = {row["sampler"]: row for row in table["rows"]}
    assert by_name[rows.paired.name]["paired_distance"] == 0
    assert by_name[rows.paired.name]["motion"] == by_name[rows.paired.name]["diversity"] == 1
    assert table["floor"] == by_name[rows.paired.name]["frechet"]
    if rows.few_guided.sigmas != rows.paired.sigmas:
        assert by_name[rows.few_guided.name]["paired_distance"] > 0
    assert by_name[rows.students[0].name]["paired_distance"] > 0


@pytest.mark.journey  # as long as a whole run
@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_samples_still_give_numbers(measured, count):
    _, table = measured(eval_samples=count)
    numbers = [table["gap_closed"], table["floor"], *table["rows"][-1].values()]
    assert all(math.isfinite(number) for number in numbers if isinstance(number, float))


@pytest.mark.journey  # as long as a whole run
def test_the_reference_is_made_from_other_noise(measured):
    """Compared with its own samples the teacher would have a distance of 0, and so would a student
    that only copies them.
    """
    subject, table = measured()
    rows = samplers(subject.config)
    independent, paired = (subject.draw(row) for row in (rows.independent, rows.paired))
    assert (independent - paired).abs().amax((1, 2, 3, 4)).min() > 0.1
    assert rows.independent.sigmas == rows.paired.sigmas and table["floor"] > 0


@pytest.mark.journey  # as long as a whole run
def test_a_student_of_many_steps_has_a_row_for_each(measured):
    _, table = measured(sampling_steps=(2, 4))
    assert [row["sampler"] for row in table["rows"][3:]] == ["student 2", "student 4"]
    assert set(table["gap_closed_by_steps"]) == {"2", "4"}
    assert table["gap_closed"] == table["gap_closed_by_steps"]["4"]


# ------------------------------------------------------------------------------------- true numbers


@pytest.mark.journey  # as long as a whole run
def test_rows_are_timed_anew_side_by_side_with_the_adapters_merged(measured, monkeypatch):
    """Also where the teacher's samples come from their cache, and in a precision in which the
    student is measured unmerged.
    """
    subject, _ = measured(mixed_precision="bf16")
    calls = adapter_calls(monkeypatch, switched_off=True)
    forwards = count_forwards(monkeypatch)
    rows = samplers(subject.config).table
    ways = {row.name: timing.Way(row.role, row.sigmas, row.guided) for row in rows}
    seconds = timing.seconds_per_sample(subject.run, ways, subject.prompts)
    assert calls == []
    clips, rounds = len(subject.prompts), 1 + timing.ROUNDS
    assert forwards == [clips, 2 * clips] * rounds * 2  # unguided, guided; two experts
    steps = {row.name: row.steps for row in rows}
    per_step = {name: value / steps[name] for name, value in seconds.items()}
    long, few, unguided, student = per_step.values()
    assert min(per_step.values()) > 0 and long != unguided
    assert student == pytest.approx(unguided) or few > student


def test_a_row_takes_its_steps_times_the_median_step_of_each_expert(make_run, monkeypatch):
    run = make_run(method="trajectory")
    write_student(run, "high", "low")
    (high, low), each = run.info.experts, {("high", False): 3.0, ("low", False): 5.0}
    each |= {(high, True): 7.0, (low, True): 11.0}
    monkeypatch.setattr(
        timing,
        "_seconds_per_step",
        lambda run, expert, roles, step, kinds, prompts: {k: each[expert, k] for k in kinds},
    )
    sigmas = run.config.sigmas()
    owned = [sum(s >= run.config.boundary_ratio for s in sigmas[:-1])]
    owned.append(4 - owned[0])
    ways = {
        "teacher": timing.Way("teacher", sigmas, True),
        "student": timing.Way("student", sigmas, False),
    }
    seconds = timing.seconds_per_sample(run, ways, ["a", "b"])
    assert seconds["teacher"] == (7 * owned[0] + 11 * owned[1]) / 2
    assert seconds["student"] == (3 * owned[0] + 5 * owned[1]) / 2


@pytest.mark.journey  # as long as a whole run
def test_too_few_samples_for_the_components_are_remarked(measured):
    _, table = measured()
    assert table["samples"] == 8 and table["samples_needed"] == 4 * table["components"] == 60
    assert "8 samples are too few for 15 components" in as_markdown(table)
    assert remarks(table | dict(samples=60, gap_closed=1.0)) == []
    (remark,) = remarks(table | dict(samples=60, gap_closed=1.01))
    assert "does not mean better than the teacher" in remark


@pytest.mark.journey  # as long as a whole run
def test_a_smaller_evaluation_replaces_none_of_the_same_student(measured, make_run, capsys):
    subject, table = measured()
    clips = {file.name: file.read_bytes() for file in subject.run.folder.clips.iterdir()}
    fewer = make_run(method="trajectory", lora_alpha=4.0, eval_samples=6)
    smaller = Evaluation(fewer, PROMPTS).measure()
    folder = subject.run.folder
    assert smaller["samples"] == 6 and "evaluation-sets-6.json" in capsys.readouterr().out
    assert read_evaluation(folder) == json.loads(json.dumps(table))
    assert (folder.path / "evaluation-sets-6.json").exists()
    assert clips == {file.name: file.read_bytes() for file in folder.clips.iterdir()}
    write_student(fewer, "high", "low", seed=7)  # another student: the old numbers are not its own
    assert read_evaluation(folder) is None
    Evaluation(fewer, PROMPTS).measure()
    assert read_evaluation(folder)["samples"] == 6


@pytest.mark.journey  # as long as a whole run
def test_the_worst_clips_are_those_farthest_from_their_teachers(measured):
    subject, table = measured()
    distances = [clip["paired_distance"] for clip in table["clips"]]
    assert [clip["prompt"] for clip in table["clips"]] == subject.prompts
    assert sum(distances) / 8 == pytest.approx(table["rows"][-1]["paired_distance"])
    worst = worst_samples(table)
    assert len(worst) == 4 and distances[worst[0]] == max(distances)
    assert min(distances[i] for i in worst) >= max(distances[i] for i in range(8) if i not in worst)
    written = {file.name for file in subject.run.folder.clips.iterdir()}
    samples = {0, 1, 2, 3, *worst}
    assert written == {
        f"{who}-{i:04d}.mp4" for who in ("teacher", "few", "student") for i in samples
    }


# ------------------------------------------------------------------------------------- the samples


class Bar:
    """Stands in for a progress bar, and adds up what it is told."""

    def __init__(self, total: int, name: str):
        self.total = total
        self.name = name
        self.counted = 0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, count: int) -> None:
        self.counted += count


@pytest.mark.parametrize("scales", [(4.0, 3.0), (4.0, 1.0), (1.0, 3.0)])
def test_the_bar_ends_where_it_should(make_run, monkeypatch, scales):
    """Guided steps are two evaluations, but one where guidance is off; the table says the same."""
    bars: list[Bar] = []

    def open_bar(total, name, unit, shown):
        bars.append(Bar(total, name))
        return bars[-1]

    monkeypatch.setattr(evaluation, "progress_bar", open_bar)
    high, low = scales
    run = make_run(method="trajectory", guidance_scale=high, guidance_scale_2=low)
    write_student(run, "high", "low")
    rows = samplers(run.config)
    forwards = count_forwards(monkeypatch)
    for row in [rows.independent, *rows.table]:
        forwards.clear()
        Evaluation(run, PROMPTS).draw(row)
        assert bars[-1].counted == bars[-1].total == sum(forwards), row.name
        assert bars[-1].total == run.config.eval_samples * row.evaluations(run.config)


def count_forwards(monkeypatch) -> list[int]:
    """The number of samples in each forward of a transformer."""
    forwards: list[int] = []
    inner = evaluation.Denoiser._forward

    def counting(self, transformer, x, sigma, prompt):
        forwards.append(len(x))
        return inner(self, transformer, x, sigma, prompt)

    monkeypatch.setattr(evaluation.Denoiser, "_forward", counting)
    return forwards


@pytest.mark.journey  # as long as a whole run
def test_teachers_samples_are_stored_and_a_students_are_not(measured, monkeypatch):
    subject, table = measured()
    rows = samplers(subject.config)
    forwards = count_forwards(monkeypatch)
    again = Evaluation(subject.run, PROMPTS)
    for row in (rows.independent, rows.paired, rows.few_guided, rows.few_unguided):
        again.draw(row)
    assert forwards == []
    again.draw(rows.students[0])
    assert sum(forwards) == 8 * 4
    assert again.measure()["gap_closed"] == pytest.approx(table["gap_closed"])


def test_stored_samples_that_changed_on_the_disk_are_refused(make_run):
    subject = Evaluation(make_run(method="trajectory", eval_samples=2), PROMPTS)
    row = samplers(subject.config).few_unguided
    subject.draw(row)
    file = subject.cache_file(row)
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"missing or damaged.*delete it and run again"):
        subject.draw(row)


def test_what_a_teachers_samples_depend_on_names_them(make_run):
    run = make_run(method="trajectory")
    row = samplers(run.config).paired
    files = {Evaluation(run, PROMPTS).cache_file(row)}
    changes = [
        dict(eval_seed=5),
        dict(guidance_scale_2=2.0),
        dict(negative_prompt="a green dot"),
        dict(num_frames=9),
        dict(base_precision="nf4"),
        dict(mixed_precision="bf16"),
        dict(eval_samples=4),
    ]
    for change in changes:
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, **change))
        files.add(Evaluation(other, PROMPTS).cache_file(row))
    files.add(Evaluation(run, PROMPTS[:2]).cache_file(row))
    assert len(files) == 2 + len(changes)


# -------------------------------------------------------------------------------- student's weights


def test_a_students_adapters_are_merged_where_that_is_exact(make_run, monkeypatch):
    """In float32 the student is measured as users run it, without a LoRA layer at work, and gives
    the samples that its adapters give.
    """
    run = make_run(method="trajectory", lora_alpha=4.0)
    write_student(run, "high", "low")
    subject = Evaluation(run, PROMPTS)
    (student,) = samplers(run.config).students
    calls = adapter_calls(monkeypatch)
    merged = subject.draw(student)
    assert calls == []
    with pytest.MonkeyPatch.context() as unfused:
        unfused.setattr(WanTransformer3DModel, "fuse_lora", lambda self: None)
        apart = subject.draw(student)
    assert len(calls) > 0
    torch.testing.assert_close(merged, apart, rtol=0, atol=1e-4)
    teacher = samplers(run.config).few_unguided
    assert (merged - subject.draw(teacher)).abs().max() > 0.01


@pytest.mark.parametrize("changes", [dict(mixed_precision="bf16"), dict(base_precision="nf4")])
def test_adapters_stay_apart_where_merging_would_round_them(make_run, monkeypatch, changes):
    run = make_run(method="trajectory", lora_alpha=4.0, **changes)
    write_student(run, "high", "low")
    calls = adapter_calls(monkeypatch)
    Evaluation(run, PROMPTS).draw(samplers(run.config).students[0])
    assert len(calls) > 0


def adapter_calls(monkeypatch, switched_off: bool = False) -> list[Linear]:
    """The LoRA layers that add their part to a forward, once for each time; or also those that
    might, but are switched off or merged.
    """
    calls: list[Linear] = []
    inner = Linear.forward

    def watching(self, *given, **more):
        if switched_off or not (self.merged or self.disable_adapters):
            calls.append(self)
        return inner(self, *given, **more)

    monkeypatch.setattr(Linear, "forward", watching)
    return calls


def test_an_expert_without_a_student_is_the_teachers(make_run):
    run = make_run(method="trajectory", lora_alpha=4.0, expert="low")
    write_student(run, "low")
    (student,) = samplers(run.config).students
    alone = Evaluation(run, PROMPTS).draw(student)
    write_student(run, "high", "low")
    assert not torch.equal(alone, Evaluation(run, PROMPTS).draw(student))


def test_a_student_that_is_not_there_is_asked_for(make_run):
    run = make_run(method="trajectory")
    with pytest.raises(UsageError, match=r"holds no high_noise_lora\.safetensors to evaluate"):
        Evaluation(run, PROMPTS).draw(samplers(run.config).students[0])


def test_only_the_main_process_measures(make_run):
    run = make_run(method="trajectory")
    run.runtime.is_main = False
    assert Evaluation(run, PROMPTS).measure() is None
    assert not run.folder.evaluation.exists()


def test_an_expert_that_was_carried_over_is_the_students_own(make_run):
    """From a warm start, although this run does not train it."""
    run = make_run(method="trajectory", expert="high", eval_samples=2)
    subject = Evaluation(run, PROMPTS)
    assert subject._has_own("high") and not subject._has_own("low")
    write_student(run, "low")
    assert subject._has_own("low")
