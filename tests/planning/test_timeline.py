"""The legs of a job's progress bar are the plan's parts in the order of time; its first lines."""

from __future__ import annotations

import dataclasses

import pytest

from wan_distill.planning.hardware import Hardware
from wan_distill.planning.headline import headline
from wan_distill.planning.parts import parts
from wan_distill.planning.picture_work import encoding_flops
from wan_distill.planning.timeline import timeline
from wan_distill.planning.work import sample_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve_stages

CPU = Hardware("cpu", 1, 8e9, 1e10, "assumed", named=False, is_gpu=False)
STAGES = ("encode", "solve", "high", "solve", "low", "solve", "refine low")


@pytest.fixture(scope="module")
def job():
    """(stages, teacher) of the default run."""
    info = read_teacher(Config())
    return resolve_stages(Config(), info), info


@pytest.mark.journey  # as long as a whole run
def test_the_legs_are_in_the_order_of_time_and_take_what_is_planned(job):
    stages, info = job
    legs = timeline(stages, info, 144, CPU)
    assert tuple(leg.name for leg in legs) == (*STAGES, "evaluate")
    planned = sum(part.seconds(CPU) for part in parts(stages, info, 144))
    assert sum(leg.seconds for leg in legs) == pytest.approx(planned)
    assert all(leg.seconds > 0 for leg in legs if leg.name != "solve")


@pytest.mark.journey  # as long as a whole run
def test_pictures_are_encoded_after_their_captions():
    config = Config(teacher_path="tiny-i2v")
    info = read_teacher(config)
    stages = resolve_stages(config, info)
    encode, pictures, *later = timeline(stages, info, 576, CPU)
    assert (encode.name, pictures.name, later[0].name) == ("encode", "encode pictures", "solve")
    # As the VAE really takes: its first layer alone makes 27 products of each of 17 x 64 x 64 x 3
    # values for each of its channels.
    least = 2 * 27 * 17 * 64 * 64 * 3 * info.vae["base_dim"]
    assert 5 * least < pictures.seconds * CPU.rate / 576 < 500 * least and pictures.units == 576
    longer = dataclasses.replace(stages[-1], num_frames=33)
    assert encoding_flops(longer, info) == pytest.approx(
        2 * encoding_flops(stages[-1], info), rel=0.15
    )


@pytest.mark.journey  # as long as a whole run
def test_samples_are_solved_by_the_first_that_reads_them(job):
    stages, info = job
    legs = [leg for leg in timeline(stages, info, 144, CPU) if leg.name == "solve"]
    steps = sum(w.rows * (len(w.spec.sigmas) - 1) for w in sample_work(stages, info))
    assert sum(leg.units for leg in legs) == pytest.approx(steps)
    first, *later = (leg.seconds for leg in legs)
    assert first > 1.5 * sum(later)  # the teacher's are shared by experts and stages
    assert min(later) > 0  # each stage's low expert begins where a distilled high one ended


@pytest.mark.journey  # traces A14B
def test_several_devices_share_the_solving_and_one_expert_is_one_leg(job):
    stages, info = job
    eight = dataclasses.replace(CPU, count=8)
    one, many = (timeline(stages, info, 144, h)[1] for h in (CPU, eight))
    assert (many.seconds, many.units) == pytest.approx((one.seconds / 8, one.units / 8))
    low = tuple(dataclasses.replace(stage, expert="low", evaluate=False) for stage in stages)
    names = [leg.name for leg in timeline(low, info, 144, CPU)]
    assert names == ["encode", "solve", "low", "solve", "refine low"]
    measured = (dataclasses.replace(stages[-1], evaluate_only=True),)
    assert [leg.name for leg in timeline(measured, info, 144, CPU)] == ["encode", "evaluate"]


def test_the_first_lines_say_what_from_what_where_how_long_and_what_it_costs(job):
    stages, info = job
    seconds = sum(part.seconds(CPU) for part in parts(stages, info, 144))
    on_cpu = headline(stages, info, 120, 24, CPU)
    assert [line.split()[0] for line in on_cpu] == ["Student", "Teacher", "On", "Time", "Output"]
    assert "4 steps without guidance" in on_cpu[0] and "trajectory+dmd" in on_cpu[0]
    assert "120 prompts, 24 more to measure with" in on_cpu[1]
    assert "no GPU to pay for" in on_cpu[3]
    gpu = dataclasses.replace(CPU, title="A card", count=2, is_gpu=True, rate=CPU.rate / 1000)
    line = headline(stages, info, 120, 24, gpu)[3]
    dollars = int(line.split("$")[1].split()[0].replace(",", ""))
    alone = 2 * 1000 * seconds / 3600 * 2.5
    assert 0.4 * alone < dollars < alone  # two cards share a part of the work
