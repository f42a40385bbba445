"""The text-to-video teacher whose clips' first frames are an image-to-video teacher's pictures."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.layout import RunFolder
from wan_distill.settings.checks import check_pictures
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.settings.resolve import resolve

# Of the job's settings, those that its clips have too, and those of the machine. Guidance, negative
# prompt, boundary and text length are its own.
SHARED = (
    *("prompts", "height", "width", "num_frames", "teacher_solver", "solver_steps"),
    *("mixed_precision", "base_precision", "offload", "shard", "context_parallel", "compile"),
    *("sample_batch_size", "deterministic", "cache_dir", "allow_pickle", "verbose_loading"),
    *("gpu", "dry_run"),
)


def read_teachers(config: Config) -> TeacherInfo:
    """The teacher, with the one that `--image_source` names as its `picture_source`.

    Raises UsageError as `read_teacher` does, and where the second one is not wanted, or makes no
    clips from text.
    """
    info = read_teacher(config)
    if config.image_source is None:
        return info
    check_pictures(config, info)
    asked = Config(
        teacher_path=config.image_source,
        cache_dir=config.cache_dir,
        allow_pickle=config.allow_pickle,
    )
    with named_by_its_flag():
        source = read_teacher(asked)
    if source.takes_picture:
        raise UsageError(
            f"--image_source {config.image_source}: needs a picture itself; give a text-to-video "
            "teacher, such as Wan-AI/Wan2.2-T2V-A14B-Diffusers"
        )
    return dataclasses.replace(info, picture_source=source)


def source_config(config: Config, source: TeacherInfo) -> Config:
    """The settings of `source`, which makes the pictures of the job of `config`.

    Its noise is its own: a picture must tell nothing of the noise that its clip begins with.
    Raises UsageError where it cannot make such clips.

    Args:
        config: resolved.
    """
    shared = {name: getattr(config, name) for name in SHARED}
    root = RunFolder(Path(config.samples_dir or config.output_dir))
    digest = hashlib.sha256(f"pictures {config.seed}".encode()).hexdigest()
    asked = Config(
        **shared,
        teacher_path=config.image_source,
        method="trajectory",
        output_dir=str(root.image_source.path),
        seed=int(digest[:8], 16),
    )
    with named_by_its_flag():
        return resolve(asked, source)


@contextmanager
def named_by_its_flag() -> Iterator[None]:
    """Inside, what is wrong with the teacher is said of `--image_source`."""
    try:
        yield
    except UsageError as error:
        message = str(error).replace("--teacher_path ", "--image_source ", 1)
        raise UsageError(message) from error
