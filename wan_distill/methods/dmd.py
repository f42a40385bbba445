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
A guided score belongs to no distribution, so students slowly drift, in brightness first, and are
best early on. `samples`: the score of the guided sampler's samples, which a third adapter learns by
the critic's loss. Both scores learn side by side, from one initial value, with the same noise, on
samples of student and teacher that begin with the same noise: the error that this noise causes is
the same in both and cancels in x0_fake - x0_real.

With `--diversity_weight` the first step is not matched but regressed to the teacher's (DP-DMD,
arXiv 2602.03139): distribution matching alone lets samples of one prompt grow alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths import flow
from wan_distill.maths.flow import sample, sigma_batch
from wan_distill.maths.randomness import generator, keyed_noise, keyed_order
from wan_distill.maths.sigmas import Expert, expert_sigmas, score_range, unshift_sigma
from wan_distill.methods.base import Loss, Method
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import to_device

NORMALISER_FLOOR = 1e-4


@dataclass(frozen=True)
class DMDBatch:
    """One micro-batch: where the phase begins, its sigmas, and the step at which it is left."""

    x: Tensor
    """[B, C, F, H, W] at sigmas[0]."""
    prompt: Tensor
    """[B, L, D]."""
    negative: Tensor
    """[1, L, D]."""
    sigmas: tuple[float, ...]
    """The phase's, of one sampling grid, its end included."""
    exit: int
    """Index of the step that learns: from sigmas[exit] straight to the phase's end."""
    anchor: Tensor | None = None
    """The teacher's latents at the finest grid's second sigma, from the same noise; for the
    student's diversity loss.
    """
    teacher_end: Tensor | None = None
    """The guided teacher's latents at the phase's end, for the same prompts and, at sigma 1, the
    same noise; for the score of its samples.
    """


