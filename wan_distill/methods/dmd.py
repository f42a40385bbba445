"""Phased distribution matching: each expert learns to map its inputs to the teacher's distribution
at its phase's end.

DMD2 (arXiv 2405.14867) with the phases of Phased DMD (arXiv 2510.27684): the high expert maps noise
to latents at the hand-over sigma, the low expert maps what the *distilled* high expert hands over
to x0. No videos, only prompts. Teacher, student and critic (`fake_score`) share one frozen base.

    generator:  g = (x0_fake - x0_real) / mean|x0 - x0_real|,   L = 1/2 |x0 - sg(x0 - g)|^2
        (DMD, eq. 7 and 8)
    critic:     L = |v_fake(x_t) - v*|^2,   v* = flow.phase_velocity: the naive noise - x_s is
        biased when s > 0

`--real_score` says what x0_real is. `guided`, the published form: the teacher's guided prediction.
No distribution that the guided sampler draws from has that score: students of it drift, in
brightness first, and are best early on. `samples`: the score of what the guided sampler draws,
which a third adapter learns by the critic's loss. Both learn side by side, from one beginning, with
the same noise, on samples of student and teacher that begin with the same noise: what they pick up
of it cancels in x0_fake - x0_real.

With `--diversity_weight` the first step is not matched but regressed to the teacher's (DP-DMD,
arXiv 2602.03139): distribution matching alone lets samples of one prompt grow alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from wan_distill.data.run import Sources
from wan_distill.data.samples import anchors, handovers, trajectories
from wan_distill.maths import flow
from wan_distill.maths.flow import sample, sigma_batch
from wan_distill.maths.randomness import generator, keyed_noise, keyed_order
from wan_distill.maths.sigmas import Expert, expert_sigmas, score_range, unshift_sigma
from wan_distill.methods.base import Loss
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import to_device

NORMALISER_FLOOR = 1e-4


@dataclass(frozen=True)
class Batch:
    """One micro-batch: where the phase begins, along which sigmas it goes, and at which step it is
    left.
    """

    x: Tensor
    """[B, C, F, H, W] at sigmas[0]."""
    prompt: Tensor
    """[B, L, D]."""
    sigmas: tuple[float, ...]
    """The phase's, of one sampling grid, its end included."""
    exit: int
    """Index of the step that learns: from sigmas[exit] straight to the phase's end."""
    anchor: Tensor | None
    """The teacher's latents at the finest grid's second sigma, from the same noise; for the
    diversity loss.
    """
    rows: list[int]
    """Which stored samples these are; empty where the noise is fresh."""


