"""Phased distribution matching: who learns when, on which inputs, and what is evaluated for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lessons import Lesson, make_lesson, solved_inputs

from wan_distill.data.samples import SampleStore, open_inputs
from wan_distill.maths.flow import sample
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import expert_of
from wan_distill.methods import make_method
from wan_distill.model.adapters import adapter_parameters
from wan_distill.model.student_files import save_lora

BOUNDARY = 0.875
EXPERTS = pytest.mark.parametrize("expert", ["high", "low"])


class Counted:
    """Counts forwards of a Denoiser by (role, with gradient), and records the sigmas."""

    def __init__(self, denoiser):
        self.calls = []
        self.sigmas = []
        self.inner = denoiser.velocity
        denoiser.velocity = self.velocity

    def velocity(self, x, sigma, prompt, *, role):
        self.calls.append((role, torch.is_grad_enabled()))
        self.sigmas.append((role, sigma))
        return self.inner(x, sigma, prompt, role=role)


def rows_of(x: torch.Tensor, store: SampleStore, sigma: float) -> list[int]:
    """Which of the stored samples `x` [B, C, F, H, W] are, by their latents at `sigma`."""
    stored = [store.at([i], [sigma])[0] for i in range(len(store))]
    return [next(i for i, latents in enumerate(stored) if torch.equal(latents, row)) for row in x]


# ------------------------------------------------------------------------------------- who and when


def test_the_critic_leads_and_the_schedule_is_exact(small_config):
    config = small_config(
        method="dmd", critic_warmup_steps=3, critic_updates=2, diversity_weight=0.0
    )
    method = make_method(config, "high")
    roles = [method.role_at(step) for step in range(method.updates(2))]
    assert roles == ["fake_score"] * 3 + (["fake_score"] * 2 + ["student"]) * 2
    assert [method.draws_of(step) for step in range(9)] == list(range(9))


@EXPERTS
def test_both_scores_learn_side_by_side_on_the_same_draws(make_run, expert):
    run = make_run(method="dmd", real_score="samples", critic_warmup_steps=3, critic_updates=2)
    method, inputs = make_method(run.config, expert), solved_inputs(run, expert)
    steps = range(method.updates(2))
    both = ["fake_score", "real_score"]
    assert [method.role_at(step) for step in steps] == both * 3 + (both * 2 + ["student"]) * 2
    samples = inputs.samples["samples"]
    starts = inputs.samples["inputs 4"] if expert == "low" else samples
    for step in steps:
        role, drawn = method.role_at(step), method.draws_of(step)
        assert drawn == step - (role == "real_score")
        batch = method.batch_at(inputs, drawn, drawn)
        (rows,) = {tuple(rows) for rows in method.rows_at(drawn, drawn).values()}
        assert len(rows) == len(batch.x) == 2
        for j, row in enumerate(rows):
            # Of student and teacher: the same prompt and, in the end, the same noise.
            assert torch.equal(batch.x[j], starts.at([row], [batch.sigmas[0]])[0])
            assert torch.equal(starts.noise(row), samples.noise(row))
            assert torch.equal(batch.prompt[j], samples.prompt([row])[0])
        if role == "student":
            assert batch.teacher_end is None  # no loss of the student's reads it
        else:
            end = samples.at(rows, [batch.sigmas[-1]] * len(rows))
            assert torch.equal(batch.teacher_end, end)


@EXPERTS
def test_a_student_that_samples_like_the_teacher_is_not_moved(make_run, expert):
    """Whatever error the noise causes, it is the same in both scores: they stay equal to the bit,
    and their difference is 0.
    """
    run = make_run(
        method="dmd",
        real_score="samples",
        critic_warmup_steps=0,
        critic_updates=3,
        diversity_weight=0.0,
        learning_rate=1e-2,
        fake_score_learning_rate=1e-2,
        adam_beta1=0.9,
    )
    lesson = make_lesson(run, expert, moved=0.0)
    samples = lesson.inputs.samples["samples"]

    def perfect(denoiser, batch):
        """What the student of every exit should arrive at."""
        rows = rows_of(batch.x, samples, batch.sigmas[0])
        end = samples.at(rows, [batch.sigmas[-1]] * len(rows))
        sigma = torch.full((len(end),), batch.sigmas[0], dtype=torch.float64)
        return denoiser.velocity(batch.x, sigma, batch.prompt, role="student"), end

    lesson.method.rollout = perfect
    losses = []
    for step in range(lesson.method.updates(2)):
        role, drawn = lesson.method.role_at(step), lesson.method.draws_of(step)
        parts = lesson.learn(role, lesson.batch(step), generator("side by side", drawn))
        if role == "student":
            assert float(parts[0].metrics["matching_gradient"]) == 0
        total = torch.stack([part.value.detach() for part in parts]).sum()
        lesson.learners[role].update(run.runtime, total)
        losses.append(float(total))
    fake, real, next_fake = losses[:3]
    assert fake == real != next_fake
    scores = [lesson.learners[role].parameters.values() for role in ("fake_score", "real_score")]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*scores, strict=True))


# ------------------------------------------------------------------------------ what is evaluated


def check_every_gradient(lesson: Lesson, role: str) -> None:
    """Every trained tensor of `role` has a gradient that is not zero."""
    for transformer in lesson.denoiser.experts.values():
        gradients = [p.grad for p in adapter_parameters(transformer, role).values()]
        assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients)


@EXPERTS
@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("real", ["guided", "samples"])
def test_nothing_runs_past_the_exit_and_only_the_exit_learns(make_run, expert, exit, real):
    run = make_run(method="dmd", diversity_weight=0.0, real_score=real)
    lesson = make_lesson(run, expert, moved=0.02)
    batch = dataclasses.replace(lesson.batch(0), exit=exit)
    counted = Counted(lesson.denoiser)
    lesson.learn("student", batch, generator("g"))
    rollout = [call for call in counted.calls if call[0] == "student"]
    assert rollout == [("student", False)] * exit + [("student", True)]
    judge = "teacher" if real == "guided" else "real_score"
    judged = [call for call in counted.calls if call[0] != "student"]
    assert judged == [(judge, False), ("fake_score", False)]
    check_every_gradient(lesson, "student")

    draws = run.config.score_draws if expert == "high" else 1
    counted.calls.clear()
    lesson.learn("fake_score", batch, generator("g"))
    assert counted.calls == [("student", False)] * (exit + 1) + [("fake_score", True)] * draws
    check_every_gradient(lesson, "fake_score")
    if real == "samples":  # no rollout: the teacher's samples are stored
        counted.calls.clear()
        lesson.learn("real_score", batch, generator("g"))
        assert counted.calls == [("real_score", True)] * draws
        check_every_gradient(lesson, "real_score")
    scored = torch.cat([sigma for role, sigma in counted.sigmas if role != "student"])
    assert {expert_of(float(s), BOUNDARY) for s in scored} == {expert}


@pytest.mark.parametrize(("expert", "guided"), [("high", 4.5), ("low", 2.5)])
def test_the_guidance_of_the_teachers_score_is_each_experts_own(make_run, expert, guided):
    scales = dict(real_score_guidance_scale=4.5, real_score_guidance_scale_2=2.5)
    lesson = make_lesson(make_run(method="dmd", diversity_weight=0.0, **scales), expert)
    inner, asked = lesson.denoiser.guided_velocity, []

    def guided_velocity(x, sigma, prompt, negative, scale):
        asked.append(scale)
        return inner(x, sigma, prompt, negative, scale)

    lesson.denoiser.guided_velocity = guided_velocity
    lesson.learn("student", lesson.batch(0), generator("g"))
    assert asked == [guided]


# ------------------------------------------------------------------------------- exits and phases


def test_the_exit_is_agreed_over_ranks_and_changes_with_the_update(make_run):
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=(2, 4, 8))
    method, inputs = make_method(run.config, "high"), open_inputs(run, "high")
    exits = set()
    for step in range(80):
        ranks = [method.batch_at(inputs, step, micro) for micro in (2 * step, 2 * step + 1)]
        assert len({(b.sigmas, b.exit) for b in ranks}) == 1
        assert not torch.equal(ranks[0].x, ranks[1].x)
        exits.add((len(ranks[0].sigmas) - 1, ranks[0].exit))
    assert exits == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}


@pytest.mark.parametrize(
    ("steps", "end"), [((1,), 0.0), ((2,), 5 / 6), ((3,), 5 / 7), ((6,), 5 / 6), ((8,), 5 / 6)]
)
def test_any_number_of_steps_has_its_own_hand_over(make_run, steps, end):
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=steps)
    assert run.config.experts == (("high", "low") if end else ("high",))
    batch = make_method(run.config, "high").batch_at(open_inputs(run, "high"), 0, 0)
    assert batch.sigmas[0] == 1 and batch.sigmas[-1] == pytest.approx(end)


def test_the_diversity_loss_takes_the_first_step_from_the_matching_loss(make_run):
    run = make_run(method="dmd", diversity_weight=0.05, critic_warmup_steps=0, critic_updates=1)
    lesson = make_lesson(run, "high", moved=0.02)
    assert {lesson.batch(step).exit for step in range(20)} == {1}
    assert lesson.batch(0).anchor is None  # the critic's update
    batch, anchors = lesson.batch(1), lesson.inputs.samples["anchors"]
    (second,) = anchors.spec.stored
    rows = rows_of(batch.x, anchors, 1.0)
    assert torch.equal(batch.x, torch.stack([anchors.noise(row) for row in rows]))
    assert torch.equal(batch.anchor, anchors.at(rows, [second] * 2))
    matching, diversity = lesson.learn("student", batch, generator("g"))
    with torch.no_grad():
        sigma = torch.ones(2, dtype=torch.float64)
        velocity = lesson.denoiser.velocity(batch.x, sigma, batch.prompt, role="student")
    target = (batch.x - batch.anchor) / (1 - second)
    expected = (velocity - target).square().mean()
    torch.testing.assert_close(diversity.metrics["diversity_loss"], expected)
    torch.testing.assert_close(diversity.value.detach(), 0.05 * expected)
    assert "diversity_loss" not in matching.metrics


# ------------------------------------------------------------------------------ the low expert's


def test_the_low_phase_begins_where_the_distilled_high_expert_ends(make_run):
    """Each sampling grid at the end of its own high phase: that of 2 steps goes straight there."""
    run = make_run(method="dmd", diversity_weight=0.0, sampling_steps=(2, 4))
    high = make_lesson(run, "high", moved=0.05)
    weights = high.learners["student"].exported()
    file = run.folder.lora("high")
    save_lora(file, weights, run.config, run.info, "high")
    inputs, low = solved_inputs(run, "low"), make_method(run.config, "low")

    def carried(steps: int, row: int) -> torch.Tensor:
        """Latents of one row where the high phase of `steps` ends."""
        store = inputs.samples[f"inputs {steps}"]
        prompt = store.prompt([row])
        sigmas = [sigma for sigma in run.config.sigmas(steps) if sigma >= 0.83]
        assert len(sigmas) == steps // 2 + 1
        with torch.no_grad():
            return sample(
                lambda x, s: high.denoiser.velocity(x, s, prompt, role="student"),
                store.noise(row)[None],
                sigmas,
            )[0]

    assert (carried(2, 0) - carried(4, 0)).abs().max() > 1e-2
    grids = set()
    for step in range(8):
        batch = low.batch_at(inputs, step, step)
        steps = {(5 / 6, 0): 2, (5 / 6, 0.625, 0): 4}[batch.sigmas]
        grids.add(steps)
        for latents, row in zip(batch.x, low.rows_at(step, step)[f"inputs {steps}"], strict=True):
            torch.testing.assert_close(latents, carried(steps, row), rtol=1e-4, atol=1e-5)
    assert grids == {2, 4}

    before = inputs.samples["inputs 4"].folder
    save_lora(file, {k: 2 * v for k, v in weights.items()}, run.config, run.info, "high")
    after = open_inputs(run, "low").samples["inputs 4"].folder
    assert after != before  # another high expert, other inputs


def test_without_a_distilled_high_expert_the_low_ones_pairs_share_their_beginning(make_run, capsys):
    run = make_run(method="dmd", real_score="samples", expert="low")
    method, inputs = make_method(run.config, "low"), solved_inputs(run, "low")
    assert "There is no distilled high expert" in capsys.readouterr().out
    assert inputs.samples["inputs 4"] is inputs.samples["samples"]
    batch = method.batch_at(inputs, 0, 0)
    rows = method.rows_at(0, 0)["samples"]
    sigmas = [batch.sigmas[0]] * len(rows)
    assert torch.equal(batch.x, inputs.samples["samples"].at(rows, sigmas))
