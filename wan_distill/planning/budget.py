"""`--budget`: the counts of a job that fits a number of hours, and why these.

Quality grows with samples and with updates, and neither alone helps for long
(docs/methods_measured.md has the measurements), so all counts of a job are scaled together; its
batches stay. The choice is kept in the output folder: a continued run, perhaps on another machine,
makes the same job.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from wan_distill.errors import UsageError, one_line
from wan_distill.layout import RunFolder
from wan_distill.planning.hardware import hardware_of
from wan_distill.planning.parts import parts
from wan_distill.planning.wording import duration
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.resolve import resolve_stages
from wan_distill.settings.unread import unread
from wan_distill.system.files import write_atomically

# Shares of the default's counts, from 1/64 to 4: more was not measured.
SHARES = tuple(2 ** (eighth / 8) for eighth in range(-48, 17))
LEAST_MEASURED = 0.25  # of the usual clips that the student is measured with
# What is left of the gap / the same for half of the counts (docs/methods_measured.md).
LEFT_AFTER_DOUBLING = 0.7


@dataclasses.dataclass(frozen=True)
class Choice:
    """A job that fits the budget, or the usual one where there is no budget."""

    stages: tuple[Config, ...]
    share: float = 1.0
    """of the default's counts"""
    words: tuple[str, ...] = ()
    """lines of the plan: what was chosen, why, what twice the hours would bring, and which settings
    no stage reads
    """


# Settings that decide what one sample or update costs.
SAME_WORK = ("method", "expert", "height", "width", "num_frames", "sampling_steps", "rank")


def within_budget(config: Config, info: TeacherInfo, prompts: int) -> Choice:
    """The job with as many samples and updates as `--budget` hours allow. Counts that the user gave
    stay.

    Args:
        config: before it is resolved.
        prompts: how many are encoded.

    Raises UsageError where even the smallest job takes longer.
    """
    usual = resolve_stages(config, info)
    ignored = tuple(unread(config, usual))
    if config.budget is None:
        return Choice(usual, words=ignored)
    file = RunFolder(Path(usual[-1].output_dir)).budget
    share = _remembered(file, usual[-1])
    if share is not None:
        stages = scaled(config, usual, info, share)
        return Choice(stages, share, (f"Budget    {_counts(stages)}, as {file} says", *ignored))
    job = partial(scaled, config, usual, info)
    hardware = hardware_of(usual[-1], info)

    def seconds(share: float) -> float:
        return sum(part.seconds(hardware) for part in parts(job(share), info, prompts))

    share = _largest(seconds, config.budget)
    words = (
        f"Budget    {_counts(job(share))}: {share:.2g} of the usual counts",
        f"          about {duration(seconds(share))} of {duration(3600 * config.budget)}; samples "
        "and updates are scaled together, since neither alone helps for long",
        f"          {_doubled(job, share, _largest(seconds, 2 * config.budget))}",
        *ignored,
    )
    return Choice(job(share), share, words)


def remember(choice: Choice) -> None:
    """Writes the choice into the output folder, for the run's continuation."""
    config = choice.stages[-1]
    if config.budget is not None:
        note = json.dumps(dict(share=choice.share, **_asked(config))).encode()
        write_atomically(RunFolder(Path(config.output_dir)).budget, note)


def scaled(
    config: Config, usual: Sequence[Config], info: TeacherInfo, share: float
) -> tuple[Config, ...]:
    """The stages of `config` with `share` of the counts of its `usual` ones."""
    first, last = usual[0], usual[-1]
    counts = dict(
        num_trajectories=first.num_trajectories,
        max_train_steps=first.max_train_steps,
        critic_warmup_steps=last.critic_warmup_steps,
    )
    if len(usual) > 1:
        counts["refine_steps"] = last.max_train_steps
    measured = min(1.0, max(LEAST_MEASURED, share))
    shares = dict.fromkeys(counts, share) | {"eval_samples": measured}
    counts["eval_samples"] = last.eval_samples
    chosen: dict[str, Any] = {
        name: max(2, round(shares[name] * count))
        for name, count in counts.items()
        if getattr(config, name) is None
    }
    # The folder is the job's whatever is chosen: otherwise another choice would begin anew.
    here = dataclasses.replace(config, output_dir=usual[-1].output_dir, **chosen)
    return resolve_stages(here, info)


def _asked(config: Config) -> dict[str, Any]:
    """What a share is chosen for, as JSON has it: of another clip the same share takes other hours.

    Args:
        config: resolved.
    """
    return {name: config.to_json()[name] for name in ("budget", *SAME_WORK)}


def _remembered(file: Path, config: Config) -> float | None:
    """The share that this run began with; None where it was chosen for other work. Raises
    UsageError where the note is damaged.
    """
    if not file.exists():
        return None
    try:
        note = json.loads(file.read_text(encoding="utf-8"))
        share, asked = float(note.pop("share")), _asked(config)
        return share if note == asked else None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{file}: is damaged ({one_line(error)}); delete it, and the budget is planned anew"
        ) from error


def _largest(seconds: Callable[[float], float], hours: float) -> float:
    """The largest of `SHARES` that takes at most `hours`, the same on every process.

    Args:
        seconds: that a job with a share of the usual counts takes.
    """
    number = bisect.bisect_right(SHARES, 3600 * hours, key=seconds)
    found = [number]
    if dist.is_initialized():  # each has measured the rate of its own device
        dist.broadcast_object_list(found, src=0)
    if not found[0]:
        raise UsageError(
            f"--budget {hours:g}: even {SHARES[0]:.2g} of the usual counts takes about "
            f"{duration(seconds(SHARES[0]))}; give more hours, a shorter clip, or --no-evaluate"
        )
    return SHARES[found[0] - 1]


def _counts(stages: Sequence[Config]) -> str:
    updates = " + ".join(str(stage.max_train_steps) for stage in stages)
    return f"{stages[0].num_trajectories} samples, {updates} updates per expert"


def _doubled(job: Callable[[float], Sequence[Config]], share: float, more: float) -> str:
    """What `more` of the usual counts would bring instead of `share`."""
    if more == share:
        return "more hours: no larger job has been measured"
    left = LEFT_AFTER_DOUBLING ** math.log2(more / share)
    return (
        f"twice the hours: {_counts(job(more))}; {left:.2f} times as much of the gap is then left "
        "(measured on the tiny teacher)"
    )
