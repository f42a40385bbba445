"""Is the student still alive? Its samples against the teacher's, on fixed prompts and seeds, while
it trains.

Losses of distribution matching say nothing about quality, and its known failures (frozen,
over-exposed or identical clips) come late in a run. So the exported weights are sampled at
intervals, what is seen is said in plain words, and the best of them are kept in `best.safetensors`
beside the last checkpoint: those are exported.

Before the hand-over latents are noisy; there both sides are judged by the x0 that their last step
heads for.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wan_distill.data.run import Sources
from wan_distill.data.samples import handovers, trajectories
from wan_distill.maths import flow
from wan_distill.maths.distances import diversity, picture_statistics, relative, score
from wan_distill.maths.flow import euler, sigma_batch
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import decode
from wan_distill.system.files import write_tensors
from wan_distill.training.learner import Learner

SEEDS = 2  # a prompt: the fewest that show whether samples differ
DECODED = 32  # clips a look that become pictures; the score and diversity are taken of all latents
FROZEN, COLLAPSED, OVEREXPOSED, OVERSATURATED = (
    0.6,
    0.6,
    0.1,
    1.4,
)  # ratios to the teacher; luminance: difference


class Monitor:
    """Watches one expert's student. Its teacher samples are solved at construction, before the
    expert is loaded.

    Args:
        root: the expert's folder, where `best.safetensors` goes.
    """

    def __init__(self, expert: Expert, sources: Sources, root: Path):
        config = sources.config
        self.expert, self.config, self.teacher, self.runtime = (
            expert,
            config,
            sources.teacher,
            sources.runtime,
        )
        root.mkdir(parents=True, exist_ok=True)
        self.file = root / "best.safetensors"
        self.best = math.inf
        # Of several grids the finest is watched.
        self.sigmas = expert_sigmas(config.sigmas(), expert, config.boundary)
        self.on = config.monitor_steps > 0 and len(self.sigmas) > 1
        if not self.on:
            return
        count = max(1, min(config.monitor_samples // SEEDS, len(sources.prompts)))
        prompts = sources.prompts[:: len(sources.prompts) // count][:count]
        fixed = dataclasses.replace(config, num_trajectories=SEEDS * count)
        sources = dataclasses.replace(sources, config=fixed, prompts=prompts)
        self.prompts, self.rows = len(prompts), list(range(SEEDS * count))
        self.solved = sources.solved(trajectories)
        self.start = (
            self.solved
            if expert == "high"
            else sources.solved(partial(handovers, steps=config.grid_steps))
        )
        self.real, self.seen = None, None

    # ------------------------------------------------------------------------------------- watching

    def due(self, learner: Learner, last: bool = False) -> bool:
        """Whether the student is to be looked at now, by this process."""
        return (
            self.on
            and self.runtime.samples_student()
            and (last or learner.done % self.config.monitor_steps == 0)
        )

    @torch.no_grad()
    def look(self, denoiser: Denoiser, learner: Learner) -> dict[str, float]:
        """Scalars for metrics.jsonl; keeps the weights if they are the best so far, and warns in
        plain words.
        """
        if self.real is None:
            self.real = self.teacher_x0()
            self.seen = self._statistics(self.real)
        with learner.shipped():
            x0 = self.student_x0(denoiser)
        values = relative(self._statistics(x0), self.seen) | dict(score=score(x0, self.real))
        weights = sum(p.detach().double().square().sum() for p in learner.parameters.values())
        values["parameter_norm"] = float(weights) ** 0.5
        if (change := learner.update_norm()) is not None:
            values["update_norm"] = change
        if values["score"] < self.best:
            self.best = values["score"]
            if self.runtime.is_main:  # one key only: several would be written in any order
                write_tensors(
                    self.file, learner.exported(), dict(seen=f"{self.best!r} {learner.done}")
                )
        for warning in (
            warnings(values) if learner.done else []
        ):  # before training it is the bare base's few steps
            self.runtime.say(
                f"\nWarning, {self.expert} expert after {learner.done} updates: {warning}"
            )
        return {f"monitor_{name}": value for name, value in values.items()}

    def resume(self, step: int) -> None:
        """Takes up the best of an interrupted run; a run from the start forgets an older one's."""
        if self.runtime.samples_student() and self.file.exists():
            if step == 0:
                self.file.unlink() if self.runtime.is_main else None
                return
            with safe_open(self.file, framework="pt") as kept:
                self.best = float(kept.metadata()["seen"].split()[0])

    def exported(self, learner: Learner) -> dict[str, Tensor]:
        """The weights to ship: the best that were seen, or the last where nobody looked."""
        if not self.on or not self.file.exists():
            return learner.exported()
        with safe_open(self.file, framework="pt") as kept:
            updates = int(kept.metadata()["seen"].split()[1])
        self.runtime.say(
            f"The {self.expert} expert's best score, {self.best:.4f}, was after {updates} of "
            f"{learner.done} updates; those are exported."
        )
        if not updates:
            self.runtime.say(
                f"Warning, {self.expert} expert: training brought it no nearer to the teacher than "
                "it "
                "began. Try a lower --learning_rate, or another --method."
            )
        return load_file(self.file)

    # --------------------------------------------------------------------------------------- seeing

    def student_x0(self, denoiser: Denoiser) -> Tensor:
        """x0 [N, C, F, H, W] that the student's phase implies, on the CPU."""
        found, size = [], self.config.sample_batch_size
        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            prompt = self.start.prompt(rows)

            def velocity(x: Tensor, sigma: Tensor, prompt: Tensor = prompt) -> Tensor:
                with self.runtime.autocast():
                    return denoiser.velocity(x, sigma, prompt, role="student")

            begin = self.start.at(rows, [self.sigmas[0]] * len(rows))
            *_, x, end = begin, *euler(velocity, begin, self.sigmas)
            found.append(self._implied_x0(x, end).cpu())
        return torch.cat(found)

    def teacher_x0(self) -> Tensor:
        """x0 [N, C, F, H, W] of the teacher's phase from the same prompts and noise, on the CPU."""
        return self._implied_x0(
            *(self.solved.at(self.rows, [s] * len(self.rows)).cpu() for s in self.sigmas[-2:])
        )

    def _implied_x0(self, x: Tensor, end: Tensor) -> Tensor:
        """Where the phase's last step, from `x` to `end`, would arrive if it went on to sigma 0."""
        sigma, last = sigma_batch(self.sigmas[-2], x), sigma_batch(self.sigmas[-1], x)
        return flow.x0_from_velocity(end, flow.mean_velocity(x, end, sigma, last), last)

    def _statistics(self, x0: Tensor) -> dict[str, float]:
        frames = decode(self.teacher.load_vae(), x0[:DECODED], self.config.sample_batch_size)
        return picture_statistics(frames) | dict(diversity=diversity(x0, self.prompts))


def warnings(values: dict[str, float]) -> list[str]:
    """What is going wrong, in plain words, and what to do."""
    found = []
    if values.get("motion", 1.0) < FROZEN:
        found.append(
            f"the student freezes: its clips move {values['motion']:.2f} times as much as the "
            "teacher's. "
            "Lower --learning_rate, or begin from a trajectory student (--init_student_from)."
        )
    if values["luminance"] > OVEREXPOSED or values.get("saturation", 1.0) > OVERSATURATED:
        found.append(
            f"the student over-exposes: luminance {values['luminance']:+.2f}, saturation "
            f"{values.get('saturation', 1.0):.2f} times the teacher's. Stop earlier, lower "
            "--learning_rate or "
            "the guidance scales."
        )
    if values.get("diversity", 1.0) < COLLAPSED:
        found.append(
            f"the student collapses: samples of one prompt differ {values['diversity']:.2f} times "
            "as much as "
            "the teacher's. Raise --diversity_weight or --critic_updates."
        )
    return found
