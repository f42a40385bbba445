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

`paired` does without the third adapter (data-forced scores, arXiv 2606.18478): half of the gradient
is the guided form's, in the other half x0_real is the guided prediction at the teacher's stored
sample, noised to the same sigma with the same noise. That pulls towards samples which the teacher
does make; student and teacher must be near each other, so it is for refinements.

With `--diversity_weight` the first step is not matched but regressed to the teacher's (DP-DMD,
arXiv 2602.03139): distribution matching alone lets samples of one prompt grow alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from wan_distill.maths import flow
from wan_distill.maths.flow import sample, sigma_batch
from wan_distill.maths.matching import critic_error, matching_gradient
from wan_distill.maths.sigmas import score_range, unshift_sigma
from wan_distill.methods.base import Loss
from wan_distill.methods.phases import DMDBatch, PhasedMethod
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import to_device


class PhasedDMD(PhasedMethod):
    """The losses of one phase: student and critic of one expert; with `--real_score samples` also
    the score of the teacher's samples.
    """

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
            return denoiser.velocity(x, sigma, batch.condition, role="student")

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
            x, sigma, noise = self.diffuse(x_end.detach(), batch.sigmas[-1], rng)
            noised = [x]
            if self.paired:
                assert batch.teacher_end is not None  # batch_at reads it for the student
                noised += [flow.phase_add_noise(batch.teacher_end, noise, sigma, batch.sigmas[-1])]
            real = [self.real_x0(denoiser, batch, at, sigma) for at in noised]
            fake = denoiser.velocity(x, sigma, batch.condition, role="fake_score")
            x0_fake = flow.x0_from_velocity(x, fake, sigma)
            each = [matching_gradient(x0.detach(), x0_real, x0_fake) for x0_real in real]
            gradient = torch.stack(each).mean(0)
        value = 0.5 * (x0 - (x0.detach() - gradient)).square().mean()
        return Loss(value, {"matching_gradient": gradient.abs().mean()})

    def real_x0(self, denoiser: Denoiser, batch: DMDBatch, x: Tensor, sigma: Tensor) -> Tensor:
        """Towards the distribution to match, as `--real_score` says, from `x` at `sigma`."""
        if self.learned:
            velocity = denoiser.velocity(x, sigma, batch.condition, role="real_score")
        else:
            scale = self.config.score_guidance(self.expert)
            velocity = denoiser.guided_velocity(x, sigma, batch.condition, batch.negative, scale)
        return flow.x0_from_velocity(x, velocity, sigma)

    def diversity_loss(self, denoiser: Denoiser, batch: DMDBatch) -> Loss:
        """DP-DMD: from the same noise, the first step must head for the teacher's own latents."""
        assert batch.anchor is not None
        start = sigma_batch(1.0, batch.x)
        end = sigma_batch(self.config.sigmas()[1], batch.x)
        velocity = denoiser.velocity(batch.x, start, batch.condition, role="student")
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
            velocity = denoiser.velocity(x[part], sigma[part], batch.condition, role=role)
            yield Loss(critic_error(velocity, target[part], sigma[part], end) / draws)
