"""Resuming: the same command goes on from the last whole checkpoint, bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import wan_distill.training.checkpoint as checkpoint
import wan_distill.training.health as health
from wan_distill.data.first_frames import Prompt
from wan_distill.data.run import Run
from wan_distill.errors import NonFiniteError, UsageError, one_line
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import Expert
from wan_distill.model.denoiser import Denoiser, nonfinite_weight
from wan_distill.settings.config import Config
from wan_distill.settings.description import TEXT_PARTS, TeacherInfo
from wan_distill.settings.recipes import Role
from wan_distill.system.files import rename_aside
from wan_distill.training.learner import Learner
from wan_distill.training.metrics import Metrics
from wan_distill.training.monitor import updates_of
from wan_distill.training.stages import begun_with, explicit_checkpoint, newest_of, stage_of

# Settings that may differ between a run and its continuation: they decide neither what an update
# does nor which weights are exported. Processes x accumulation, which do, are part of `identity`.
FREE = {item.name for item in dataclasses.fields(Config) if item.metadata["free"]}
SAVE_AFTER = 1800.0  # seconds since the last checkpoint, however few updates they were


def identity(
    config: Config, info: TeacherInfo, prompts: Sequence[Prompt], sample_groups: int
) -> dict[str, Any]:
    """What makes a run this run, besides its settings, in words that a refusal can use."""
    return {
        "the teacher's files": info.fingerprint(),
        "the text encoder's and the tokenizer's files": info.fingerprint(TEXT_PARTS),
        "the prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        "processes x gradient_accumulation_steps": sample_groups
        * config.gradient_accumulation_steps,
    }


def check_resume(config: Config, run: dict[str, Any], say: Callable[[str], None]) -> None:
    """Before anything is loaded or written: does what `--output_dir` holds belong to this run?

    Args:
        run: its `identity`.
        say: gets one line for each difference that `--allow_config_change` permits.

    Raises UsageError naming what differs, or where `--resume_from_checkpoint` names no whole
    checkpoint.
    """
    folder = RunFolder(Path(config.output_dir))
    newest = [newest_of(checkpoint.found(folder.expert(expert))) for expert in config.experts]
    if config.resume_from_checkpoint != "latest":
        explicit = explicit_checkpoint(config)
        if stage_of(explicit, config) == "this":
            newest.append(newest_of([explicit]))
    for candidate, state in [pair for pair in newest if pair is not None]:
        changes = _changes(config, run, state)
        if changes and config.allow_config_change:
            say(f"{candidate}: going on although {'; '.join(changes)}.")
        elif changes:
            raise UsageError(
                f"{candidate} was trained with other settings ({'; '.join(changes)}); set them "
                f"back, choose another --output_dir, move {candidate.parent} and its student away "
                "to train it anew, or give --allow_config_change for what is left to do"
            )


def _changes(config: Config, run: dict[str, Any], state: dict[str, Any]) -> list[str]:
    """What differs between this run and the one of a checkpoint's `state`, in words."""
    stored = state["run"]
    return changed_settings(config, state["config"]) + [
        f"{name} were {stored.get(name)}, are {value}"
        for name, value in run.items()
        if stored.get(name) != value
    ]


def changed_settings(config: Config, stored: dict[str, Any]) -> list[str]:
    """In words, which settings that decide about a student are not those that were `stored`."""
    now, before = _wherever(config.to_json()), _wherever(stored)
    return [
        f"{name} was {before.get(name)}, is {now[name]}"
        for name in now
        if name not in FREE and before.get(name) != now[name]
    ]


def _wherever(settings: dict[str, Any]) -> dict[str, Any]:
    """The same for a job whose folder was moved: of an earlier stage within it, the name alone."""
    begun = settings.get("init_student_from")
    if begun is None or Path(begun).parent != Path(str(settings.get("output_dir"))):
        return settings
    return settings | {"init_student_from": Path(begun).name}


