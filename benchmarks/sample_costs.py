"""What a training run evaluates, and what the stored samples that it reads took; for quality.py and
frontier.py.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from diffusers import WanTransformer3DModel
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan_distill import data
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest
from wan_distill.maths.sigmas import Expert
from wan_distill.model import Teacher
from wan_distill.training import Monitor, Previews


class SampleCosts:
    """Evaluations and seconds that stored samples took: a file for each of their folders."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, name: str, samples: int, evaluations: float, seconds: float) -> None:
        """Writes them at once: the run may be interrupted."""
        new = (samples, evaluations, seconds)
        total = [a + b for a, b in zip(self._total(name), new, strict=True)]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(name).write_text(json.dumps(total), encoding="utf-8")

    def of(self, name: str, samples: int) -> tuple[float, float]:
        """Evaluations and seconds that so many samples of a folder took, on average. Ends the
        program where that was not counted: the samples come from elsewhere.
        """
        total, evaluations, seconds = self._total(name)
        if total == 0:
            raise SystemExit(
                f"{self._file(name)}: missing, so what the samples took is not known; delete "
                f"{self.folder.parent} and run again"
            )
        return evaluations * samples / total, seconds * samples / total

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _total(self, name: str) -> list[float]:
        file = self._file(name)
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else [0, 0, 0.0]


BACKWARD = 2
"""forwards that a backward pass costs as much as"""


class Meter:
    """Counts what one run evaluates, by hooks on the transformers' blocks: a forward of one sample
    through all of them is one evaluation, a backward two, and what a backward pass computes again
    counts again.

    Samples that an earlier recipe solved for this run are added by `taken_over`; those of the run
    that a warm start begins with are not.
    """

    def __init__(self, costs: SampleCosts):
        self.costs = costs
        self.forwards = 0.0
        """of single samples"""
        self.backwards = 0.0
        self.solving = 0.0
        """those of the evaluations that solved samples"""
        self.checking = 0.0
        """those that sampled the student, to check or to show it"""
        self._solved: dict[str, set[int]] = defaultdict(set)
        self._shared: dict[str, set[int]] = defaultdict(set)
        self._real_load = Teacher.load_expert
        self._real_solve = data.solve_missing

    @property
    def evaluations(self) -> float:
        return self.forwards + BACKWARD * self.backwards

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, evaluations and solved samples are counted."""
        meter = self

        def load(self: Teacher, expert: Expert) -> WanTransformer3DModel:
            transformer = meter._real_load(self, expert)
            meter._watch(transformer)
            return transformer

        with (
            patch.object(Teacher, "load_expert", load),
            patch.object(data, "solve_missing", self._solve),
            patch.object(Monitor, "check", self._checking(Monitor.check)),
            patch.object(Previews, "write", self._checking(Previews.write)),
        ):
            yield

    def _watch(self, transformer: WanTransformer3DModel) -> None:
        """Counts what goes through the blocks, at a layer that is also part of a recomputation."""
        share = 1 / len(transformer.blocks)

        def forward(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            samples = share * len(output)
            self.forwards += samples
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add_backward(samples))

        for block in transformer.blocks:
            block.ffn.register_forward_hook(forward)

    def _add_backward(self, samples: float) -> None:
        self.backwards += samples

    def _checking(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """`method`, whose evaluations are counted apart too."""

        def counted(*args: Any, **named: Any) -> Any:
            before = self.evaluations
            try:
                return method(*args, **named)
            finally:
                self.checking += self.evaluations - before

        return counted

    def used(self) -> dict[str, set[int]]:
        """Folder -> the stored samples that this run read, whoever solved them."""
        return {name: self._solved[name] | rows for name, rows in self._shared.items()}

    def taken_over(self) -> tuple[float, float]:
        """Evaluations and seconds of the samples that an earlier recipe solved."""
        costs = [self.costs.of(name, len(rows)) for name, rows in self._shared.items() if rows]
        return sum(evaluations for evaluations, _ in costs), sum(seconds for _, seconds in costs)

    def _solve(self, run: Run, requests: Iterable[SampleRequest]) -> None:
        """`solve_missing`, one folder after the other, so that each has its own cost."""
        for request in requests:
            store = request.store
            name = store.folder.name
            missing = {row for row in request.rows if not store.is_solved(row)}
            before = self.evaluations
            started = time.perf_counter()
            try:
                self._real_solve(run, [request])
            finally:
                new = {row for row in missing if store.file(row).exists()}
                if new:
                    seconds = time.perf_counter() - started
                    spent = self.evaluations - before
                    self.solving += spent
                    self.costs.add(name, len(new), spent, seconds)
            self._solved[name] |= new
            earlier = store.earlier
            own = {
                row
                for row in request.rows
                if earlier is None or not (earlier / store.file(row).name).exists()
            }
            self._shared[name] |= own - self._solved[name]
