"""Which prompts a job reads: the others are not encoded, and their pictures not made."""

from __future__ import annotations

from collections.abc import Sequence

from wan_distill.data.first_frames import Prompt
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import reads_all_prompts
from wan_distill.training.monitor import SEEDS, monitored
from wan_distill.training.previews import validation_prompts


def prompts_read(
    stages: Sequence[Config], prompts: Sequence[Prompt], held_out: Sequence[Prompt]
) -> list[Prompt]:
    """Those of the prompts to train on that samples follow, or that checks look at, and those of
    the `held_out` ones that previews and the evaluation show; none twice.

    Stored sample i follows prompt i modulo their number.
    """
    read = list(prompts[:1])  # the rehearsal's
    for config in stages:
        read += prompts if reads_all_prompts(config) else prompts[: config.num_trajectories]
        read += monitored(config, prompts) if config.monitor_steps else ()
        read += validation_prompts(config, held_out) if config.validation_steps else ()
    last = stages[-1]
    if last.evaluate or last.evaluate_only:
        read += held_out[: max(1, last.eval_samples // SEEDS)]
    return list(dict.fromkeys(read))
