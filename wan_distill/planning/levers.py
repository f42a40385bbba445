"""What lowers the memory of an update: one table, from which come the advice of an out-of-memory
error and the settings that fit a card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from wan_distill.errors import UsageError
from wan_distill.planning.hardware import GB, GPUS, USABLE
from wan_distill.planning.memory import Estimate, estimate, host_needs
from wan_distill.planning.wording import size
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of

Change = dict[str, Any]

CARDS = ("rtx-4090", "rtx-5090", "l40s", "h100", "h200")
CLIPS = ((49, 480, 832), (17, 480, 832), (33, 256, 448), (17, 256, 448))
# From what takes the most memory to what takes the least, all with the exact base: kept on the host
# it takes less of the card than a quantised one does, at no speed that was seen on an H200.
BASES: tuple[Change, ...] = (
    {"base_precision": "bf16", "offload": False},
    {"base_precision": "bf16", "offload": True},
    {"base_precision": "bf16", "offload": True, "use_8bit_adam": True},
)
VARIED = ("base_precision", "num_frames", "height", "width")


def levers(config: Config) -> list[Change]:
    """Single changes of the settings that may lower the peak."""
    shorter = max(1, (config.num_frames - 1) // 8 * 4 + 1)
    changes: list[Change] = [
        {"num_frames": shorter},
        {"gradient_checkpointing": True},
        {"train_batch_size": 1},
        {"use_8bit_adam": True},
        {"keep_attention": False},
    ]
    if not config.whole_student:
        changes += [{"base_precision": "fp8"}, {"base_precision": "nf4"}, {"offload": True}]
    return [*changes, *recipe_of(config).levers]


def savings(config: Config, info: TeacherInfo, need: Estimate) -> list[tuple[float, str]]:
    """(bytes saved, flags) of each single change that lowers the predicted peak, the largest saving
    first.
    """
    effects = []
    for change in levers(config):
        saved = need.peak - estimate(dataclasses.replace(config, **change), info).peak
        effects.append((saved, as_flags(change)))
    return sorted((e for e in effects if e[0] > 0.01 * need.peak), reverse=True)


def as_flags(change: Change) -> str:
    """The command-line flags that make `change`."""
    return " ".join(_as_flag(name, value) for name, value in change.items())


def _as_flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


@contextmanager
def explain_out_of_memory(config: Config, info: TeacherInfo, phase: str) -> Iterator[None]:
    """Turns the device's out-of-memory error into a UsageError: peak, phase, what was resident,
    what to try next.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = estimate(config, info)
        kinds = ", ".join(f"{name} {bytes_ / GB:.1f}" for name, bytes_ in need.by_kind().items())
        peak = "unknown"
        if torch.cuda.is_available():
            peak = f"{torch.cuda.max_memory_allocated() / GB:.1f} GB"
        advice = "; ".join(
            f"{flags} saves about {saved / GB:.1f} GB"
            for saved, flags in savings(config, info, need)
        )
        raise UsageError(
            f"out of GPU memory while {phase} (peak {peak}; an update needs about "
            f"{need.peak / GB:.1f} GB: {kinds}); "
            f"{advice or 'choose a smaller clip: --height, --width'}"
        ) from error


def what_fits(config: Config, info: TeacherInfo) -> dict[str, str]:
    """GPU -> flags of the largest clip whose predicted peak fits, with the exact base; empty where
    nothing does.
    """
    fitting = dict.fromkeys(CARDS, "")
    for changed in _candidates(config):
        waiting = [card for card in CARDS if not fitting[card]]
        if not waiting:
            break
        need = estimate(changed, info)
        host = max(host_needs(changed, info, need.trace).values(), default=0.0)
        besides = f", {size(host)} on the host" if changed.offload else ""
        for card in waiting:
            if need.peak < USABLE * GPUS[card].memory:
                flags = _difference(config, changed)
                fitting[card] = f"{flags} (peak {size(need.peak)}{besides})"
    return fitting


def _difference(config: Config, changed: Config) -> str:
    flags = [f"--{name}" for name in ("offload", "use_8bit_adam") if getattr(changed, name)]
    for name in VARIED:
        value = getattr(changed, name)
        if name in ("base_precision", "num_frames") or value != getattr(config, name):
            flags.append(f"--{name} {value}")
    return " ".join(flags)


def _candidates(config: Config) -> Iterator[Config]:
    """This run's settings with ever smaller clips, each with less and less on the card."""
    own = (config.num_frames, config.height, config.width)
    smaller = [clip for clip in CLIPS if _values(clip) < _values(own)]
    bases: tuple[Change, ...] = ({},) if config.whole_student else BASES
    for frames, height, width in [own, *smaller]:
        for base in bases:
            clip: Change = {"num_frames": frames, "height": height, "width": width}
            changed = clip | base | {"gradient_checkpointing": True}
            yield dataclasses.replace(config, **changed)


def _values(clip: tuple[int, int, int]) -> int:
    frames, height, width = clip
    return frames * height * width
