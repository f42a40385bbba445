"""Errors of the file system in words: what could not be written, and what could not be read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from wan_distill.errors import one_line

# Something of another kind lies under the name of a file or folder. What only writing can meet.
MISPLACED = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP)
WRITING = (errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC))


def describe_disk_error(error: OSError, output_dir: str | None) -> str:
    """One line: file, reason, remedy.

    Args:
        output_dir: where the program writes, if anywhere; what lies elsewhere was to be read.
    """
    if error.errno is None:  # of a library, which says all in its text
        return one_line(error)
    reason = error.strerror or os.strerror(error.errno)
    if error.errno in MISPLACED and _is_in(error, output_dir):
        name = error.filename2 or error.filename  # of a rename, where it should lead
        return f"{name}: {reason}; move it away, and run the same command again"
    if error.errno in WRITING or _is_in(error, output_dir):
        return (
            f"{error.filename or output_dir or 'the disk'}: {reason}; what was complete is kept: "
            "once there is room and permission, run the same command to go on"
        )
    if error.filename is None:
        return f"{reason}; see whether the disks are still there, and run the same command again"
    return (
        f"{error.filename}: cannot be read ({reason}); see whether it is still there and this user "
        "may read it, and run the same command again"
    )


def _is_in(error: OSError, folder: str | None) -> bool:
    file = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    if folder is None or not isinstance(file, (str, Path)):  # it may be a descriptor's number
        return False
    inside = Path(os.path.abspath(file)), Path(os.path.realpath(file))
    outer = Path(os.path.abspath(folder)), Path(os.path.realpath(folder))
    return any(path.is_relative_to(top) for path in inside for top in outer)
