"""What the videos of a folder were sampled with: those of other settings are no series with them;
no torch.
"""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.settings.fingerprints import fingerprint_file
from wan_distill.settings.reading import read_json

SAME = (
    *("seed", "height", "width", "num_frames", "fps", "compare", "image", "flow_shift"),
    *("teacher_path", "teacher_lora", "teacher_transformer", "teacher_transformer_2"),
)


def note_of(folder: Path) -> Path:
    """Where it is written down."""
    return folder / ".sampled.json"


def settings_of(args: Namespace, files: list[Path], steps: int) -> dict[str, Any]:
    """What decides how a prompt's videos look, as JSON has it.

    Args:
        args: the flags of sample.py.
        files: the student's.
    """
    given = {name: getattr(args, name) for name in SAME}
    if args.image is not None and os.path.isfile(args.image):
        given["image"] = sha256(Path(args.image).read_bytes()).hexdigest()
    return dict(student=sorted(map(fingerprint_file, files)), steps=steps, **given)


def check_series(folder: Path, settings: dict[str, Any]) -> None:
    """Raises UsageError where the videos in `folder` were made with other settings. Without a note,
    as earlier versions left them, they are taken as they are.
    """
    try:
        noted = read_json(note_of(folder))
    except FileError:
        return
    here = json.loads(json.dumps(settings))
    for name, value in here.items():
        if noted.get(name) != value:
            content = name in ("student", "image")
            was = f"another {name}" if content else f"--{name} {noted.get(name)}"
            given = "this one" if content else value
            raise UsageError(
                f"--out {folder}: its videos are of {was}, not of {given}; give another folder, or "
                "--overwrite to make them anew"
            )


def check_all_replaced(folder: Path, files: Iterable[Path]) -> None:
    """Raises UsageError where `folder` holds videos beside those that will be made anew: the note
    is one for all of them.

    Args:
        files: that are written.
    """
    written = {_stem(file) for file in files}
    videos = [*folder.glob("*.mp4"), *folder.glob("*.frames.png")]
    others = sorted(file.name for file in videos if _stem(file) not in written)
    if others:
        raise UsageError(
            f"--out {folder}: holds {others[0]} too, which is of other settings and of no prompt "
            f"that is given ({len(others)} such in all); give another folder, or move them away"
        )


def _stem(video: Path) -> str:
    return video.name.removesuffix(".mp4").removesuffix(".frames.png")
