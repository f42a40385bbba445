"""Samples solved once and stored at the sigmas where they are needed: "knots".

Three kinds: the guided teacher's trajectories at all student sigmas (trajectory and consistency
distillation, and `--real_score samples`), its anchors at the student's second sigma (the diversity
loss), and the distilled high expert's hand-overs (inputs of the low phase).

They are kept in safetensors shards in a folder named by a hash of everything they depend on, so a
later run reuses them and an interrupted one goes on. Experts take turns: the high expert carries
every sample to the boundary, then the low one finishes, so that a single expert is in memory at a
time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from wan_distill.data.embeddings import PromptBank
from wan_distill.data.rollout import guided
from wan_distill.errors import NonFiniteError, UsageError
from wan_distill.layout import student_file
from wan_distill.maths.flow import Velocity, euler
from wan_distill.maths.randomness import keyed_noise
from wan_distill.maths.sigmas import Expert, expert_sigmas, handover, insert_sigmas, sigma_grid
from wan_distill.model.denoiser import Denoiser, nonfinite_weight
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import load_student
from wan_distill.settings.config import Config
from wan_distill.system.console import progress_bar
from wan_distill.system.files import write_atomically, write_tensors
from wan_distill.system.runtime import Runtime, to_device

SHARD_BYTES = 64 << 20


def teacher_sigmas(config: Config) -> tuple[float, ...]:
    """The teacher's solver grid, with the student's sigmas among its points."""
    return insert_sigmas(config.sigmas(), sigma_grid(config.teacher_steps, config.teacher_shift))


class StoredSamples:
    """Solved samples: noise, latents at every knot, and the prompt.

    Sample i starts from noise keyed by (seed, i) and follows prompt i modulo their number, so a
    longer set begins with the shorter one.

    Args:
        sigmas: the solver's points, from 1 to the last knot.
        knots: those of them at which latents are kept.
        student: file of the distilled high expert, which then takes the guided teacher's place.
    """

    def __init__(
        self,
        config: Config,
        teacher: Teacher,
        bank: PromptBank,
        prompts: list[str],
        runtime: Runtime,
        *,
        kind: str,
        sigmas: tuple[float, ...],
        knots: tuple[float, ...],
        student: Path | None = None,
    ):
        self.config = config
        self.bank = bank
        self.prompts = prompts
        self.runtime = runtime
        self.teacher = teacher
        self.student = student
        self.shape = teacher.info.latent_shape(config)
        self.sigmas = sigmas
        self.knots = knots
        per_sample = 4 * len(self.knots) * torch.Size(self.shape).numel()
        self.shard_size = max(1, min(32, SHARD_BYTES // per_sample))
        key = dict(
            teacher=teacher.info.fingerprint(),
            text=bank.key,
            prompts=prompts,
            sigmas=self.sigmas,
            knots=self.knots,
            shape=self.shape,
            seed=config.seed,
            dtype=config.mixed_precision,
            boundary=config.boundary,
            shard=self.shard_size,
            **config.base_key,
        )
        if student:
            key["student"] = hashlib.sha256(student.read_bytes()).hexdigest()
        else:
            key |= dict(
                negative=config.negative_prompt,
                guidance=[config.guidance_scale, config.guidance_scale_2],
            )
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self._open: dict[int, safe_open] = {}
        self.earlier = (
            Path(config.init_student_from) / kind / digest if config.init_student_from else None
        )
        self.folder = Path(config.output_dir) / kind / digest
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "key.json", json.dumps(key, indent=1).encode())

    def __len__(self) -> int:
        return self.config.num_trajectories

    @property
    def shards(self) -> int:
        return -(-len(self) // self.shard_size)

    # ---------------------------------------------------------------------------------- making them

    def shard(self, index: int) -> Path:
        return self.folder / f"{index:05d}.safetensors"

    def solve(self, negative: Tensor) -> None:
        """Solves what is missing; each rank its own shards. `negative` [1, L, D] is the negative
        prompt.
        """
        count, runtime = self.shards, self.runtime
        # By number, not by what is left: ranks look at the folder at different moments.
        todo = runtime.told_by_main(
            [
                i
                for i in range(runtime.sample_rank, count, runtime.sample_groups)
                if not self._solved(i)
            ]
        )
        experts = [
            e
            for e in self.teacher.info.experts
            if expert_sigmas(self.sigmas, e, self.config.boundary)
        ]
        evaluations = {
            e: len(expert_sigmas(self.sigmas, e, self.config.boundary)) - 1 for e in experts
        }
        total = len(todo) * self.shard_size * sum(evaluations.values())
        with progress_bar(total, self.folder.parent.name, "step", runtime.is_main) as bar:
            for expert in experts:
                pending = runtime.told_by_main(
                    [i for i in todo if expert != "high" or not self._handed_over(i).exists()]
                )
                bar.update((len(todo) - len(pending)) * self.shard_size * evaluations[expert])
                # Sharded, a forward needs all ranks: those with less to do join in with samples
                # that nobody keeps.
                most = (
                    int(runtime.max_over_ranks(len(pending))) if runtime.sharded else len(pending)
                )
                if most:
                    self._solve_shards(
                        [*pending, *[None] * (most - len(pending))], expert, negative, bar
                    )
        runtime.state.wait_for_everyone()

    def _solve_shards(
        self, indices: list[int | None], expert: Expert, negative: Tensor, bar: tqdm
    ) -> None:
        """One expert's stretch of each; the expert is let go before the next one is loaded."""
        transformer = self.teacher.load_expert(expert)
        if self.student:
            load_student(transformer, self.student)
        denoiser = Denoiser(
            {expert: transformer}, self.config.boundary, self.teacher.info.expand_timesteps
        )
        for index in indices:
            self.runtime.stop_here_if_asked()
            self._solve_shard(index, expert, denoiser, negative, bar)

    def _solved(self, index: int) -> bool:
        """Whether a shard is here. One that the run named by `--init_student_from` has solved is
        taken over.
        """
        file = self.shard(index)
        if self.earlier and not file.exists() and (kept := self.earlier / file.name).exists():
            with suppress(SafetensorError), safe_open(kept, framework="pt"):  # whole, by its header
                try:
                    os.link(kept, file)
                except OSError:  # another disk, or one without links
                    write_atomically(file, kept.read_bytes())
        return file.exists()

    def _handed_over(self, index: int) -> Path:
        return self.folder / f"{index:05d}.handed-over.safetensors"

    @torch.no_grad()
    def _solve_shard(
        self, index: int | None, expert: Expert, denoiser: Denoiser, negative: Tensor, bar: tqdm
    ) -> None:
        """One expert's stretch of one shard; None: of samples that are thrown away."""
        rows = range((index or 0) * self.shard_size, ((index or 0) + 1) * self.shard_size)
        if expert == "high" or index is None:
            held = {
                "latents": torch.stack([self.noise(i) for i in rows]),
                "knots": torch.empty(len(rows), 0),
            }
        else:
            held = load_file(self._handed_over(index))
        sigmas = expert_sigmas(self.sigmas, expert, self.config.boundary)
        latents, knots = [], []
        size = self.config.sample_batch_size
        for start in range(0, len(rows), size):
            x = held["latents"][start : start + size].to(self.runtime.device)
            velocity = self._velocity(
                denoiser, expert, self.prompt(rows[start : start + size]), negative
            )
            passed = []
            for sigma, solved in zip(sigmas[1:], euler(velocity, x, sigmas), strict=True):
                bar.update(len(x) if index is not None else 0)
                if sigma in self.knots:
                    passed.append(solved.cpu())
            latents.append(solved.cpu())
            knots.append(
                torch.stack(passed, dim=1) if passed else torch.empty(len(x), 0, *self.shape)
            )
        if index is None or (self.runtime.together and not self.runtime.is_main):
            return
        if not all(torch.isfinite(x).all() for x in latents):
            weight = nonfinite_weight(denoiser.experts[expert])
            raise NonFiniteError(
                f"{self.folder.parent.name} {index}: the {expert} expert gives latents that are "
                "not "
                f"finite; {f'its weight {weight} is not either' if weight else 'its weights are'}: "
                "download the teacher again, or try --mixed_precision no"
            )
        held["knots"] = torch.cat(
            [held["knots"].view(len(rows), -1, *self.shape), torch.cat(knots)], dim=1
        )
        if sigmas[-1] > self.sigmas[-1]:
            write_tensors(
                self._handed_over(index), {"latents": torch.cat(latents), "knots": held["knots"]}
            )
        else:
            write_tensors(self.shard(index), {"knots": held["knots"]})
            self._handed_over(index).unlink(missing_ok=True)

    def _velocity(
        self, denoiser: Denoiser, expert: Expert, prompt: Tensor, negative: Tensor
    ) -> Velocity:
        teacher = guided(denoiser, self.config, expert, prompt, negative)

        def velocity(x: Tensor, sigma: Tensor) -> Tensor:
            with self.runtime.autocast():
                return (
                    denoiser.velocity(x, sigma, prompt, role="student")
                    if self.student
                    else teacher(x, sigma)
                )

        return velocity

    # --------------------------------------------------------------------------------- reading them

    def noise(self, row: int) -> Tensor:
        """The starting noise of one sample, [C, F, H, W]."""
        return keyed_noise(self.shape, self.config.seed, "trajectory", row)

    def at(self, rows: Sequence[int], sigmas: Sequence[float]) -> Tensor:
        """Latents [B, C, F, H, W] of samples `rows`, each at its own knot (or at 1: its noise)."""
        latents = [
            self.noise(row) if sigma == 1 else self._knot(row, self.knots.index(sigma))
            for row, sigma in zip(rows, sigmas, strict=True)
        ]
        return to_device(torch.stack(latents), self.runtime.device)

    def prompt(self, rows: Sequence[int]) -> Tensor:
        """Embeddings [B, L, D] of the samples' prompts."""
        return self.bank.batch([self.prompts[row % len(self.prompts)] for row in rows])

    def _knot(self, row: int, knot: int) -> Tensor:
        index, offset = divmod(row, self.shard_size)
        if index not in self._open:
            try:
                self._open[index] = safe_open(self.shard(index), framework="pt")
            except SafetensorError as error:
                raise UsageError(
                    f"{self.shard(index)}: damaged ({error}); delete it and run again"
                ) from error
        return self._open[index].get_slice("knots")[offset, knot]


