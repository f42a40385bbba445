"""What a training run evaluates, and what the stored samples that it reads took; for quality.py."""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from diffusers import WanTransformer3DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan_distill.data import solving
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest
from wan_distill.model.denoiser import Denoiser


class SampleCosts:
    """Forwards and seconds that stored samples took, by the name of their folder, in a file."""

    def __init__(self, file: Path):
        self.file = file
        # folder -> [samples, forwards, seconds]
        self.totals: dict[str, list[float]] = {}
        if file.exists():
            self.totals = json.loads(file.read_text(encoding="utf-8"))

    def add(self, folder: str, samples: int, forwards: int, seconds: float) -> None:
        """Writes them at once: the run may be interrupted."""
        total = self.totals.get(folder, [0, 0, 0.0])
        new = (samples, forwards, seconds)
        self.totals[folder] = [a + b for a, b in zip(total, new, strict=True)]
        self.file.write_text(json.dumps(self.totals), encoding="utf-8")

    def of(self, folder: str, samples: int) -> tuple[float, float]:
        """Forwards and seconds that so many samples of a folder took, on average."""
        total, forwards, seconds = self.totals[folder]
        return forwards * samples / total, seconds * samples / total


class Meter:
    """Counts what one run evaluates.

    `forwards` are transformer forwards of single samples. Samples that an earlier recipe solved for
    this run are added by `taken_over`; those of the run that a warm start begins with are not.
    """

    def __init__(self, costs: SampleCosts):
        self.costs = costs
        self.forwards = 0
        self._solved: dict[str, set[int]] = defaultdict(set)
        self._shared: dict[str, set[int]] = defaultdict(set)
        self._real_forward = Denoiser._forward
        self._real_solve = solving.solve_missing

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Inside, forwards and solved samples are counted."""
        meter = self

        def forward(
            self: Denoiser, transformer: WanTransformer3DModel, x: Tensor, *inputs: Any
        ) -> Tensor:
            meter.forwards += len(x)
            return meter._real_forward(self, transformer, x, *inputs)

        with (
            patch.object(Denoiser, "_forward", forward),
            patch.object(solving, "solve_missing", self._solve),
        ):
            yield

    def taken_over(self) -> tuple[float, float]:
        """Forwards and seconds of the samples that an earlier recipe solved."""
        costs = [self.costs.of(name, len(rows)) for name, rows in self._shared.items() if rows]
        return sum(forwards for forwards, _ in costs), sum(seconds for _, seconds in costs)

    def _solve(self, run: Run, requests: Iterable[SampleRequest]) -> None:
        """`solve_missing`, one folder after the other, so that each has its own cost."""
        for request in requests:
            store = request.store
            name = store.folder.name
            missing = {row for row in request.rows if not store.is_solved(row)}
            forwards = self.forwards
            started = time.perf_counter()
            try:
                self._real_solve(run, [request])
            finally:
                new = {row for row in missing if store.file(row).exists()}
                if new:
                    seconds = time.perf_counter() - started
                    self.costs.add(name, len(new), self.forwards - forwards, seconds)
            self._solved[name] |= new
            earlier = store.earlier
            own = {
                row
                for row in request.rows
                if earlier is None or not (earlier / store.file(row).name).exists()
            }
            self._shared[name] |= own - self._solved[name]
