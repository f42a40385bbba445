"""What packages print while they are imported: kept, and shown where it may matter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wan_distill.errors import FileError, Halted, UsageError
from wan_distill.interrupts import end_quietly, raise_again

FORESEEN = (UsageError, FileError, Halted, OSError)  # their lines say all, unless an import failed
_kept: list[str] = []


class _Keeper:
    """Stands in for stderr. Loggers that are made meanwhile hold on to it for good, so it hands
    everything to stderr once the imports are over.
    """

    def __init__(self, stream: Any):
        self.stream = stream
        self.keeps = True

    def write(self, text: str) -> int:
        if self.keeps:
            _kept.append(text)
            return len(text)
        target = self.stream if sys.stderr is self else sys.stderr
        return target.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def keep_notices(shown: bool = False) -> Iterator[None]:
    """Inside, packages are imported: what Python prints to stderr is kept, for `print_kept`, and
    Ctrl-C ends the process in one line. `shown`: it is printed as always.
    """
    keeper = _Keeper(sys.stderr)
    keeper.keeps = not shown
    sys.stderr = keeper
    end_quietly()
    try:
        yield
    finally:
        raise_again()
        keeper.keeps = False
        if sys.stderr is keeper:
            sys.stderr = keeper.stream


def print_kept(error: BaseException) -> None:
    """Prints what was kept, once, where it may say why: `error` is one that nobody foresaw, or it
    comes of an import that failed.
    """
    if isinstance(error, FORESEEN) and not any(isinstance(e, ImportError) for e in _causes(error)):
        return
    text = "".join(_kept).strip()
    _kept.clear()
    if text:
        print(f"While packages were imported they said:\n{text}", file=sys.stderr, flush=True)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error`, and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
