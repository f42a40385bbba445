"""The parts of a job in the order of time, for its progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from wan_distill.planning.hardware import Hardware
from wan_distill.planning.memory import shape_of
from wan_distill.planning.parts import evaluation_counts, parts
from wan_distill.planning.picture_work import pictures_read, prompts_read
from wan_distill.planning.trace import trace
from wan_distill.planning.work import check_flops, flops_of, sample_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.system.job_clock import Leg


def stage_name(config: Config, expert: str) -> str:
    """What the training of one expert is called."""
    return f"refine {expert}" if config.is_second_stage else expert


def timeline(
    configs: Sequence[Config], info: TeacherInfo, prompts: int, hardware: Hardware
) -> list[Leg]:
    """The legs of a job on `prompts` distinct prompts: encode, and their pictures where there are
    some; for each expert of each stage solve and train; evaluate.

    Args:
        configs: of its stages.
    """
    last = configs[-1]
    seconds = {part.name: part.seconds(hardware) for part in parts(configs, info, prompts)}
    texts = prompts_read(configs, prompts)
    legs = [Leg("encode", seconds.get("text encoder", 0.0), texts)]
    pictures = pictures_read(configs, info, prompts)
    if info.picture_source is not None:
        making = Leg("make pictures", seconds.get("making pictures", 0.0), bars=2)
        legs += [Leg("encode", 0.0, pictures), making]
    if info.takes_picture:
        legs.append(Leg("encode pictures", seconds.get("encoding pictures", 0.0), pictures))
    if not last.evaluate_only:
        legs += _training(configs, info, seconds, hardware)
    if last.evaluate or last.evaluate_only:
        units = last.eval_samples * sum(evaluation_counts(last).values())
        legs.append(Leg("evaluate", seconds.get("evaluation", 0.0), units, bars=9))
    return legs


def _training(
    configs: Sequence[Config], info: TeacherInfo, seconds: dict[str, float], hardware: Hardware
) -> Iterator[Leg]:
    solved = 0.0, 0.0
    for i, config in enumerate(configs):
        cost = trace(shape_of(config, info))
        for expert in config.experts:
            until = [*configs[:i], _with_experts_to(config, expert)]
            before, solved = solved, _solving(until, info)
            rate = hardware.rate * hardware.count
            flops, steps = solved[0] - before[0], solved[1] - before[1]
            yield Leg("solve", flops / rate, steps / hardware.count)
            stage = f", {config.method}" if len(configs) > 1 else ""
            looks = check_flops(dataclasses.replace(config, expert=expert), info, cost)
            training = seconds.get(f"{expert} expert{stage}", 0.0) + looks / hardware.rate
            yield Leg(stage_name(config, expert), training)


def _with_experts_to(config: Config, expert: str) -> Config:
    """`config` for the experts up to `expert`."""
    return config if expert == config.experts[-1] else dataclasses.replace(config, expert=expert)


def _solving(configs: Sequence[Config], info: TeacherInfo) -> tuple[float, float]:
    """(operations, solver steps) of all samples that `configs` read."""
    first, work = configs[0], sample_work(configs, info)
    steps = sum(each.rows * (len(each.spec.sigmas) - 1) for each in work)
    return flops_of(work, first, info, trace(shape_of(first, info))), steps
