"""Going on where a run stopped: the same command resumes from the last whole checkpoint, bit for
bit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from wan_distill.data.run import Sources
from wan_distill.errors import NonFiniteError, UsageError
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser, nonfinite_weight
from wan_distill.settings.config import OUTPUT, Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import Role
from wan_distill.training import checkpoint
from wan_distill.training.learner import Learner
from wan_distill.training.metrics import Metrics

# Settings that may differ between a run and its continuation: they do not change what an update
# does. Processes times
# accumulation, which do, are compared as `parallel`.
FREE = {item.name for item in dataclasses.fields(Config) if item.metadata["group"] == OUTPUT} | {
    "teacher_path",
    "output_dir",
    "dry_run",
    "cache_dir",
    "verbose_loading",
    "allow_pickle",
    "max_train_steps",
    "expert",
    "sample_batch_size",
    "gradient_checkpointing",
    "gradient_accumulation_steps",
    "prompts",
    "shard",
    "offload",
    "context_parallel",
}


def identity(config: Config, info: TeacherInfo, prompts: list[str], sample_groups: int) -> dict:
    """What makes a run this run, besides its settings, in words that a refusal can use."""
    return {
        "the teacher's files": info.fingerprint(),
        "the prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16],
        "processes x gradient_accumulation_steps": sample_groups
        * config.gradient_accumulation_steps,
    }


def check_resume(config: Config, run: dict, say) -> None:
    """Before anything is loaded or written: does what `--output_dir` holds belong to this run
    (`identity`)?

    Raises UsageError naming what differs, or where `--resume_from_checkpoint` names no whole
    checkpoint.
    """
    folders = [
        next(iter(checkpoint.found(Path(config.output_dir) / expert)), None)
        for expert in config.experts
    ]
    if config.resume_from_checkpoint != "latest":
        try:
            checkpoint.verify(Path(config.resume_from_checkpoint))
        except checkpoint.DamagedCheckpoint as error:
            raise UsageError(
                f"--resume_from_checkpoint {config.resume_from_checkpoint}: {error}; give 'latest' "
                "or a "
                "whole checkpoint-N folder"
            ) from error
        folders.append(Path(config.resume_from_checkpoint))
    for folder in filter(None, folders):
        try:
            state = checkpoint.read_state(folder)
        except checkpoint.DamagedCheckpoint:
            continue  # an older one will be resumed from
        now, before = config.to_json(), state["config"]
        changed = [
            f"{k} was {before.get(k)}, is {now[k]}"
            for k in now
            if k not in FREE and before.get(k) != now[k]
        ]
        changed += [
            f"{k} were {state['run'].get(k)}, are {v}"
            for k, v in run.items()
            if state["run"].get(k) != v
        ]
        if changed and config.allow_config_change:
            say(f"{folder}: going on although {'; '.join(changed)}.")
        elif changed:
            raise UsageError(
                f"{folder} was trained with other settings ({'; '.join(changed)}); "
                "set them back, choose another --output_dir, or give --allow_config_change"
            )


class Progress:
    """One expert's checkpoints, and what is put into them.

    Args:
        root: the expert's folder.
    """

    def __init__(
        self,
        expert: Expert,
        sources: Sources,
        root: Path,
        learners: dict[Role, Learner],
        metrics: Metrics,
    ):
        self.config, self.runtime = sources.config, sources.runtime
        self.expert, self.root, self.learners, self.metrics = expert, root, learners, metrics
        self.run = identity(
            self.config, sources.teacher.info, sources.prompts, self.runtime.sample_groups
        )

    def save(self, step: int) -> None:
        """A checkpoint of everything after `step` updates; a no-op where it already exists. All
        ranks call it.
        """
        unwritten = self.metrics.state()
        if self.runtime.is_main and not (self.root / f"checkpoint-{step}").exists():
            state = dict(
                config=self.config.to_json(),
                expert=self.expert,
                run=self.run,
                done={role: learner.done for role, learner in self.learners.items()},
                metrics=unwritten,
            )
            checkpoint.save(
                self.root,
                step,
                {role: learner.tensors() for role, learner in self.learners.items()},
                state,
                self.config.checkpoints_total_limit,
            )
        self.runtime.state.wait_for_everyone()

    def resume(self) -> int:
        """Restores the checkpoint that `--resume_from_checkpoint` means, and returns its step; 0
        where there is none.

        Raises UsageError where its tensors do not fit; `check_resume` has seen to the rest.
        """
        folder = self._chosen()
        if folder is None:
            self.metrics.resume({}, self.expert, 0)
            return 0
        tensors, state = checkpoint.load(folder)
        for role, learner in self.learners.items():
            try:
                learner.restore(tensors[role], state["done"][role])
            except (KeyError, RuntimeError) as error:
                raise UsageError(
                    f"{folder}: its tensors do not fit these settings "
                    f"({' '.join(str(error).split())}); "
                    "use those it was trained with, or another --output_dir"
                ) from error
        self.metrics.resume(state["metrics"], self.expert, state["step"])
        self.runtime.say(f"Going on from {folder}.")
        self.runtime.state.wait_for_everyone()
        return state["step"]

    def skip_or_stop(
        self, step: int, role: Role, denoiser: Denoiser, error: NonFiniteError
    ) -> None:
        """After an update that could not be made: says what happened, then `--on_nonfinite`
        decides.

        Raises NonFiniteError, with the state before that update saved, when the run is to stop.
        """
        weight = nonfinite_weight(denoiser.experts[self.expert])
        sigmas = expert_sigmas(self.config.sigmas(), self.expert, self.config.boundary)
        said = (
            f"{error} at update {step + 1}, {role}, {self.expert} expert (sigma {sigmas[0]:.4f} to "
            f"{sigmas[-1]:.4f})" + (f"; its weight {weight} is not finite" if weight else "")
        )
        skipped = step + 1 - sum(learner.done for learner in self.learners.values())
        if (
            self.config.on_nonfinite == "skip"
            and skipped <= self.config.nonfinite_limit
            and not weight
        ):
            self.runtime.say(
                f"\n{said}: skipped ({skipped} of at most {self.config.nonfinite_limit})."
            )
            return
        self.save(step)
        raise NonFiniteError(
            f"{said}; no weight was changed and the state before it is saved in {self.root}. "
            "Lower --learning_rate and give --allow_config_change to go on"
        ) from error

    def _chosen(self) -> Path | None:
        """The folder to resume from. Later ones than an explicit one are set aside, not lost."""
        wanted = self.config.resume_from_checkpoint
        if wanted == "latest":
            return checkpoint.latest(self.root, self.runtime.say)
        folder = Path(wanted)
        state = checkpoint.read_state(folder)
        if state.get("expert") != self.expert:
            return checkpoint.latest(self.root, self.runtime.say)
        if self.runtime.is_main:
            for later in checkpoint.set_aside(self.root, state["step"]):
                self.runtime.say(f"{later.name}: set aside, since {folder.name} was asked for.")
        self.runtime.state.wait_for_everyone()
        return folder
