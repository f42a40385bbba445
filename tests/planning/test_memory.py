"""Predicted memory against measured memory, and what each setting does to it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from wan_shapes import A14B, MIDDLE, MIDDLE_CLIP, config_of, measured, teacher_of

from wan_distill.errors import UsageError
from wan_distill.model.loading import Teacher
from wan_distill.planning import levers
from wan_distill.planning.decoding import decoding_bytes
from wan_distill.planning.memory import estimate
from wan_distill.planning.trace import Ledger
from wan_distill.planning.work import update_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import read_teacher
from wan_distill.settings.resolve import resolve
from wan_distill.system.runtime import Runtime

# A14B's updates on fake tensors, and real ones: as long as a whole run.
pytestmark = pytest.mark.journey
METHODS = {
    "trajectory": dict(method="trajectory"),
    "consistency": dict(method="consistency"),
    "dmd": dict(method="dmd"),
    "dmd-samples": dict(method="dmd", real_score="samples"),
    "dmd-paired": dict(method="dmd", real_score="paired"),
}
CASES = [  # dmd without checkpointing: below, on a larger clip
    ("trajectory", True),
    ("trajectory", False),
    ("consistency", False),
    ("dmd", True),
    ("dmd-samples", False),
    ("dmd-paired", True),
]


@pytest.mark.parametrize(("name", "checkpointing"), CASES)
def test_predicted_peak_and_work_of_a_middling_model_are_those_of_real_updates(
    name, checkpointing, tmp_path
):
    """Two of each role. With dmd that is a critic's and a student's, whose parts are computed one
    graph at a time; the exit step, on which the number of evaluations depends, is the last one.
    """
    info = teacher_of(MIDDLE, tmp_path)
    changes = MIDDLE_CLIP | METHODS[name] | dict(gradient_checkpointing=checkpointing)
    once = dict(expert="high", max_train_steps=1, critic_warmup_steps=1, critic_updates=1)
    config = config_of(info, **changes | once)
    need = estimate(config, info)
    real = measured(config, info)
    assert need.peak == pytest.approx(real.peak, rel=0.1)
    work = sum(2 * role.flops for role in update_work(config, need.trace))
    assert work == pytest.approx(real.flops, rel=0.02)


def test_a_picture_beside_the_latents_is_in_the_prediction(tmp_path):
    info = teacher_of(MIDDLE | dict(in_channels=36), tmp_path, takes_picture=True)
    config = config_of(info, **MIDDLE_CLIP, method="trajectory", gradient_checkpointing=True)
    need = estimate(config, info)
    assert need.peak == pytest.approx(measured(config, info).peak, rel=0.1)
    text = teacher_of(MIDDLE, tmp_path)
    assert need.trace.parameters > estimate(config_of(text, **MIDDLE_CLIP), text).trace.parameters


def test_a_guided_score_is_evaluated_while_the_students_graph_is_in_memory(tmp_path):
    """Both halves of it in one forward. On larger clips that is more than a backward pass needs."""
    info = teacher_of(MIDDLE | dict(num_layers=2), tmp_path)
    changes = dict(method="dmd", real_score="guided", gradient_checkpointing=False)
    changes |= dict(height=160, width=160)
    config = config_of(info, **MIDDLE_CLIP | changes)
    need = estimate(config, info)
    assert need.activations > 1.2 * need.trace.activations
    assert need.peak == pytest.approx(measured(config, info).peak, rel=0.1)


@pytest.mark.parametrize("method", ["trajectory", "dmd"])
def test_predicted_peak_of_the_embedded_teacher_is_within_a_tenth_of_the_measured_one(method):
    config = Config(train_batch_size=8, method=method, monitor_steps=0, validation_steps=0)
    info = read_teacher(config)
    config = resolve(config, info)
    predicted = estimate(config, info).peak
    assert predicted == pytest.approx(measured(config, info).peak, rel=0.1)


def test_pictures_of_the_checks_take_what_decoding_them_really_takes():
    """They are made beside the expert. Of clips of five latent frames, predicted from four."""
    config = Config(num_frames=17, sample_batch_size=2)
    info = read_teacher(config)
    config = resolve(config, info)
    vae = Teacher(info, config, Runtime(config)).load_vae()
    held = [*vae.parameters(), *vae.buffers()]
    with Ledger(held) as ledger, torch.no_grad():
        vae.decode(torch.zeros(2, *info.latent_shape(config)))
    weights = sum(t.untyped_storage().nbytes() for t in held)
    predicted = decoding_bytes(config, info)
    assert predicted == pytest.approx(weights + ledger.peak, rel=0.02)
    unseen = dataclasses.replace(config, monitor_steps=0, validation_steps=0)
    need, plain = estimate(config, info), estimate(unseen, info)
    assert need.activations == max(predicted, plain.activations)
    crowd = dataclasses.replace(config, sample_batch_size=64)
    assert estimate(crowd, info).activations == decoding_bytes(crowd, info) > 4 * predicted


# ------------------------------------------------------------------------------- setting by setting


@pytest.fixture
def a14b(tmp_path):
    return teacher_of(A14B, tmp_path)


def test_the_default_dmd_update_of_a14b_fits_a_card_of_80_gb(a14b):
    """81 frames of 480x832 with a bf16 base, and both losses of the student."""
    config = config_of(a14b)
    assert (config.method, config.num_frames, config.height, config.width) == ("dmd", 81, 480, 832)
    need = estimate(config, a14b)
    assert 40e9 < need.peak <= 70e9
    assert need.base == pytest.approx(2 * 14.29e9, rel=0.02)  # bf16 but for norms and tables


def test_a_coarser_base_is_a_smaller_one(a14b):
    config = config_of(a14b)
    bases = {
        name: estimate(dataclasses.replace(config, base_precision=name), a14b).base
        for name in ("bf16", "fp8", "int8", "nf4")
    }
    assert bases["fp8"] == bases["int8"]
    assert bases["bf16"] - bases["fp8"] > 13e9 and bases["fp8"] - bases["nf4"] > 6e9
    in_host_memory = estimate(dataclasses.replace(config, offload=True), a14b)
    assert in_host_memory.base < 0.02 * bases["bf16"]


def test_kept_attention_takes_a_tensor_per_block(a14b):
    config = config_of(a14b)
    plain = estimate(config, a14b)
    kept = estimate(dataclasses.replace(config, keep_attention=True), a14b)
    block = 32760 * (5120 * 2 + 40 * 4)  # bf16, and a float32 per head; the last is there anyway
    assert kept.activations - plain.activations == pytest.approx(39 * block, rel=0.001)
    assert kept.trace.update_flops < 0.88 * plain.trace.update_flops
    advice = dict(
        (flags, saved)
        for saved, flags in levers.savings(
            dataclasses.replace(config, keep_attention=True), a14b, kept
        )
    )
    assert advice["--no-keep_attention"] == kept.peak - plain.peak


def test_processes_that_share_a_base_or_a_clip_share_its_memory(a14b):
    config = config_of(a14b, gpu="h100:4", dry_run=True)
    alone = estimate(config, a14b)
    shard = estimate(dataclasses.replace(config, shard=True), a14b)
    assert shard.base == alone.base / 4 and shard.activations == alone.activations
    together = estimate(dataclasses.replace(config, context_parallel=True), a14b)
    assert together.base == alone.base and together.activations == alone.activations / 4


def test_the_processes_of_a_launcher_count_too(a14b, monkeypatch):
    config = config_of(a14b, shard=True)
    whole = estimate(config, a14b).base
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert estimate(config, a14b).base == whole / 2


def test_every_role_has_an_adapter_and_two_moments_for_it(a14b):
    config = config_of(a14b, method="dmd")
    adapter = 4 * estimate(config, a14b).trace.adapter
    for real_score, roles in (("guided", 2), ("samples", 3)):
        need = estimate(dataclasses.replace(config, real_score=real_score), a14b)
        assert need.adapters == roles * adapter and need.optimizer == 2 * roles * adapter
        assert need.average == adapter
    small = estimate(
        dataclasses.replace(config, real_score="guided", use_8bit_adam=True, ema_decay=0.0), a14b
    )
    assert small.optimizer == 2 * 2 * adapter / 4 and small.average == 0


def test_a_whole_student_has_no_base_beneath(a14b):
    config = config_of(a14b, method="trajectory", student_layers=20)
    need = estimate(config, a14b)
    assert need.base == 0 and need.adapters == 4 * need.trace.parameters
    assert need.trace.parameters == pytest.approx(14.29e9 / 2, rel=0.05)


# ------------------------------------------------------------------------------------------ levers


def test_out_of_memory_says_what_to_try_by_saving(a14b):
    config = config_of(a14b, gradient_checkpointing=False)
    with (
        pytest.raises(UsageError) as raised,
        levers.explain_out_of_memory(config, a14b, "training the high expert"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    said = str(raised.value)
    assert "while training the high expert" in said
    assert "--gradient_checkpointing saves about" in said
    saved = [float(part.split("about ")[1].split()[0]) for part in said.split("; ")[2:]]
    assert len(saved) > 2 and saved == sorted(saved, reverse=True)


def test_an_error_that_is_not_about_memory_is_left_alone(tmp_path):
    info = teacher_of(MIDDLE, tmp_path)
    config = config_of(info, **MIDDLE_CLIP)
    with (
        pytest.raises(RuntimeError, match="of another kind"),
        levers.explain_out_of_memory(config, info, "training"),
    ):
        raise RuntimeError("of another kind")


def test_the_savings_are_those_of_the_settings_that_are_named(a14b):
    config = config_of(a14b)
    need = estimate(config, a14b)
    found = dict((flags, saved) for saved, flags in levers.savings(config, a14b, need))
    smaller = estimate(dataclasses.replace(config, base_precision="nf4"), a14b)
    assert found["--base_precision nf4"] == need.peak - smaller.peak
    assert all(math.isfinite(saved) and saved > 0.01 * need.peak for saved in found.values())
    assert "--train_batch_size 1" not in found  # it is 1 already
