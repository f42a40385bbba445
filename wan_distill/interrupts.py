"""Ctrl-C while packages are imported ends the process with one line, and so does a missing package.

A KeyboardInterrupt there would be a traceback of other packages, or none: some catch everything.
"""

from __future__ import annotations

import os  # nothing more: until they are imported, Ctrl-C is a traceback
import signal
import sys
from types import TracebackType

from wan_distill.errors import INTERRUPTED

LINE = "Stopped before anything was begun."


def end_quietly() -> None:
    """From here on Ctrl-C ends the process, until `raise_again`. Scripts call it before they import
    anything else. Where the signal is ignored, as under nohup, or somebody else's, it stays so.

    A package that is not installed ends it with exit code 2.
    """
    sys.excepthook = _tell
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    try:
        signal.signal(signal.SIGINT, _end)
    except ValueError:  # not the main thread, which Ctrl-C goes to
        return


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: object) -> None:
    try:
        os.write(2, f"{LINE}\n".encode())
        sys.stdout.flush()
    finally:  # whatever stdout is
        os._exit(INTERRUPTED)


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's own traceback, but one line for a package of others that is not installed."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package in ("", "wan_distill"):
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: {package}: not installed; pip install -r requirements.txt", file=sys.stderr)
    raise SystemExit(2)
