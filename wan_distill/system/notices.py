"""What packages print while they are imported: kept, and shown where it may matter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
    """Inside, what is printed to stderr by Python is kept; `shown`: it is printed as always.

    Where the inside fails, `print_kept` shows it.
    """
    if shown:
        yield
        return
    keeper = _Keeper(sys.stderr)
    sys.stderr = keeper
    try:
        yield
    finally:
        keeper.keeps = False
        if sys.stderr is keeper:
            sys.stderr = keeper.stream


def print_kept() -> None:
    """Prints what was kept, once: something failed, and it may say why."""
    text = "".join(_kept).strip()
    _kept.clear()
    if text:
        print(f"While packages were imported they said:\n{text}", file=sys.stderr, flush=True)
