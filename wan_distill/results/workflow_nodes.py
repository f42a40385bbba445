"""What the workflows for ComfyUI have in common."""

from __future__ import annotations

from typing import Any

from wan_distill.maths.sigmas import Expert, steps_of
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo

Workflow = dict[str, dict[str, Any]]
"""Node number -> its class and inputs; [number, index] as an input is that output of a node."""

PROMPT = "a red fox runs through snow"
# The names under which ComfyUI's own templates download the files of A14B.
VAE = "wan_2.1_vae.safetensors"
A14B = "wan2.2_{kind}_{expert}_noise_14B_fp8_scaled.safetensors"
A14B_SIZE = (40, 40, 2)  # blocks, heads, experts


def first_step_of_low(config: Config, steps: int | None = None) -> int:
    """The number of steps that the high expert makes before the low one goes on, of `steps` or of
    the finest grid's.
    """
    return len(steps_of("high", config.sigmas(steps), config.boundary_ratio))


def phases(config: Config, info: TeacherInfo) -> list[tuple[Expert, int, int]]:
    """(expert, first step, the step after its last) of each expert that has any."""
    split, steps = first_step_of_low(config), config.grid_steps
    bounds: dict[Expert, tuple[int, int]] = {"high": (0, split), "low": (split, steps)}
    return [(e, *bounds[e]) for e in info.experts if bounds[e][0] < bounds[e][1]]


def base_file(info: TeacherInfo, expert: Expert) -> str:
    """The teacher's file, as ComfyUI's templates call it; of other models a name to replace."""
    replaced = info.changes.experts.get(expert)
    if replaced is not None and replaced.is_file():
        return replaced.name
    size = (info.transformer["num_layers"], info.transformer["num_attention_heads"])
    if (*size, len(info.experts)) == A14B_SIZE:
        return A14B.format(kind="i2v" if info.takes_picture else "t2v", expert=expert)
    return f"{info.name}_{expert}_noise.safetensors"


class Nodes:
    """Collects nodes; each call of `add` gives the number by which others refer to the node."""

    def __init__(self) -> None:
        self.all: Workflow = {}

    def add(self, kind: str, title: str = "", **inputs: Any) -> str:
        number = str(len(self.all) + 1)
        self.all[number] = dict(inputs=inputs, class_type=kind, _meta=dict(title=title or kind))
        return number

    def add_video(self, frames: str, fps: int) -> None:
        video = self.add("CreateVideo", images=[frames, 0], fps=float(fps))
        chosen = dict(filename_prefix="video/student", format="auto", codec="auto")
        self.add("SaveVideo", video=[video, 0], **chosen)
