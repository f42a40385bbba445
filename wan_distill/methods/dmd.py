"""Phased distribution matching: each expert learns to map its inputs to the teacher's distribution at its phase's end.

DMD2 (arXiv 2405.14867) with the phases of Phased DMD (arXiv 2510.27684): the high expert maps noise to latents at the
hand-over sigma, the low expert maps what the *distilled* high expert hands over to x0. No data, only prompts. Teacher,
student and critic (`fake_score`) share one frozen base.

    generator:  g = (x0_fake - x0_real) / mean|x0 - x0_real|,   L = 1/2 |x0 - sg(x0 - g)|^2     (DMD, eq. 7 and 8)
    critic:     L = |v_fake(x_t) - v*|^2,   v* = flow.phase_velocity: the naive noise - x_s is biased when s > 0

With `--diversity_weight` the first step is not matched but regressed to the teacher's (DP-DMD, arXiv 2602.03139):
distribution matching alone lets samples of one prompt grow alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill import flow
from wan_distill.denoiser import Denoiser, Role
from wan_distill.methods import Loss, Sources
from wan_distill.runtime import generator, keyed_noise, keyed_order
from wan_distill.sampling import at, sample
from wan_distill.schedule import Expert, handover, steps_of
from wan_distill.trajectories import anchors, handovers

# Sigmas at which scores are compared: never outside the range its teacher expert was trained on.
SCORE_MARGIN = 0.02
NORMALISER_FLOOR = 1e-4


@dataclass(frozen=True)
class Batch:
    """One micro-batch: inputs x [B, C, F, H, W] of the phase, prompts [B, L, D], the steps to take, teacher anchors."""

    x: Tensor
    prompt: Tensor
    sigmas: tuple[float, ...]
    exit: int
    anchor: Tensor | None


class PhasedDMD:
    """One phase: student and critic of one expert."""

    roles: tuple[Role, ...] = ("student", "fake_score")

    def __init__(self, expert: Expert, sources: Sources):
        self.config = config = sources.config
        self.expert = expert
        self.sources = sources
        self.shape = sources.teacher.info.latent_shape(config)
        self.end = handover(config.sigmas(), config.boundary) if expert == "high" else 0.0
        self.range = score_range(expert, config.boundary)
        self.inputs = sources.solved(handovers) if expert == "low" else None
        diverse = config.diversity_weight > 0 and expert == "high"
        self.anchors = sources.solved(anchors) if diverse else None

    # ---------------------------------------------------------------------------------------------------- who and what

    def role_at(self, step: int) -> Role:
        """The critic alone at first; then `critic_updates` of it before each update of the student."""
        step -= self.config.critic_warmup_steps
        each = self.config.critic_updates + 1
        return "student" if step >= 0 and step % each == each - 1 else "fake_score"

    def updates(self, student_updates: int) -> int:
        return self.config.critic_warmup_steps + student_updates * (self.config.critic_updates + 1)

    def batch_at(self, step: int, micro_batch: int) -> Batch:
        """Fresh noise (high) or stored hand-overs (low), and the step at which the rollout ends.

        The grid and the exit are keyed by the update alone: all ranks agree without a word.
        """
        config, size = self.config, self.config.train_batch_size
        rng = generator(config.seed, self.expert, "exit", step)
        count = config.sampling_steps[int(torch.randint(len(config.sampling_steps), (1,), generator=rng))]
        sigmas = config.sigmas(count)
        steps = steps_of(self.expert, sigmas, config.boundary)
        sigmas = sigmas[steps[0]:steps[-1] + 1]
        matched = range(1, len(sigmas)) if self.anchors and len(sigmas) > 1 else range(len(sigmas))
        exit = matched[int(torch.randint(len(matched), (1,), generator=rng))]
        positions = [micro_batch * size + j for j in range(size)]
        if self.inputs is not None:
            rows = [keyed_order(config.seed, "handovers", position=p, size=len(self.inputs)) for p in positions]
            return Batch(self.inputs.at(rows, [self.inputs.knots[-1]] * size), self.inputs.prompt(rows), sigmas, exit,
                         None)
        if self.anchors is not None:
            rows = [keyed_order(config.seed, "anchors", position=p, size=len(self.anchors)) for p in positions]
            return Batch(self.anchors.at(rows, [1.0] * size), self.anchors.prompt(rows), sigmas, exit,
                         self.anchors.at(rows, [self.anchors.knots[0]] * size))
        prompts = self.sources.prompts
        chosen = [prompts[keyed_order(config.seed, "prompts", position=p, size=len(prompts))] for p in positions]
        noise = torch.stack([keyed_noise(self.shape, config.seed, "dmd", p) for p in positions])
        return Batch(noise.to(self.sources.runtime.device), self.sources.bank.batch(chosen), sigmas, exit, None)

    # ---------------------------------------------------------------------------------------------------------- losses

    def loss(self, role: Role, denoiser: Denoiser, batch: Batch, rng: torch.Generator) -> Loss:
        return (self.generator_loss if role == "student" else self.critic_loss)(denoiser, batch, rng)

    def rollout(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """(x0 implied by the exit step, latents at the phase's end); gradient through the exit step only.

        Every exit jumps straight to the end, so one critic serves them all; nothing is evaluated past the exit.
        """
        def student(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.velocity(x, sigma, batch.prompt, role="student")

        with torch.no_grad():
            x = sample(student, batch.x, batch.sigmas[: batch.exit + 1])
        sigma = at(batch.sigmas[batch.exit], x)
        velocity = student(x, sigma)
        return flow.x0_from_velocity(x, velocity, sigma), flow.euler_step(x, velocity, sigma, at(self.end, x))

    def diffuse(self, x_end: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """x_sigma, sigma [B] and the noise, of `x_end` carried on from the phase's end to a random score level."""
        low, high = (unshift(s, self.config.flow_shift) for s in self.range)
        sigma = flow.shift_sigmas(flow.uniform(low, high, len(x_end), rng), self.config.flow_shift)
        noise = torch.randn(x_end.shape, generator=rng).to(x_end.device)
        alpha, beta = flow.phase_coefficients(sigma, self.end)
        return flow.per_sample(alpha, x_end) * x_end + flow.per_sample(beta, x_end) * noise, sigma, noise

    def generator_loss(self, denoiser: Denoiser, batch: Batch, rng: torch.Generator) -> Loss:
        """Distribution matching of the student's samples, in x0 space."""
        x0, x_end = self.rollout(denoiser, batch)
        with torch.no_grad():
            x, sigma, _ = self.diffuse(x_end.detach(), rng)
            real = denoiser.guided_velocity(x, sigma, batch.prompt, self.sources.negative,
                                            self.config.guidance(self.expert))
            fake = denoiser.velocity(x, sigma, batch.prompt, role="fake_score")
            gradient = matching_gradient(x0.detach(), flow.x0_from_velocity(x, real, sigma),
                                         flow.x0_from_velocity(x, fake, sigma))
        value = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        metrics = {"matching_gradient": gradient.abs().mean()}
        if batch.anchor is not None:
            diversity = self.first_step_loss(denoiser, batch)
            value = value + self.config.diversity_weight * diversity
            metrics["diversity_loss"] = diversity.detach()
        return Loss(value, metrics)

    def first_step_loss(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        """DP-DMD: from the same noise, the first step must head for the teacher's own latents."""
        start, end = at(1.0, batch.x), at(self.anchors.knots[0], batch.x)
        velocity = denoiser.velocity(batch.x, start, batch.prompt, role="student")
        return (velocity - flow.mean_velocity(batch.x, batch.anchor, start, end)).square().mean()

    def critic_loss(self, denoiser: Denoiser, batch: Batch, rng: torch.Generator) -> Loss:
        """Flow matching on the student's samples, at the phase's exact conditional velocity, over several draws."""
        with torch.no_grad():
            _, x_end = self.rollout(denoiser, batch)
        draws = self.config.score_draws
        x_end, prompt = x_end.repeat(draws, 1, 1, 1, 1), batch.prompt.repeat(draws, 1, 1)
        x, sigma, noise = self.diffuse(x_end, rng)
        velocity = denoiser.velocity(x, sigma, prompt, role="fake_score")
        return Loss((velocity - flow.phase_velocity(x_end, noise, sigma, self.end)).square().mean())


def score_range(expert: Expert, boundary: float | None) -> tuple[float, float]:
    """Sigmas at which this expert's scores are compared."""
    if expert == "high":
        return boundary or SCORE_MARGIN, 1 - SCORE_MARGIN
    # The boundary itself belongs to the high expert.
    return SCORE_MARGIN, boundary - 1e-6


def unshift(sigma: float, shift: float) -> float:
    """The inverse of `schedule.shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def matching_gradient(x0: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """(x0_fake - x0_real) / mean|x0 - x0_real|: each sample's own normaliser, so every sigma counts alike."""
    scale = (x0 - x0_real).abs().flatten(1).mean(1).clamp_min(NORMALISER_FLOOR)
    return (x0_fake - x0_real) / flow.per_sample(scale, x0)
