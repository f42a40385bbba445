"""The plan in words: everything that is promised, for this machine or for a named GPU, loading no
weights.
"""

from __future__ import annotations

import io
import re
import sys

import pytest
from conftest import tiny_flags
from diffusers import WanTransformer3DModel
from wan_shapes import A14B, config_of, teacher_of

import train_distillation
from wan_distill.errors import UsageError
from wan_distill.planning import hardware, levers, plan, preflight
from wan_distill.planning.hardware import GPUS, Hardware, parse_gpu
from wan_distill.planning.matrix_rate import MatrixRate
from wan_distill.planning.parts import parts
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT


@pytest.fixture
def a14b(tmp_path):
    return teacher_of(A14B, tmp_path)


@pytest.fixture(autouse=True)
def a_fixed_rate(monkeypatch):
    """No time is spent on measuring this machine."""
    monkeypatch.setattr(hardware, "measured", lambda *given: MatrixRate(1e11))


@pytest.mark.journey  # as long as a whole run
def test_a14b_is_described_in_words(a14b):
    text = plan.describe_needs((config_of(a14b),), a14b)
    for words in ("32760 tokens", "14.3B parameters", "Fits ", "checkpoints", "solved samples"):
        assert words in text, words
    assert re.search(r"h200 +--base_precision bf16 --num_frames 81", text)


@pytest.mark.journey  # as long as a whole run
def test_what_fits_never_promises_more_than_the_card_has(a14b):
    fits = levers.what_fits(config_of(a14b), a14b)
    assert list(fits) == list(levers.CARDS) and all(fits.values())
    for card, text in fits.items():
        assert float(text.split("peak ")[1].split()[0]) * 1e9 < GPUS[card].memory


@pytest.mark.journey  # as long as a whole run
def test_what_fits_takes_the_largest_clip_then_the_most_exact_base(a14b):
    config = config_of(a14b)
    fits = levers.what_fits(config, a14b)
    assert fits["h200"].startswith("--base_precision bf16 --num_frames 81 (peak")
    frames = [int(text.split("--num_frames ")[1].split()[0]) for text in fits.values()]
    assert frames == sorted(frames)
    for card in ("rtx-5090", "l40s"):  # exact, and the same clip as a quantised base at most
        assert fits[card].startswith("--offload") and "--base_precision bf16" in fits[card]
        assert re.search(r"\(peak \S+ GB, \S+ GB on the host\)", fits[card])