def trajectories(
    config: Config, teacher: Teacher, bank: PromptBank, prompts: list[str], runtime: Runtime
):
    """The guided teacher at every student sigma."""
    return StoredSamples(
        config,
        teacher,
        bank,
        prompts,
        runtime,
        kind="trajectories",
        sigmas=teacher_sigmas(config),
        knots=config.sigmas()[1:],
    )


def anchors(
    config: Config, teacher: Teacher, bank: PromptBank, prompts: list[str], runtime: Runtime
):
    """The guided teacher at the student's second sigma, for the diversity loss."""
    sigmas = teacher_sigmas(config)
    second = config.sigmas()[1]
    return StoredSamples(
        config,
        teacher,
        bank,
        prompts,
        runtime,
        kind="anchors",
        knots=(second,),
        sigmas=sigmas[: sigmas.index(second) + 1],
    )


def handovers(
    config: Config,
    teacher: Teacher,
    bank: PromptBank,
    prompts: list[str],
    runtime: Runtime,
    *,
    steps: int,
):
    """What the high expert hands to the low one in a grid of `steps`: the distilled one, else the
    guided teacher.
    """
    end = handover(config.sigmas(steps), config.boundary)
    student = distilled_high(config)
    if student is None:
        runtime.say(
            "No distilled high expert is here: the low one learns from the guided teacher's "
            "hand-overs."
        )
        if "real_score" in config.roles:  # solved to their end anyway
            return trajectories(config, teacher, bank, prompts, runtime)
    teacher_grid = sigma_grid(config.teacher_steps, config.teacher_shift)
    sigmas = config.sigmas(steps) if student else insert_sigmas((end,), teacher_grid)
    return StoredSamples(
        config,
        teacher,
        bank,
        prompts,
        runtime,
        kind="handovers",
        knots=(end,),
        sigmas=sigmas[: sigmas.index(end) + 1],
        student=student,
    )


def distilled_high(config: Config) -> Path | None:
    """The high expert's student of this run, or of the run it begins with."""
    folders = [config.output_dir, config.init_student_from]
    files = [student_file(folder, "high") for folder in folders if folder]
    return next((file for file in files if file.exists()), None)
