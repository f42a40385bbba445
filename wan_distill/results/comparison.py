"""How near a student comes to its teacher: the gap closed, how sure that is, and what clips show
without a learned judge.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from wan_distill.data.first_frames import Prompt, text_of
from wan_distill.data.run import Run
from wan_distill.maths.distances import (
    diversity,
    frechet_distance,
    jackknife_error,
    picture_statistics,
    principal_components,
)
from wan_distill.maths.tiny_judge import Judge, Verdict
from wan_distill.maths.tiny_world import World, is_caption
from wan_distill.model.vae import decode
from wan_distill.results.samplers import Sampler, Samplers

COMPONENTS = 64
SAMPLES_PER_COMPONENT = 4  # with fewer, a Fréchet distance measures mostly its own noise
PICTURES = 96  # clips per row that are decoded; the latents' measures use all
JUDGED_PICTURES = 256  # the same of a tiny teacher, whose captions are obeyed or not
AT_ONCE = 16  # clips that are held decoded
JUDGED = ("obeys", "steadiness")
RATIOS = ("motion", "first_frame", "departure")  # to the teacher's, where they are measured
GROUPS = 16  # of the jackknife
NORMAL_95 = 1.96  # standard errors on either side of a 95 % interval


def gap_closed(distance: float, floor: float, worst: float) -> float:
    """1 for a Fréchet distance of `floor`, 0 for one of `worst`."""
    return 1 - (distance - floor) / (worst - floor)


def gap_error(sets: Sequence[Tensor], reference: Tensor) -> float:
    """The standard error of the gap closed, over samples: a jackknife that leaves out one of
    `GROUPS` groups at a time.

    Args:
        sets: vectors [N, D] of the student, of the teacher from the same noise, and of what closes
            nothing of the gap.
        reference: [N, D] of the teacher from other noise.
    """
    groups = min(GROUPS, len(reference))
    values = []
    for group in range(groups):
        kept = torch.arange(len(reference)) % groups != group
        distances = [frechet_distance(vectors[kept], reference[kept]) for vectors in sets]
        values.append(gap_closed(*distances))
    return jackknife_error(values)


def ratio_error(a: Tensor, b: Tensor) -> float:
    """The standard error of mean(a) / mean(b) over pairs [N], by a jackknife that leaves out one
    pair at a time; 0 for a single pair.
    """
    left_out = (a.sum() - a) / (b.sum() - b) if len(a) > 1 else a
    return jackknife_error(left_out.tolist())


def interval_95(value: float, error: float) -> list[float]:
    """Both ends of the 95 % interval of a value with this standard error."""
    return [value - NORMAL_95 * error, value + NORMAL_95 * error]


def judged(world: dict[str, Any] | None, clips: Tensor, texts: Iterable[str]) -> list[Verdict]:
    """Whether each clip shows what its caption says, and how steady the moving shape is: what needs
    no learned judge, where the teacher is a tiny one.

    Args:
        world: the values of its `World`; nothing is judged where it has none.
        clips: [N, F, H, W, 3] of RGB in [0, 1].
        texts: one for each; clips whose text is no caption of that world are left out.
    """
    if world is None:
        return []
    judge = Judge(World(**world))
    return [
        judge.verdict(2 * clip.permute(3, 0, 1, 2) - 1, text)
        for clip, text in zip(clips, texts, strict=True)
        if is_caption(text)
    ]


def shown(run: Run, latents: Tensor, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Means over the first clips, decoded: their pictures' statistics, and what `judged` says."""
    vae, world = run.teacher.load_vae(), run.info.world
    seen = latents[: JUDGED_PICTURES if world else PICTURES]
    sums: dict[str, float] = defaultdict(float)
    verdicts: list[Verdict] = []
    for start in range(0, len(seen), AT_ONCE):
        clips = decode(vae, seen[start : start + AT_ONCE])
        theirs = prompts[start : start + len(clips)]
        means = picture_statistics(clips) | run.first_frame_statistics(theirs, clips)
        for name, value in means.items():
            sums[name] += len(clips) * value
        verdicts += judged(world, clips, map(text_of, theirs))
    found = {name: total / len(seen) for name, total in sums.items()}
    if verdicts:
        obeyed, steadiness = zip(*verdicts, strict=True)
        found |= dict(obeys=mean(obeyed), steadiness=mean(steadiness))
    return found


def compare_sets(
    run: Run,
    rows: Samplers,
    drawn: Mapping[Sampler, Tensor],
    prompts: Sequence[Prompt],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The whole table as JSON-ready values.

    Args:
        drawn: latents [N, C, F, H, W] of every row and of the independent set.
        prompts: one for each sample.
        seconds: of each row's samples, by its name.
    """
    distinct, texts = len(set(prompts)), [text_of(prompt) for prompt in prompts]
    reference, paired = drawn[rows.independent], drawn[rows.paired]
    project = principal_components(torch.cat([reference, paired]), COMPONENTS)
    floor = frechet_distance(project(paired), project(reference))
    pictures = {row: shown(run, drawn[row], prompts) for row in rows.table}
    base = pictures[rows.paired]
    table: dict[Sampler, dict[str, Any]] = {}
    distances: dict[Sampler, Tensor] = {}
    for row in rows.table:
        latents, own = drawn[row], pictures[row]
        distances[row] = (latents - paired).square().flatten(1).mean(1).sqrt()
        distance = frechet_distance(project(latents), project(reference))
        table[row] = dict(
            sampler=row.name,
            steps=row.steps,
            evaluations=row.evaluations(run.config),
            frechet=distance,
            excess=distance / floor,
            **{name: own[name] for name in JUDGED if name in own},
            paired_distance=float(distances[row].mean()),
            **{name: own[name] / base[name] for name in RATIOS if name in base},
            diversity=diversity(latents, distinct) / diversity(paired, distinct),
            luminance_drift=own["luminance"] - base["luminance"],
            seconds_per_sample=seconds[row.name],
        )
    worst = table[rows.few_unguided]["frechet"]
    closed = {row.steps: gap_closed(table[row]["frechet"], floor, worst) for row in rows.students}
    best = rows.students[-1]
    sets = [project(drawn[row]) for row in (best, rows.paired, rows.few_unguided)]
    error = gap_error(sets, project(reference))
    components = project(reference).shape[1]
    known = math.isfinite(error)  # of two samples there is none
    ends = dict(gap_closed_interval=interval_95(closed[best.steps], error)) if known else {}
    return dict(
        kind="sets",
        rows=list(table.values()),
        floor=floor,
        gap_closed=closed[run.config.grid_steps],
        **ends,
        gap_closed_by_steps={str(n): value for n, value in closed.items()},
        samples=len(prompts),
        prompts=distinct,
        components=components,
        samples_needed=SAMPLES_PER_COMPONENT * components,
        eval_seed=run.config.eval_seed,
        clips=clip_list(texts, distances[best], distances[rows.few_guided]),
    )


def clip_list(prompts: Sequence[str], student: Tensor, few: Tensor) -> list[dict[str, Any]]:
    """What is known of each clip, in the order of the samples.

    Args:
        student: paired distances [N] of the finest student's clips.
        few: the same of the teacher's own few steps.
    """
    return [
        dict(prompt=prompt, paired_distance=own, few_paired_distance=other)
        for prompt, own, other in zip(prompts, student.tolist(), few.tolist(), strict=True)
    ]
