"""Going on where a run stopped: the same command resumes from the last whole checkpoint, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wan_distill import checkpoint
from wan_distill.config import OUTPUT, Config, UsageError
from wan_distill.denoiser import Denoiser, Role
from wan_distill.runtime import Learner, Metrics, NonFiniteError, Runtime, nonfinite_weight
from wan_distill.schedule import Expert
from wan_distill.trajectories import stretch

# Settings that may differ between a run and its continuation: they do not change what an update does. Processes times
# accumulation, which do, are compared as `parallel`.
FREE = {item.name for item in dataclasses.fields(Config) if item.metadata["group"] == OUTPUT} | {
    "teacher_path", "output_dir", "dry_run", "cache_dir", "verbose_loading", "allow_pickle", "max_train_steps",
    "expert", "sample_batch_size", "gradient_checkpointing", "gradient_accumulation_steps",
}


class Progress:
    """One expert's checkpoints, and what is put into them.

    Args:
        root: the expert's folder.
    """

    def __init__(self, config: Config, expert: Expert, root: Path, learners: dict[Role, Learner], metrics: Metrics,
                 runtime: Runtime):
        self.config, self.expert, self.root = config, expert, root
        self.learners, self.metrics, self.runtime = learners, metrics, runtime
        self.parallel = runtime.world * config.gradient_accumulation_steps

    def save(self, step: int) -> None:
        """A checkpoint of everything after `step` updates; a no-op where it already exists."""
        if self.runtime.is_main and not (self.root / f"checkpoint-{step}").exists():
            state = dict(config=self.config.to_json(), expert=self.expert, parallel=self.parallel,
                         done={role: learner.done for role, learner in self.learners.items()},
                         metrics=self.metrics.state())
            checkpoint.save(self.root, step, {role: learner.tensors() for role, learner in self.learners.items()},
                            state, self.config.checkpoints_total_limit)
        self.runtime.state.wait_for_everyone()

    def resume(self) -> int:
        """Restores the checkpoint that `--resume_from_checkpoint` means, and returns its step; 0 where there is none.

        Raises UsageError where it belongs to another run, saying what differs, or is not whole.
        """
        folder = self._chosen()
        if folder is None:
            self.metrics.resume({}, self.expert, 0)
            return 0
        tensors, state = checkpoint.load(folder)
        self._check_same_run(state, folder)
        for role, learner in self.learners.items():
            try:
                learner.restore(tensors[role], state["done"][role])
            except (KeyError, RuntimeError) as error:
                raise UsageError(f"{folder}: its tensors do not fit these settings ({' '.join(str(error).split())}); "
                                 "use those it was trained with, or another --output_dir") from error
        self.metrics.resume(state["metrics"], self.expert, state["step"])
        self.runtime.say(f"Going on from {folder}.")
        self.runtime.state.wait_for_everyone()
        return state["step"]

    def skip_or_stop(self, step: int, role: Role, denoiser: Denoiser, error: NonFiniteError) -> None:
        """After an update that could not be made: says what happened, then `--on_nonfinite` decides.

        Raises NonFiniteError, with the state before that update saved, when the run is to stop.
        """
        weight = nonfinite_weight(denoiser.experts[self.expert])
        sigmas = stretch(self.config.sigmas(), self.expert, self.config.boundary)
        said = (f"{error} at update {step + 1}, {role}, {self.expert} expert (sigma {sigmas[0]:.4f} to "
                f"{sigmas[-1]:.4f})" + (f"; its weight {weight} is not finite" if weight else ""))
        skipped = step + 1 - sum(learner.done for learner in self.learners.values())
        if self.config.on_nonfinite == "skip" and skipped <= self.config.nonfinite_limit and not weight:
            self.runtime.say(f"\n{said}: skipped ({skipped} of at most {self.config.nonfinite_limit}).")
            return
        self.save(step)
        raise NonFiniteError(f"{said}; no weight was changed and the state before it is saved in {self.root}. "
                             "Lower --learning_rate and give --allow_config_change to go on") from error

    def _chosen(self) -> Path | None:
        """The folder to resume from. An explicit one fails loudly; later ones of its run are set aside, not lost."""
        wanted = self.config.resume_from_checkpoint
        if wanted == "latest":
            return checkpoint.latest(self.root, self.runtime.say)
        folder = Path(wanted)
        try:
            state = checkpoint.verify(folder)
        except checkpoint.DamagedCheckpoint as error:
            raise UsageError(f"--resume_from_checkpoint {wanted}: {error}; give 'latest' or a whole "
                             "checkpoint-N folder") from error
        if state.get("expert") != self.expert:
            return checkpoint.latest(self.root, self.runtime.say)
        if self.runtime.is_main:
            for later in checkpoint.set_aside(self.root, state["step"]):
                self.runtime.say(f"{later.name}: set aside, since {folder.name} was asked for.")
        self.runtime.state.wait_for_everyone()
        return folder

    def _check_same_run(self, state: dict, folder: Path) -> None:
        now, before = self.config.to_json(), state["config"]
        changed = [f"{k} was {before.get(k)}, is {now[k]}" for k in now if k not in FREE and before.get(k) != now[k]]
        if state["parallel"] != self.parallel:
            changed.append(f"processes x gradient_accumulation_steps was {state['parallel']}, is {self.parallel}")
        if changed and self.config.allow_config_change:
            self.runtime.say(f"{folder}: going on although {'; '.join(changed)}.")
        elif changed:
            raise UsageError(f"{folder} was trained with other settings ({'; '.join(changed)}); "
                             "set them back, choose another --output_dir, or give --allow_config_change")
