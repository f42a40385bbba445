"""Phased distribution matching, the part before the losses: who learns when, and from what."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths.randomness import generator, keyed_noise, keyed_order
from wan_distill.maths.sigmas import Expert
from wan_distill.methods.base import Method
from wan_distill.model.condition import Condition
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import to_device


@dataclass(frozen=True)
class DMDBatch:
    """One micro-batch: where the phase begins, its sigmas, and the step at which it is left."""

    x: Tensor
    """[B, C, F, H, W] at sigmas[0]."""
    condition: Condition
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
    same noise; for the score of its samples, or the teacher's own at them.
    """


class PhasedMethod(Method[DMDBatch]):
    """One expert's phase: who learns when, from which inputs. Its losses: `dmd.PhasedDMD`."""

    def __init__(self, config: Config, expert: Expert):
        super().__init__(config, expert)
        self.scores = self.roles[1:]
        self.learned = "real_score" in self.scores
        self.paired = config.real_score == "paired"
        self.diverse = config.diversity_weight > 0 and expert == "high"
        self.phases = config.phases(expert)

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
        if self.paired if student else self.learned:
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
            x, condition = self._fresh(inputs, micro_batch)
            return DMDBatch(x, condition, inputs.run.negative, sigmas, exit)
        reads = self.rows_at(step, micro_batch)
        anchor = teacher_end = None
        if "anchors" in reads:
            anchor = stored["anchors"].at(rows, [self.config.sigmas()[1]] * len(rows))
        if "samples" in reads:
            teacher_end = stored["samples"].at(rows, [sigmas[-1]] * len(rows))
        return DMDBatch(
            x=source.at(rows, [sigmas[0]] * len(rows)),
            condition=source.condition(rows),
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

    def _rows(self, micro_batch: int) -> list[int]:
        """The stored samples of a global micro-batch."""
        key = "handovers" if self.expert == "low" else "anchors"
        return self.stored_rows((self.config.seed, key), micro_batch)

    def _fresh(self, inputs: Inputs, micro_batch: int) -> tuple[Tensor, Condition]:
        """Noise [B, C, F, H, W] that no stored sample has, and what is to become of it."""
        run, seed = inputs.run, self.config.seed
        positions = self.positions(micro_batch)
        chosen = [
            run.prompts[keyed_order(seed, "prompts", position=p, size=len(run.prompts))]
            for p in positions
        ]
        noise = torch.stack([keyed_noise(run.latent_shape, seed, "dmd", p) for p in positions])
        return to_device(noise, run.runtime.device), run.condition(chosen)
