"""How long a job takes, part by part: operations, seconds, dollars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from wan_distill.planning.hardware import Hardware
from wan_distill.planning.memory import shape_of, teacher_trace
from wan_distill.planning.picture_work import encoding_flops, pictures_read, prompts_read
from wan_distill.planning.trace import Trace, trace
from wan_distill.planning.work import check_flops, solve_flops, update_work
from wan_distill.settings.config import BASELINE_STEPS, Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.picture_source import source_config
from wan_distill.settings.sample_specs import clips_of_source


@dataclass(frozen=True)
class Part:
    """One part of a job."""

    name: str
    flops: float
    """over all devices"""
    parallel: bool
    """whether devices share the work; otherwise each does all of it, or only one does any"""

    def seconds(self, hardware: Hardware) -> float:
        """Wall-clock seconds on `hardware`."""
        return self.flops / hardware.rate / (hardware.count if self.parallel else 1)


def parts(configs: Sequence[Config], info: TeacherInfo, prompts: int) -> list[Part]:
    """All parts of a job on `prompts` prompts, in their order.

    Args:
        configs: of its stages.
    """
    last = configs[-1]
    costs = [trace(shape_of(config, info)) for config in configs]
    texts, pictures = prompts_read(configs, prompts), pictures_read(configs, info, prompts)
    found = [
        Part("text encoder", texts * encoder_flops(info, last.max_sequence_length), False),
        Part("making pictures", pictures * making_flops(last, info), True),
        Part("encoding pictures", pictures * encoding_flops(last, info), False),
        Part("solving samples", solve_flops(configs, info, costs[0]), True),
    ]
    # Data-parallel processes make the same number of updates, each on its own samples.
    shared = last.context_parallel
    for config, cost in zip(configs, costs, strict=True):
        work = update_work(config, cost)
        for expert in config.experts:
            flops = sum(w.flops * w.updates for w in work if w.expert == expert)
            stage = f", {config.method}" if len(configs) > 1 else ""
            found.append(Part(f"{expert} expert{stage}", flops, shared))
    looks = sum(check_flops(c, info, cost) for c, cost in zip(configs, costs, strict=True))
    found.append(Part("checks and previews", looks, shared))
    if last.evaluate:
        shared = last.evaluation == "pairs"
        found.append(Part("evaluation", evaluation_flops(last, info, costs[-1]), shared))
    return [part for part in found if part.flops > 0]


def encoder_flops(info: TeacherInfo, tokens: int) -> float:
    """Operations of the text encoder for one prompt of `tokens` tokens; matrix products only."""
    file = info.folder / "text_encoder" / "config.json"
    if not file.exists():
        return 0.0
    settings = json.loads(file.read_text(encoding="utf-8"))
    width = settings.get("d_model", 0)
    attention = 4 * width * settings.get("num_heads", 0) * settings.get("d_kv", 0)
    feed_forward = 3 * width * settings.get("d_ff", 0)
    return 2.0 * tokens * settings.get("num_layers", 0) * (attention + feed_forward)


def making_flops(config: Config, info: TeacherInfo) -> float:
    """Operations of a whole clip of `--image_source`, whose first frame is a picture; 0 without."""
    source = info.picture_source
    if source is None:
        return 0.0
    own = source_config(config, source)
    cost = trace(shape_of(own, source))
    solved = own.evaluations(clips_of_source(own, 1).sigmas, guided=True) * cost.forward_flops
    return encoder_flops(source, own.max_sequence_length) + solved / own.train_batch_size


def evaluation_flops(config: Config, info: TeacherInfo, cost: Trace) -> float:
    """Operations of the evaluation's samples."""
    counts = evaluation_counts(config)
    done = counts["teacher"] * teacher_trace(config, info).forward_flops
    done += counts["student"] * cost.forward_flops
    return config.eval_samples * done / config.train_batch_size


def evaluation_counts(config: Config) -> dict[str, int]:
    """Transformer evaluations of one sample of each row of the evaluation, by who makes them: the
    teacher, also in a few steps; the students.
    """
    short = config.sigmas(BASELINE_STEPS)
    evaluations = config.evaluations(config.teacher_sigmas(), guided=True)
    evaluations += config.evaluations(short, guided=True)
    if config.evaluation == "sets":  # an independent set too, and unguided steps
        evaluations += config.evaluations(config.teacher_sigmas(), guided=True)
        evaluations += config.evaluations(short, guided=False)
    students = sum(
        config.evaluations(config.sigmas(steps), guided=False) for steps in config.sampling_steps
    )
    return dict(teacher=evaluations, student=students)
