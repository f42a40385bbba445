"""Ctrl-C while packages are imported ends the process with one line, whatever is being imported.

A KeyboardInterrupt there would be a traceback of other packages, or none: some catch everything.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

from wan_distill.errors import INTERRUPTED

LINE = "Stopped before anything was begun."


def end_quietly() -> None:
    """From here on Ctrl-C ends the process, until `raise_again`. Scripts call it before they import
    anything else. Where the signal is ignored, as under nohup, or somebody else's, it stays so.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    with contextlib.suppress(RuntimeError, OSError, ValueError):  # it may be in use, or closed
        sys.stdout.flush()
    os.write(2, f"{LINE}\n".encode())
    os._exit(INTERRUPTED)
