"""The last lines of a run: the files that matter, the next command, what may be deleted."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.planning.wording import size
from wan_distill.results.single_files import KINDS
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.other_names import command_name
from wan_distill.system.cleaning import bytes_of, caches_in, checkpoints_in


def closing(config: Config, info: TeacherInfo, prompt: str) -> list[str]:
    """The lines.

    Args:
        prompt: to try the student with.
    """
    folder = RunFolder(Path(config.output_dir))
    files = [folder.student(e).name for e in info.experts if folder.has_student(e)]
    sampler = command_name("sample.py", "wan-distill-sample")
    sampler = f"python {sampler}" if sampler.endswith(".py") else sampler
    caches = size(bytes_of(caches_in(folder)))
    checkpoints = size(bytes_of(checkpoints_in(folder)))
    picture = f" --image {quoted(str(folder.first_frame))}" if info.takes_picture else ""
    return [
        f"Done: {folder.path.resolve()}",
        f"  {folder.page.name:<12} how good, how fast, how healthy",
        f"  {folder.readme.name:<12} how to use the student: diffusers, ComfyUI and others",
        f"  {' and '.join(files)}: the student",
        *outdated(folder),
        f"Next: {sampler} --student {quoted(str(folder.path))}{picture} --prompt {quoted(prompt)}",
        f"May be deleted: {caches} of caches (the same command with --clean), {checkpoints} of "
        "checkpoints (needed to train on)",
    ]


def quoted(argument: str) -> str:
    """As this system's shell takes it."""
    return subprocess.list2cmdline([argument]) if os.name == "nt" else shlex.quote(argument)


def outdated(folder: RunFolder) -> list[str]:
    """A line for each export that was not written anew and is older than the student's files: it
    may hold an earlier one.
    """
    written = [folder.student(e).stat().st_mtime for e in SUBFOLDER if folder.has_student(e)]
    files = {folder.merged / "model_index.json": "--save_merged"} | {
        folder.single_file(expert, kind): f"--export {export}"
        for expert in SUBFOLDER
        for export, kind in KINDS.items()
    }
    found = {
        flag: file.parent
        for file, flag in files.items()
        if file.exists() and file.stat().st_mtime < max(written, default=0.0)
    }
    return [
        f"  {place.name + '/':<12} is older and may hold an earlier student: {flag} writes it anew"
        for flag, place in found.items()
    ]
