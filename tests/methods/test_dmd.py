"""Phased distribution matching: who learns when, on which inputs, and what is evaluated for it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from lessons import Lesson, make_lesson, rows_of, solved_inputs

from wan_distill.maths import flow
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import expert_of
from wan_distill.methods import make_method
from wan_distill.model.adapters import adapter_parameters

BOUNDARY = 0.875
EXPERTS = pytest.mark.parametrize("expert", ["high", "low"])


class Counted:
    """Counts forwards of a Denoiser by (role, with gradient), and records the sigmas."""

    def __init__(self, denoiser):
        self.calls = []
        self.sigmas = []
        self.inner = denoiser.velocity
        denoiser.velocity = self.velocity

    def velocity(self, x, sigma, condition, *, role):
        self.calls.append((role, torch.is_grad_enabled()))
        self.sigmas.append((role, sigma))
        return self.inner(x, sigma, condition, role=role)


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
            shown = samples.condition([row]).prompt
            assert torch.equal(batch.condition.prompt[j], shown[0])
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
        return denoiser.velocity(batch.x, sigma, batch.condition, role="student"), end

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
@pytest.mark.parametrize("real", ["guided", "samples", "paired"])
def test_nothing_runs_past_the_exit_and_only_the_exit_learns(make_run, expert, exit, real):
    run = make_run(method="dmd", diversity_weight=0.0, real_score=real)
    lesson = make_lesson(run, expert, moved=0.02)
    step = lesson.method.updates(1) - 1 if real == "paired" else 0  # its student reads samples
    batch = dataclasses.replace(lesson.batch(step), exit=exit)
    counted = Counted(lesson.denoiser)
    lesson.learn("student", batch, generator("g"))
    rollout = [call for call in counted.calls if call[0] == "student"]
    assert rollout == [("student", False)] * exit + [("student", True)]
    judges = dict(guided=["teacher"], samples=["real_score"], paired=["teacher"] * 2)[real]
    judged = [call for call in counted.calls if call[0] != "student"]
    assert judged == [(role, False) for role in (*judges, "fake_score")]
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


@pytest.mark.parametrize(
    ("real", "given", "high", "low"),
    [
        ("guided", dict(real_score_guidance_scale=4.5, real_score_guidance_scale_2=2.5), 4.5, 2.5),
        ("guided", {}, 4.0, 3.0),
        ("paired", {}, 7.0, 5.0),
        ("paired", dict(real_score_guidance_scale_2=3.0), 7.0, 3.0),
    ],
)
@EXPERTS
def test_the_guidance_of_the_teachers_score_is_each_experts_own(
    make_run, expert, real, given, high, low
):
    """That of paired scores leads twice as far from the unguided as the teacher's own."""
    scales = dict(guidance_scale=4.0, guidance_scale_2=3.0, real_score=real, **given)
    lesson = make_lesson(make_run(method="dmd", diversity_weight=0.0, **scales), expert)
    inner, asked = lesson.denoiser.guided_velocity, []

    def guided_velocity(x, sigma, condition, negative, scale):
        asked.append(scale)
        return inner(x, sigma, condition, negative, scale)

    lesson.denoiser.guided_velocity = guided_velocity
    step = lesson.method.updates(1) - 1 if real == "paired" else 0  # its student reads samples
    lesson.learn("student", lesson.batch(step), generator("g"))
    assert {*asked} == {high if expert == "high" else low}


@EXPERTS
def test_the_students_loss_pulls_its_samples_towards_the_teachers(make_run, expert):
    """With x0_real = 1 and x0_fake = -1 everywhere, and samples at 0."""
    lesson = make_lesson(make_run(method="dmd", diversity_weight=0.0), expert)
    batch = lesson.batch(0)
    x0 = torch.zeros_like(batch.x).requires_grad_()
    lesson.method.rollout = lambda denoiser, batch: (x0, torch.zeros_like(x0))

    def implying(value: float):
        def velocity(x, sigma, *rest, **options):
            return (x - value) / sigma.to(x.dtype).view(-1, 1, 1, 1, 1)

        return velocity

    lesson.denoiser.guided_velocity = implying(1.0)
    lesson.denoiser.velocity = implying(-1.0)
    (loss,) = lesson.method.losses("student", lesson.denoiser, batch, generator("pull"))
    loss.value.backward()
    torch.testing.assert_close(x0.grad, torch.full_like(x0, -2 / x0.numel()), rtol=1e-4, atol=0)


@EXPERTS
def test_paired_scores_are_the_guided_teachers_at_both_samples_with_one_noise(make_run, expert):
    """With x0_real = 1 at the student's samples, which are 0, and 4 at the teacher's; x0_fake = -1:
    the normalised halves are -2 and -1.25.
    """
    lesson = make_lesson(make_run(method="dmd", diversity_weight=0.0, real_score="paired"), expert)
    step = lesson.method.updates(1) - 1
    assert lesson.method.role_at(step) == "student"
    batch = lesson.batch(step)
    rows = rows_of(
        batch.x,
        lesson.inputs.samples.get("inputs 4", lesson.inputs.samples["samples"]),
        batch.sigmas[0],
    )
    end = lesson.inputs.samples["samples"].at(rows, [batch.sigmas[-1]] * len(rows))
    assert torch.equal(batch.teacher_end, end)
    x0 = torch.zeros_like(batch.x).requires_grad_()
    lesson.method.rollout = lambda denoiser, batch: (x0, torch.zeros_like(x0))
    asked = []

    def guided_velocity(x, sigma, *rest):
        asked.append((x, sigma))
        real = torch.full_like(x, 1.0 if len(asked) == 1 else 4.0)
        return flow.mean_velocity(x, real, sigma, 0 * sigma)

    lesson.denoiser.guided_velocity = guided_velocity
    lesson.denoiser.velocity = lambda x, sigma, *rest, **options: flow.mean_velocity(
        x, torch.full_like(x, -1.0), sigma, 0 * sigma
    )
    (loss,) = lesson.method.losses("student", lesson.denoiser, batch, generator("pull"))
    loss.value.backward()
    mean = (-2 - 1.25) / 2
    torch.testing.assert_close(x0.grad, torch.full_like(x0, mean / x0.numel()), rtol=1e-4, atol=0)
    (own, sigma), (teachers, sigma_again) = asked
    assert torch.equal(sigma, sigma_again)
    alpha, _ = flow.phase_coefficients(sigma, batch.sigmas[-1])
    torch.testing.assert_close(teachers - own, flow.per_sample(alpha, end) * end)
