"""What a run shows while it works: progress bars, and lines where output is not a terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from wan_distill.maths.sigmas import Expert
from wan_distill.settings.config import Config

QUIET_SECONDS = 30  # between lines of a bar where output is not a terminal


class _Lines(io.TextIOBase):
    """A file for tqdm that writes each state of a bar as a line of its own, for logs."""

    def write(self, text: str) -> int:
        if line := text.strip("\r\n "):
            sys.stderr.write(line + "\n")
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    total: int, what: str, unit: str, shown: bool, done: int = 0, **options: Any
) -> tqdm:
    """A bar on a terminal, and a line every half minute elsewhere.

    Args:
        total: units of work, `done` of them before this process began.
        what: the text before the bar.
        unit: the name of one unit, in the singular.
        shown: False on all processes but the main one. Without work nothing is shown either.
        options: further ones of tqdm.
    """
    if not sys.stderr.isatty():
        options = dict(file=_Lines(), mininterval=QUIET_SECONDS, ncols=80) | options
    hidden = not shown or done >= total
    return tqdm(initial=done, total=total, desc=what, unit=unit, disable=hidden, **options)


class TrainingBar:
    """Updates of one expert: losses, seconds per update, and the time that the whole run still
    needs.
    """

    def __init__(self, expert: Expert, first: int, last: int, config: Config, shown: bool):
        """Shows updates `first` to `last` of `expert`."""
        experts_after = len(config.experts) - 1 - config.experts.index(expert)
        self.updates_after = experts_after * last
        self.first = first
        self.last = last
        self.started = time.perf_counter()
        options: dict[str, Any] = {}
        if not sys.stderr.isatty():  # no lines but those of `show`
            options = dict(mininterval=float("inf"), miniters=last + 1, ncols=160, leave=False)
        self.bar = progress_bar(last, f"{expert} expert", "update", shown, first, **options)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self) -> None:
        """Counts one more update."""
        self.bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows the losses of a line of metrics.jsonl; in a log this is the one line of its
        interval.
        """
        done = self.bar.n
        seconds = (time.perf_counter() - self.started) / max(1, done - self.first)
        left = tqdm.format_interval((self.last - done + self.updates_after) * seconds)
        losses = [f"{name} {value:.4g}" for name, value in line.items() if name.endswith("_loss")]
        self.bar.set_postfix_str(
            ", ".join([*losses, f"{seconds:.2g} s/update", f"training left {left}"])
        )


def escape_unencodable() -> None:
    """Makes stdout and stderr write escapes for characters that they cannot encode, such as those
    of Wan's negative prompt in a Windows pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caller may have put something else there
            stream.reconfigure(errors="backslashreplace")
