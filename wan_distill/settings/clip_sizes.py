"""Sizes of clips that the networks can compute."""

from __future__ import annotations

from wan_distill.errors import UsageError
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo


def check_clip(config: Config, multiple: int) -> None:
    """Frames fit the VAE, height and width are whole patches, there is room for a prompt. Raises
    UsageError.
    """
    if config.num_frames < 1 or config.num_frames % 4 != 1:
        near = max(1, (config.num_frames - 1) // 4 * 4 + 1)
        raise UsageError(
            f"--num_frames {config.num_frames}: Wan needs 4k+1 frames; use {near} or {near + 4}"
        )
    if config.max_sequence_length < 2:
        raise UsageError(
            f"--max_sequence_length {config.max_sequence_length}: need room for one word and its "
            "end mark"
        )
    for name in ("height", "width"):
        side = getattr(config, name)
        if side < multiple or side % multiple:
            near = max(multiple, side // multiple * multiple)
            raise UsageError(
                f"--{name} {side}: Wan's patches need a multiple of {multiple}; use {near} or "
                f"{near + multiple}"
            )


def check_positions(config: Config, teacher: TeacherInfo) -> None:
    """Raises UsageError where a clip is longer or wider than the positions that the transformer
    knows.
    """
    most = teacher.transformer.get("rope_max_seq_len", 1024)  # diffusers' default
    sizes = teacher.latent_shape(config)[1:]
    patch = teacher.transformer["patch_size"]
    for name, size, side in zip(("num_frames", "height", "width"), sizes, patch, strict=True):
        if size // side > most:
            raise UsageError(
                f"--{name} {getattr(config, name)}: needs {size // side} positions, of which "
                f"{teacher.name} has {most}; give a smaller number"
            )