def test_dry_run_prints_the_plan_and_loads_no_weights(
    random_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        WanTransformer3DModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded")
    )
    out = tmp_path / "out"
    assert train_distillation.main(tiny_flags(random_teacher, out, dry_run=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    for heading in (
        *("Teacher", "Clip", "Student", "Method", "Prompts", "Output"),
        *("On", "Fits", "Time", "Model", "Memory", "Disk", "Work", "Cards"),
        *("Versions", "Files", "RAM"),
    ):
        assert any(line.startswith(f"{heading} ") for line in lines), heading
    assert not out.exists()


def test_dry_run_prints_the_whole_plan_and_then_every_obstacle(
    random_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    monkeypatch.setattr(preflight, "check_disk", refuse("the disk is full"))
    monkeypatch.setattr(preflight, "check_memory", refuse("too little memory"))
    flags = tiny_flags(random_teacher, tmp_path / "out", dry_run=True, report_to="trackio")
    assert train_distillation.main(flags) == 2
    said = capsys.readouterr()
    for heading in ("Teacher", "Output", "Memory", "Work", "Versions", "Files"):
        assert any(line.startswith(heading) for line in said.out.splitlines()), heading
    assert [line.split(";")[0] for line in said.err.strip().splitlines()] == [
        "error: --report_to trackio: not installed",
        "error: the disk is full",
        "error: too little memory",
    ]
    assert not (tmp_path / "out").exists()


def refuse(words: str):
    def check(*given):
        raise UsageError(words)

    return check


def test_a_real_run_stops_at_the_first_obstacle_and_makes_nothing(
    random_teacher, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(preflight, "check_disk", refuse("the disk is full"))
    assert train_distillation.main(tiny_flags(random_teacher, tmp_path / "out")) == 2
    assert capsys.readouterr().err.strip() == "error: the disk is full"
    assert not (tmp_path / "out").exists()


def test_a_console_without_the_characters_shows_escapes(random_teacher, tmp_path, monkeypatch):
    """As on Windows, where a pipe is cp1252 and Wan's negative prompt Chinese."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    flags = tiny_flags(
        random_teacher,
        tmp_path / "out",
        method="dmd",
        dry_run=True,
        negative_prompt=WAN_NEGATIVE_PROMPT,
    )
    assert train_distillation.main(flags) == 0
    sys.stdout.flush()
    assert WAN_NEGATIVE_PROMPT.startswith("\u8272")
    assert b"--negative_prompt \\u8272" in written.getvalue()


# --------------------------------------------------------------------------------------------- time


def hours(text: str) -> float:
    value, unit = re.search(r"Time +about ([\d.]+) (hours|minutes)", text).groups()
    return float(value) / (1 if unit == "hours" else 60)


@pytest.mark.journey  # traces A14B
def test_more_gpus_solve_faster_but_make_no_fewer_updates(a14b):
    """Data-parallel processes each make every update, on samples of their own."""
    config = config_of(a14b, gpu="h100", dry_run=True, refine_expert="both")
    eight = Hardware("H100", 8, 85e9, 4e14, "", named=True)
    alone = Hardware("H100", 1, 85e9, 4e14, "", named=True)
    shares = {part.name: part for part in parts((config,), a14b, prompts=100)}
    for name in ("high expert", "low expert"):
        assert shares[name].seconds(eight) == shares[name].seconds(alone)
    solving = shares["solving samples"]
    assert solving.seconds(eight) == pytest.approx(solving.seconds(alone) / 8)
    together = config_of(a14b, gpu="h100", dry_run=True, context_parallel=True)
    shares = {part.name: part for part in parts((together,), a14b, prompts=100)}
    assert shares["low expert"].seconds(eight) == shares["low expert"].seconds(alone) / 8


@pytest.mark.journey  # as long as a whole run
def test_eight_gpus_share_the_batch_of_one(a14b):
    """As many updates of as many samples, each GPU an eighth of them."""
    one = plan.describe_needs((config_of(a14b, gpu="h100", dry_run=True),), a14b)
    eight = plan.describe_needs((config_of(a14b, gpu="h100:8", dry_run=True),), a14b)

    def updates(text: str) -> str:
        return re.search(r"low +student .*\((\d+) samples\), (\d+) updates", text)[2]

    assert updates(one) == updates(eight)
    # The text encoder, checks and previews are one GPU's work.
    assert hours(one) / 8 < hours(eight) < hours(one) / 4


@pytest.mark.journey  # traces A14B
def test_a_named_gpu_says_whether_it_fits_and_what_it_costs(a14b):
    config = config_of(a14b, gpu="h100:2", dry_run=True, gpu_hour_price=2.0)
    text = plan.describe_needs((config,), a14b)
    assert "On        2 x H100 SXM" in text and "Fits      yes" in text
    cost, gpu_hours = re.search(r"about \$([\d,]+): ([\d.]+) GPU-hours at \$2 ", text).groups()
    assert float(cost.replace(",", "")) == pytest.approx(2 * float(gpu_hours), abs=0.6)
    assert float(gpu_hours) == pytest.approx(2 * hours(text), rel=0.05)
    small = plan.describe_needs((config_of(a14b, gpu="rtx-4090", dry_run=True),), a14b)
    assert "Fits      NO" in small
    here = plan.describe_needs((config_of(a14b),), a14b)
    assert "Cost" not in here and "measured here" in here and "other work" not in here


@pytest.mark.journey  # traces A14B
def test_the_plan_of_a_busy_machine_is_that_of_an_idle_one_and_says_so(a14b, monkeypatch):
    """Half of the processor is somebody else's while the rate is measured."""
    config = config_of(a14b)
    idle = plan.describe_needs((config,), a14b)
    monkeypatch.setattr(hardware, "measured", lambda *given: MatrixRate(0.5e11, busy=0.5))
    busy = plan.describe_needs((config,), a14b)
    assert hours(busy) == hours(idle)
    twice = re.search(r"Time .*?, ([\d.]+) hours if other work keeps 50% of the processor", busy)[1]
    assert float(twice) == pytest.approx(2 * hours(idle), rel=0.01)
    assert "if nothing else runs; other work took 50% of the processor" in busy
    assert hardware.hardware_of(config, a14b).slower == 2


def test_gpus_are_named_and_counted():
    assert parse_gpu("h100") == (GPUS["h100"], 1)
    assert parse_gpu(" H200:8") == (GPUS["h200"], 8)
    for wrong in ("h101", "h100:0", "h100:x", "h100:", ""):
        with pytest.raises(UsageError, match="--gpu"):
            parse_gpu(wrong)


@pytest.mark.parametrize(("changes", "said"), [(dict(gpu="h100"), "--dry_run")])
def test_a_named_gpu_is_for_plans_only(random_teacher, tmp_path, capsys, changes, said):
    assert train_distillation.main(tiny_flags(random_teacher, tmp_path / "out", **changes)) == 2
    assert said in capsys.readouterr().err