class PhasedDMD(Method[DMDBatch]):
    """One phase: student and critic of one expert; with `--real_score samples` also the score of
    the teacher's samples.
    """

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.scores = self.roles[1:]
        self.learned = "real_score" in self.scores
        self.diverse = config.diversity_weight > 0 and expert == "high"
        owned = {
            n: expert_sigmas(config.sigmas(n), expert, config.boundary_ratio)
            for n in config.sampling_steps
        }
        self.phases = {n: sigmas for n, sigmas in owned.items() if sigmas}
        """Sampling steps -> the sigmas of this expert's phase."""

    # ------------------------------------------------------------------------- who learns, and when

    def role_at(self, step: int) -> Role:
        """The scores alone at first; then `critic_updates` of each before each update of the
        student.
        """
        warmup = self.config.critic_warmup_steps * len(self.scores)
        scoring = self.config.critic_updates * len(self.scores)
        if step < warmup:
            return self.scores[step % len(self.scores)]
        turn = (step - warmup) % (scoring + 1)
        return "student" if turn == scoring else self.scores[turn % len(self.scores)]

    def draws_of(self, step: int) -> int:
        """The second of two scores repeats the draws of the first."""
        return step - (self.role_at(step) == "real_score")

    def updates(self, student_updates: int) -> int:
        each = self.config.critic_updates * len(self.scores) + 1
        return self.config.critic_warmup_steps * len(self.scores) + student_updates * each

    # ------------------------------------------------------------------------ what it computes from

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        student = self.role_at(step) == "student"
        steps, _ = self._exit(step)
        rows: dict[str, list[int]] = {}
        if self.expert == "low":
            rows[f"inputs {steps}"] = self._rows(micro_batch)
        if self.learned and not student:
            rows["samples"] = self._rows(micro_batch)
        if self.diverse and student:
            rows["anchors"] = self._rows(micro_batch)
        return rows

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> DMDBatch:
        """Noise (high; of stored samples where a loss needs them) or hand-overs (low).

        Each sampling grid has its own hand-overs: the low phase of 2 steps never sees those of 8.
        """
        steps, exit = self._exit(step)
        sigmas = self.phases[steps]
        rows = self._rows(micro_batch)
        stored = inputs.samples
        source = next(
            (stored[p] for p in (f"inputs {steps}", "samples", "anchors") if p in stored), None
        )
        if source is None:
            x, prompt = self._fresh(inputs, micro_batch)
            return DMDBatch(x, prompt, inputs.run.negative, sigmas, exit)
        reads = self.rows_at(step, micro_batch)
        anchor = teacher_end = None
        if "anchors" in reads:
            anchor = stored["anchors"].at(rows, [self.config.sigmas()[1]] * len(rows))
        if "samples" in reads:
            teacher_end = stored["samples"].at(rows, [sigmas[-1]] * len(rows))
        return DMDBatch(
            x=source.at(rows, [sigmas[0]] * len(rows)),
            prompt=source.prompt(rows),
            negative=inputs.run.negative,
            sigmas=sigmas,
            exit=exit,
            anchor=anchor,
            teacher_end=teacher_end,
        )

    def _exit(self, step: int) -> tuple[int, int]:
        """(sampling steps, exit step) of an update; keyed by it alone, so that all ranks agree."""
        rng = generator(self.config.seed, self.expert, "exit", step)
        steps = list(self.phases)[int(torch.randint(len(self.phases), (1,), generator=rng))]
        count = len(self.phases[steps]) - 1
        # With anchors the first step is the diversity loss's alone, unless it is the phase's only
        # one.
        first = 1 if self.diverse and count > 1 else 0
        return steps, int(torch.randint(first, count, (1,), generator=rng))

    def _positions(self, micro_batch: int) -> range:
        size = self.config.train_batch_size
        return range(micro_batch * size, (micro_batch + 1) * size)

    def _rows(self, micro_batch: int) -> list[int]:
        """The stored samples of a global micro-batch."""
        key = "handovers" if self.expert == "low" else "anchors"
        count = self.config.num_trajectories
        return [
            keyed_order(self.config.seed, key, position=p, size=count)
            for p in self._positions(micro_batch)
        ]

    def _fresh(self, inputs: Inputs, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Noise [B, C, F, H, W] and prompts [B, L, D] that no stored sample has."""
        run, seed = inputs.run, self.config.seed
        positions = self._positions(micro_batch)
        chosen = [
            run.prompts[keyed_order(seed, "prompts", position=p, size=len(run.prompts))]
            for p in positions
        ]
        noise = torch.stack([keyed_noise(run.latent_shape, seed, "dmd", p) for p in positions])
        return to_device(noise, run.runtime.device), run.embeddings.batch(chosen)

    # -------------------------------------------------------------------------------------- losses

    def losses(
        self, role: Role, denoiser: Denoiser, batch: DMDBatch, rng: torch.Generator
    ) -> Iterator[Loss]:
        if role == "student":
            yield self.generator_loss(denoiser, batch, rng)
            if batch.anchor is not None:
                yield self.diversity_loss(denoiser, batch)
            return
        if role == "fake_score":
            with torch.no_grad():
                _, x_end = self.rollout(denoiser, batch)
        else:
            assert batch.teacher_end is not None  # batch_at reads it where this role learns
            x_end = batch.teacher_end
        yield from self.score_losses(role, denoiser, batch, x_end, rng)

    def rollout(self, denoiser: Denoiser, batch: DMDBatch) -> tuple[Tensor, Tensor]:
        """(x0 implied by the exit step, latents at the phase's end); gradient through the exit step
        only.

        Every exit jumps straight to the end, so one critic serves them all; nothing is evaluated
        past the exit.
        """

        def student(x: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.velocity(x, sigma, batch.prompt, role="student")

        with torch.no_grad():
            x = sample(student, batch.x, batch.sigmas[: batch.exit + 1])
        sigma = sigma_batch(batch.sigmas[batch.exit], x)
        end = sigma_batch(batch.sigmas[-1], x)
        velocity = student(x, sigma)
        return flow.x0_from_velocity(x, velocity, sigma), flow.euler_step(x, velocity, sigma, end)

    def diffuse(
        self, x_end: Tensor, end: float, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`x_end` diffused on from the phase's end to a random score level.

        Returns x_sigma [B, C, F, H, W], sigma [B] and the noise.
        """
        shift = self.config.flow_shift
        most = self.config.score_sigma_max
        low, high = score_range(self.expert, self.config.boundary_ratio, end, most)
        levels = flow.uniform(
            unshift_sigma(low, shift), unshift_sigma(high, shift), len(x_end), rng
        )
        sigma = flow.shift_sigmas(levels, shift)
        noise = to_device(torch.randn(x_end.shape, generator=rng), x_end.device)
        return flow.phase_add_noise(x_end, noise, sigma, end), sigma, noise

    def generator_loss(self, denoiser: Denoiser, batch: DMDBatch, rng: torch.Generator) -> Loss:
        """Distribution matching of the student's samples, in x0 space."""
        x0, x_end = self.rollout(denoiser, batch)
        with torch.no_grad():
            x, sigma, _ = self.diffuse(x_end.detach(), batch.sigmas[-1], rng)
            real = self.real_velocity(denoiser, batch, x, sigma)
            fake = denoiser.velocity(x, sigma, batch.prompt, role="fake_score")
            x0_real = flow.x0_from_velocity(x, real, sigma)
            x0_fake = flow.x0_from_velocity(x, fake, sigma)
            gradient = matching_gradient(x0.detach(), x0_real, x0_fake)
        value = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        return Loss(value, {"matching_gradient": gradient.abs().mean()})

    def real_velocity(
        self, denoiser: Denoiser, batch: DMDBatch, x: Tensor, sigma: Tensor
    ) -> Tensor:
        """Towards the distribution to match, as `--real_score` says."""
        if self.learned:
            return denoiser.velocity(x, sigma, batch.prompt, role="real_score")
        scale = self.config.score_guidance(self.expert)
        return denoiser.guided_velocity(x, sigma, batch.prompt, batch.negative, scale)

    def diversity_loss(self, denoiser: Denoiser, batch: DMDBatch) -> Loss:
        """DP-DMD: from the same noise, the first step must head for the teacher's own latents."""
        assert batch.anchor is not None
        start = sigma_batch(1.0, batch.x)
        end = sigma_batch(self.config.sigmas()[1], batch.x)
        velocity = denoiser.velocity(batch.x, start, batch.prompt, role="student")
        target = flow.mean_velocity(batch.x, batch.anchor, start, end)
        error = (velocity - target).square().mean()
        return Loss(self.config.diversity_weight * error, {"diversity_loss": error.detach()})

    def score_losses(
        self, role: Role, denoiser: Denoiser, batch: DMDBatch, x_end: Tensor, rng: torch.Generator
    ) -> Iterator[Loss]:
        """Flow matching on samples of the phase's end, at its exact conditional velocity.

        Several draws share one costly rollout where the target is noisy, which is where the phase
        ends above 0.
        """
        end = batch.sigmas[-1]
        draws = self.config.score_draws if end > 0 else 1
        repeated = x_end.repeat(draws, 1, 1, 1, 1)
        x, sigma, noise = self.diffuse(repeated, end, rng)
        target = flow.phase_velocity(repeated, noise, sigma, end)
        for draw in range(draws):
            part = slice(draw * len(x_end), (draw + 1) * len(x_end))
            velocity = denoiser.velocity(x[part], sigma[part], batch.prompt, role=role)
            yield Loss(critic_error(velocity, target[part], sigma[part], end) / draws)


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
