"""How a program ends: one line and an exit code, whatever stopped it."""

from __future__ import annotations

import sys
from collections.abc import Callable

from wan_distill.errors import INTERRUPTED, FileError, Halted, UsageError
from wan_distill.interrupts import raise_again
from wan_distill.system.console import escape_unencodable
from wan_distill.system.disk_errors import describe_disk_error
from wan_distill.system.notices import print_kept


def ended(
    run: Callable[[], int],
    stopped: str = "Stopped.",
    disk_error: int = 1,
    writes_to: Callable[[], str | None] = lambda: None,
) -> int:
    """The exit code of a program: what `run` returns, 2 for bad input, 130 for Ctrl-C, 1 where it
    cannot go on. What is none of these is raised.

    Args:
        stopped: the line that Ctrl-C is answered with.
        disk_error: the exit code of a disk that fails.
        writes_to: where it writes, once that is known.
    """
    escape_unencodable()
    try:
        raise_again()  # the imports are over
        return run()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        print_kept(error)
        if isinstance(error, (UsageError, FileError)):
            code, line = 2, str(error)
        elif isinstance(error, Halted):
            code, line = 1, str(error)
        elif isinstance(error, OSError):
            code, line = disk_error, describe_disk_error(error, writes_to())
        else:
            raise
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code