class Progress:
    """One expert's checkpoints, and what is put into them."""

    def __init__(
        self, run: Run, expert: Expert, learners: dict[Role, Learner], metrics: Metrics, job: Path
    ) -> None:
        self.run = run
        self.job = job  # the output folder of all stages
        self.expert: Expert = expert
        self.root = run.folder.expert(expert)
        self.learners = learners
        self.metrics = metrics
        groups = run.runtime.sample_groups
        self.identity = identity(run.config, run.info, run.prompts, groups)
        self.begun_with = begun_with(run.config, run.info)
        self.saved = time.monotonic()

    def overdue(self) -> bool:
        """Whether the last checkpoint is long ago; all ranks ask, and get the same answer."""
        return self.run.runtime.max_over_ranks(time.monotonic() - self.saved) > SAVE_AFTER

    def save(self, step: int) -> None:
        """A checkpoint of everything after `step` updates; nothing where a whole one exists. All
        ranks call it.
        """
        unwritten = self.metrics.state()
        runtime, config = self.run.runtime, self.run.config
        if runtime.is_main and not checkpoint.is_whole(self.root, step):
            state = dict(
                config=config.to_json(),
                expert=self.expert,
                run=self.identity,
                begun_with=self.begun_with,
                done={role: learner.done for role, learner in self.learners.items()},
                metrics=unwritten,
            )
            tensors: checkpoint.Tensors = {
                role: learner.tensors() for role, learner in self.learners.items()
            }
            checkpoint.save(self.root, step, tensors, state, config.checkpoints_total_limit)
        self.saved = time.monotonic()
        runtime.state.wait_for_everyone()

    def resume(self) -> int:
        """Restores the checkpoint that `--resume_from_checkpoint` means, and returns its step; 0
        without one. Raises UsageError where its tensors do not fit.
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
                    f"{folder}: its tensors do not fit these settings ({one_line(error)}); use "
                    "those it was trained with, or another --output_dir"
                ) from error
        step: int = state["step"]
        self.metrics.resume(state["metrics"], self.expert, step)
        self.run.runtime.say(f"Going on from {folder}.")
        self.run.runtime.state.wait_for_everyone()
        return step

    def skip_or_stop(
        self, step: int, role: Role, denoiser: Denoiser, error: NonFiniteError
    ) -> None:
        """After an update that could not be made: says what happened, then `--on_nonfinite`
        decides. Raises NonFiniteError to stop the run, with the state before that update saved
        unless its own weights are the ones that are not finite.
        """
        config = self.run.config
        weight = nonfinite_weight(denoiser.experts[self.expert])
        report = health.nonfinite_report(config, self.expert, role, step, error, weight)
        skipped = step + 1 - sum(learner.done for learner in self.learners.values())
        if config.on_nonfinite == "skip" and skipped <= config.nonfinite_limit and not weight:
            limit = config.nonfinite_limit
            self.run.runtime.say(f"\n{report}: skipped ({skipped} of at most {limit}).")
            return
        if is_sound := all(learner.is_finite() for learner in self.learners.values()):
            self.save(step)
        advice = health.how_to_go_on(config, role, self.root if is_sound else None, self.job)
        raise NonFiniteError(f"{report}; {advice}") from error

    def _chosen(self) -> Path | None:
        """The folder to resume from. Later ones than an explicit one are set aside, not lost."""
        runtime = self.run.runtime
        self._set_aside_of_another_student()
        if (wanted := self.run.config.resume_from_checkpoint) == "latest":
            return checkpoint.latest(self.root, runtime.say)
        folder, stage = Path(wanted), stage_of(Path(wanted), self.run.config)
        try:
            state = checkpoint.read_state(folder)
        except checkpoint.DamagedCheckpoint:  # pruned while another expert went on from it
            state = {}
        if stage == "later" or (stage == "this" and state.get("expert") != self.expert):
            return checkpoint.latest(self.root, runtime.say)
        # What an earlier stage does anew is what this one begins with.
        if runtime.is_main:
            step = state["step"] if stage == "this" else 0
            for later in checkpoint.set_aside(self.root, step):
                runtime.say(f"{later.name}: set aside, since {folder} was asked for.")
            best = self.run.folder.best(self.expert)
            done = state["done"]["student"] if stage == "this" else 0
            if best.exists() and updates_of(best) > done:
                name = rename_aside(best).name
                runtime.say(f"{name}: weights that a later check chose; set aside too.")
        runtime.state.wait_for_everyone()
        return folder if stage == "this" else None

    def _set_aside_of_another_student(self) -> None:
        """What a second stage made of a student that the first has changed since is made anew. Of
        the same one it is gone on from; UsageError where other settings made it.
        """
        config, runtime = self.run.config, self.run.runtime
        if not config.is_second_stage:
            return
        newest = newest_of(checkpoint.found(self.root))
        runtime.state.wait_for_everyone()  # before the main process renames what others look at
        if newest and newest[1].get("begun_with", self.begun_with) != self.begun_with:
            for folder in checkpoint.set_aside(self.root, 0) if runtime.is_main else ():
                runtime.say(f"{folder.name}: set aside, since the student it began with changed.")
            runtime.state.wait_for_everyone()
        check_resume(config, self.identity, runtime.say)
