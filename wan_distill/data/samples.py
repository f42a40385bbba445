"""Samples that are solved once, stored at the sigmas where they are needed, and read by training.

The guided teacher's `trajectories` at all student sigmas (trajectory and consistency distillation,
and `--real_score samples`), its `anchors` at the student's second sigma (the diversity loss), the
high expert's `handovers` (inputs of the low phase), and the clips of the `evaluation`.

Each sample is one safetensors file, in a folder named by a hash of everything it depends on: a
later run reuses it, an interrupted one goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from wan_distill.data.first_frames import Prompt
from wan_distill.data.run import Run
from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.condition import Condition
from wan_distill.settings.fingerprints import fingerprint_file
from wan_distill.settings.recipes import recipe_of
from wan_distill.settings.sample_specs import SampleSpec, student_of
from wan_distill.system.files import DamagedFile, read_hashed, write_atomically
from wan_distill.system.runtime import to_device


class SampleStore:
    """The stored samples of one `SampleSpec`. Reads; `solving.solve_missing` writes.

    Sample i starts from noise keyed by (seed, i) and follows prompt i modulo their number, so a
    larger set begins with the smaller one.

    Args:
        prompts: what the samples show; by default the prompts to train on.
    """

    def __init__(self, run: Run, spec: SampleSpec, prompts: Sequence[Prompt] | None = None):
        self.run = run
        self.spec = spec
        self.prompts = tuple(run.prompts if prompts is None else prompts)
        self.students = self._students() if spec.sampler == "student" else {}
        """The student's file of each expert that takes part and has one."""
        digest = hashlib.sha256(json.dumps(self.key(), sort_keys=True).encode()).hexdigest()[:16]
        self.folder = run.caches.samples(spec.kind, digest)
        earlier = run.config.init_student_from
        self.earlier = RunFolder(Path(earlier)).samples(spec.kind, digest) if earlier else None

    def __len__(self) -> int:
        return self.spec.count

    def key(self) -> dict[str, Any]:
        """Everything that a sample depends on, in plain values. Without the number of samples."""
        config, spec = self.run.config, self.spec
        seed = config.eval_seed if spec.noise == "evaluation" else config.seed
        key = spec.key() | dict(prompts=list(self.prompts), seed=seed)
        key |= self.run.sampling_key(spec.sigmas, guided=spec.sampler == "teacher")
        if spec.sampler == "student":
            students = {expert: fingerprint_file(file) for expert, file in self.students.items()}
            key |= dict(students=students)
        return key

    # --------------------------------------------------------------------------------- reading

    def noise(self, row: int) -> Tensor:
        """The starting noise of one sample, [C, F, H, W]."""
        config = self.run.config
        if self.spec.noise == "evaluation":
            key: tuple[str | int, ...] = ("evaluation", config.eval_seed, "paired", row)
        else:
            key = (config.seed, "trajectory", row)
        return keyed_noise(self.run.latent_shape, *key)

    def at(self, rows: Sequence[int], sigmas: Sequence[float]) -> Tensor:
        """Latents [B, C, F, H, W] of samples `rows`, each at its own stored sigma (1: its noise).

        Raises UsageError where a file is damaged.
        """
        latents = [
            self.noise(row) if sigma == 1 else self._stored(row, self.spec.stored.index(sigma))
            for row, sigma in zip(rows, sigmas, strict=True)
        ]
        return to_device(torch.stack(latents), self.run.runtime.device)

    def prompts_of(self, rows: Iterable[int]) -> list[Prompt]:
        """The prompt of each of `rows`."""
        return [self.prompts[row % len(self.prompts)] for row in rows]

    def condition(self, rows: Iterable[int]) -> Condition:
        """What the samples show, on the device."""
        return self.run.condition(self.prompts_of(rows))

    def _stored(self, row: int, index: int) -> Tensor:
        file = self.file(row)
        try:
            state = file.stat()
            return _opened(file, (state.st_ino, state.st_size, state.st_mtime_ns))[index]
        except FileNotFoundError as error:
            raise UsageError(f"{file}: missing or damaged; run again") from error
        except DamagedFile as error:
            raise UsageError(f"{error}; delete it and run again") from error

    # ----------------------------------------------------------------------------- the folder

    def _students(self) -> dict[Expert, Path]:
        config, files = self.run.config, {}
        for expert in self.run.info.experts:
            file = student_of(config, expert)
            if file and expert_sigmas(self.spec.sigmas, expert, config.boundary_ratio):
                files[expert] = file
        return files

    def file(self, row: int) -> Path:
        return self.folder / f"{row:06d}.safetensors"

    def handed_over(self, row: int) -> Path:
        """Latents at the boundary, while the low expert's part is still to come."""
        return self.folder / f"{row:06d}.handed-over.safetensors"

    def handed_over_rows(self) -> list[int]:
        """The samples of which such a file is there."""
        files = self.folder.glob("*.handed-over.safetensors")
        return sorted(int(name) for f in files if (name := f.name.split(".")[0]).isdecimal())

    def batch_file(self, first_row: int) -> Path:
        """All files of a batch in one, while they are written: see `batches.finish_batches`."""
        return self.folder / f".batch-{first_row:06d}.unsplit"

    def is_solved(self, row: int) -> bool:
        """Whether a sample is here. One that the run named by `--init_student_from` has is taken
        over.
        """
        file = self.file(row)
        if self.earlier is None or file.exists():
            return file.exists()
        original = self.earlier / file.name
        try:
            read_hashed(original)
        except DamagedFile:  # or missing
            return False
        self.create()
        try:
            os.link(original, file)
        except OSError:  # another disk, or one without links
            write_atomically(file, original.read_bytes())
        return True

    def create(self) -> None:
        """Makes the folder, with a note of what its name stands for."""
        note = self.folder / "key.json"
        if not note.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(note, json.dumps(self.key(), indent=1, sort_keys=True).encode())


@functools.lru_cache(maxsize=256)  # each holds a memory map, and processes have a limit of those
def _opened(file: Path, state: tuple[int, ...]) -> Any:
    """The latents of a file, mapped into memory. Raises DamagedFile.

    Args:
        state: what tells the file from another one that takes its place.
    """
    read_hashed(file)
    return safe_open(file, framework="pt").get_slice("latents")


@dataclass(frozen=True)
class SampleRequest:
    """Samples that somebody is going to read."""

    store: SampleStore
    rows: frozenset[int]


@dataclass(frozen=True)
class Inputs:
    """What one expert's method reads: the run, and stored samples by purpose."""

    run: Run
    samples: Mapping[str, SampleStore]

    def requests(self, rows: Mapping[str, frozenset[int]]) -> list[SampleRequest]:
        """The samples at `rows`, given by purpose."""
        return [SampleRequest(self.samples[purpose], chosen) for purpose, chosen in rows.items()]


def open_inputs(run: Run, expert: Expert) -> Inputs:
    """The stores that `--method` reads for one expert; equal sets are one store. Solves nothing."""
    stores: dict[SampleSpec, SampleStore] = {}
    samples: dict[str, SampleStore] = {}
    has_high = student_of(run.config, "high") is not None
    specs = recipe_of(run.config).samples(run.config, expert, has_high)
    for purpose, spec in specs.items():
        if spec not in stores:
            stores[spec] = SampleStore(run, spec)
        samples[purpose] = stores[spec]
        if purpose.startswith("inputs") and spec.sampler == "teacher":
            run.runtime.say(
                "There is no distilled high expert: the low one learns from the guided teacher's "
                "hand-overs."
            )
    return Inputs(run, samples)