class PhasedDMD:
    """One phase: student and critic of one expert; with `--real_score samples`, its teacher's
    samples' score too.
    """

    def __init__(self, expert: Expert, sources: Sources):
        self.config = config = sources.config
        self.expert = expert
        self.sources = sources
        self.shape = sources.teacher.info.latent_shape(config)
        owned = {
            n: expert_sigmas(config.sigmas(n), expert, config.boundary)
            for n in config.sampling_steps
        }
        self.phases = {n: sigmas for n, sigmas in owned.items() if sigmas}
        # Each grid's own inputs: a 2-step student's low phase never sees what 8 steps hand over.
        self.inputs = {
            n: sources.solved(partial(handovers, steps=n)) for n in self.phases if expert == "low"
        }
        self.roles: tuple[Role, ...] = config.roles
        self.scores = self.roles[1:]
        self.samples = sources.solved(trajectories) if "real_score" in self.scores else None
        diverse = config.diversity_weight > 0 and expert == "high"
        self.anchors = (self.samples or sources.solved(anchors)) if diverse else None

    # --------------------------------------------------------------------------------- who and what

    def role_at(self, step: int) -> Role:
        """The scores alone at first; then `critic_updates` of each before each update of the
        student.
        """
        warmup, scoring = (
            n * len(self.scores)
            for n in (self.config.critic_warmup_steps, self.config.critic_updates)
        )
        turn = step if step < warmup else (step - warmup) % (scoring + 1)
        return (
            "student"
            if step >= warmup and turn == scoring
            else self.scores[turn % len(self.scores)]
        )

    def drawn_at(self, step: int) -> int:
        """The second of two scores repeats the draws of the first."""
        return step - (self.role_at(step) == "real_score")

    def updates(self, student_updates: int) -> int:
        each = self.config.critic_updates * len(self.scores) + 1
        return self.config.critic_warmup_steps * len(self.scores) + student_updates * each

    def batch_at(self, step: int, micro_batch: int) -> Batch:
        """Noise (high; of stored samples where a loss needs them) or hand-overs (low), and the
        rollout's last step.

        The grid and the exit are keyed by the update alone: all ranks agree without a word.
        """
        config, size = self.config, self.config.train_batch_size
        rng = generator(config.seed, self.expert, "exit", step)
        count = list(self.phases)[int(torch.randint(len(self.phases), (1,), generator=rng))]
        sigmas = self.phases[count]
        # With anchors the first step is the diversity loss's alone, unless it is the phase's only
        # one.
        first = 1 if self.anchors and len(sigmas) > 2 else 0
        exit = int(torch.randint(first, len(sigmas) - 1, (1,), generator=rng))
        positions = [micro_batch * size + j for j in range(size)]
        stored = self.inputs[count] if self.inputs else self.samples or self.anchors
        if stored is None:
            prompts = self.sources.prompts
            chosen = [
                prompts[keyed_order(config.seed, "prompts", position=p, size=len(prompts))]
                for p in positions
            ]
            noise = torch.stack([keyed_noise(self.shape, config.seed, "dmd", p) for p in positions])
            noise = to_device(noise, self.sources.runtime.device)
            return Batch(noise, self.sources.bank.batch(chosen), sigmas, exit, None, [])
        key = "handovers" if self.inputs else "anchors"
        rows = [keyed_order(config.seed, key, position=p, size=len(stored)) for p in positions]
        anchor = self.anchors.at(rows, [self.anchors.knots[0]] * size) if self.anchors else None
        return Batch(
            stored.at(rows, [sigmas[0]] * size), stored.prompt(rows), sigmas, exit, anchor, rows
        )

    # --------------------------------------------------------------------------------------- losses

    def loss(self, role: Role, denoiser: Denoiser, batch: Batch, rng: torch.Generator) -> Loss:
        if role == "student":
            return self.generator_loss(denoiser, batch, rng)
        with torch.no_grad():
            x_end = (
                self.rollout(denoiser, batch)[1]
                if role == "fake_score"
                else self.teacher_end(batch)
            )
        return self.score_loss(role, denoiser, batch, x_end, rng)

    def teacher_end(self, batch: Batch) -> Tensor:
        """The guided teacher's latents at the phase's end, for the same prompts and, at sigma 1,
        the same noise.
        """
        return self.samples.at(batch.rows, [batch.sigmas[-1]] * len(batch.rows))

    def rollout(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x0 implied by the exit step, latents at the phase's end); gradient through the exit step
        only.

        Every exit jumps straight to the end, so one critic serves them all; nothing is evaluated
        past the exit.
        """

        def student(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.velocity(x, sigma, batch.prompt, role="student")

        with torch.no_grad():
            x = sample(student, batch.x, batch.sigmas[: batch.exit + 1])
        sigma, end = sigma_batch(batch.sigmas[batch.exit], x), sigma_batch(batch.sigmas[-1], x)
        velocity = student(x, sigma)
        return flow.x0_from_velocity(x, velocity, sigma), flow.euler_step(x, velocity, sigma, end)

    def diffuse(
        self, x_end: Tensor, end: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x_sigma, sigma [B] and the noise, of `x_end` carried on from the phase's end to a random
        score level.
        """
        shift = self.config.flow_shift
        most = self.config.score_sigma_max
        low, high = (
            unshift_sigma(s, shift)
            for s in score_range(self.expert, self.config.boundary, end, most)
        )
        sigma = flow.shift_sigmas(flow.uniform(low, high, len(x_end), rng), shift)
        noise = to_device(torch.randn(x_end.shape, generator=rng), x_end.device)
        return flow.phase_add_noise(x_end, noise, sigma, end), sigma, noise

    def generator_loss(self, denoiser: Denoiser, batch: Batch, rng: torch.Generator) -> Loss:
        """Distribution matching of the student's samples, in x0 space."""
        x0, x_end = self.rollout(denoiser, batch)
        with torch.no_grad():
            x, sigma, _ = self.diffuse(x_end.detach(), batch.sigmas[-1], rng)
            real = self.real_velocity(denoiser, x, sigma, batch.prompt)
            fake = denoiser.velocity(x, sigma, batch.prompt, role="fake_score")
            gradient = matching_gradient(
                x0.detach(),
                flow.x0_from_velocity(x, real, sigma),
                flow.x0_from_velocity(x, fake, sigma),
            )
        value = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        metrics = {"matching_gradient": gradient.abs().mean()}
        if batch.anchor is not None:
            diversity = self.first_step_loss(denoiser, batch)
            value = value + self.config.diversity_weight * diversity
            metrics["diversity_loss"] = diversity.detach()
        return Loss(value, metrics)

    def first_step_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """DP-DMD: from the same noise, the first step must head for the teacher's own latents."""
        start, end = sigma_batch(1.0, batch.x), sigma_batch(self.anchors.knots[0], batch.x)
        velocity = denoiser.velocity(batch.x, start, batch.prompt, role="student")
        return (velocity - flow.mean_velocity(batch.x, batch.anchor, start, end)).square().mean()

    def real_velocity(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        """Towards the distribution to match, as `--real_score` says."""
        if self.samples:
            return denoiser.velocity(x, sigma, prompt, role="real_score")
        return denoiser.guided_velocity(
            x, sigma, prompt, self.sources.negative, self.config.score_guidance(self.expert)
        )

    def score_loss(
        self, role: Role, denoiser: Denoiser, batch: Batch, x_end: Tensor, rng: torch.Generator
    ) -> Loss:
        """Flow matching on samples of the phase's end, at its exact conditional velocity, over
        several draws.
        """
        end = batch.sigmas[-1]
        # Several draws share one costly rollout where the target is noisy, which is where the phase
        # ends above 0.
        draws = self.config.score_draws if end > 0 else 1
        x_end, prompt = x_end.repeat(draws, 1, 1, 1, 1), batch.prompt.repeat(draws, 1, 1)
        x, sigma, noise = self.diffuse(x_end, end, rng)
        velocity = denoiser.velocity(x, sigma, prompt, role=role)
        return Loss(
            critic_error(velocity, flow.phase_velocity(x_end, noise, sigma, end), sigma, end)
        )


def critic_error(velocity: Tensor, target: Tensor, sigma: Tensor, end: float) -> Tensor:
    """Mean of clamp(1 / beta^2, 0, 10) * |beta * (velocity - target)|^2 (Phased DMD's stable form).

    Plain squared error wherever beta^2 > 0.1; nearer to the end of a phase above 0 the target's
    noise would rule.
    """
    error = (velocity - target).square()
    if end == 0:
        return error.mean()
    _, beta = flow.phase_coefficients(sigma, end)
    return (flow.per_sample((10 * beta**2).clamp_max(1), error) * error).mean()


def matching_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean|x0 - x0_real|: each sample's own normaliser, so every sigma counts
    alike.
    """
    scale = (x0 - x0_real).abs().flatten(1).mean(1).clamp_min(NORMALISER_FLOOR)
    return (x0_fake - x0_real) / flow.per_sample(scale, x0)
