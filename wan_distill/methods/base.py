"""What a method is: the losses of one objective for one expert, and what they are computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from wan_distill.data.samples import Inputs
from wan_distill.maths.randomness import keyed_order
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role, recipe_of


@dataclass(frozen=True)
class Loss:
    """A scalar to call backward on, and detached scalars worth a line in metrics.jsonl."""

    value: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


Batch = TypeVar("Batch")


class Method(Generic[Batch]):
    """One objective for one expert. Computes losses; never steps, clips, logs, saves or seeds.

    Everything but `batch_at` and `losses` follows from the settings alone. The defaults suit a
    method with the student as its only role.
    """

    def __init__(self, config: Config, expert: Expert):
        self.config = config
        self.expert: Expert = expert
        self.roles: tuple[Role, ...] = recipe_of(config).roles(config)
        """Each gets one adapter and one optimizer."""

    # ------------------------------------------------------------------------- who learns, and when

    def role_at(self, step: int) -> Role:
        """Who learns at this update. Pure, so that resuming needs no extra state."""
        return "student"

    def draws_of(self, step: int) -> int:
        """The update whose inputs and random draws this one uses: itself, or an earlier one that it
        repeats.
        """
        return step

    def updates(self, student_updates: int) -> int:
        """Updates of all roles together until the student has had `student_updates`."""
        return student_updates

    def is_interval(self, done: int, every: int) -> bool:
        """Whether an interval of `every` student updates ends after `done` updates of all roles.

        Updates before the student's first one are counted in the same measure, so that a long
        warm-up has its intervals too.
        """
        before, cycle = self.updates(0), self.updates(1) - self.updates(0)
        counted = done if done <= before else done - before
        return counted > 0 and counted % (every * cycle) == 0

    # ------------------------------------------------------------------------ what it computes from

    def rows_at(self, step: int, micro_batch: int) -> dict[str, list[int]]:
        """Purpose -> the stored samples that `batch_at` reads. Pure."""
        raise NotImplementedError

    def rows_read(self, micro_batches: int) -> dict[str, frozenset[int]]:
        """Purpose -> all stored samples that a whole run reads.

        Args:
            micro_batches: of one update, over all processes.
        """
        rows: dict[str, set[int]] = {}
        for step in range(self.updates(self.config.max_train_steps)):
            for micro in range(micro_batches):
                drawn = self.draws_of(step)
                for purpose, chosen in self.rows_at(drawn, drawn * micro_batches + micro).items():
                    rows.setdefault(purpose, set()).update(chosen)
        return {purpose: frozenset(chosen) for purpose, chosen in rows.items()}

    def positions(self, micro_batch: int) -> range:
        """Those of a global micro-batch in the endless sequence of all samples."""
        size = self.config.train_batch_size
        return range(micro_batch * size, (micro_batch + 1) * size)

    def stored_rows(self, key: tuple[int | str, ...], micro_batch: int) -> list[int]:
        """The stored samples of a global micro-batch, in the order that `key` gives them."""
        count = self.config.num_trajectories
        return [keyed_order(*key, position=p, size=count) for p in self.positions(micro_batch)]

    def batch_at(self, inputs: Inputs, step: int, micro_batch: int) -> Batch:
        """The inputs of one global micro-batch of update `step`, on the training device. Pure."""
        raise NotImplementedError

    def losses(
        self, role: Role, denoiser: Denoiser, batch: Batch, rng: torch.Generator
    ) -> Iterator[Loss]:
        """The parts of `role`'s loss, whose values add up to it. All noise and sigmas are `rng`'s.

        Call backward on each part before asking for the next: then a single graph is in memory.
        """
        raise NotImplementedError
