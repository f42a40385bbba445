"""What a run shows while it works: one bar for the whole job, or a line a minute in a log."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from wan_distill.system.job_clock import JobClock, Leg

QUIET_SECONDS = 60  # between lines where output is not a terminal
ON_TERMINAL = "{stage:<13}{whole:4.0%} |{bar:16}| {count}, {left} left{postfix}"
IN_LOG = "{stage}{whole:4.0%} of the job, {count}, {left} left{postfix}"

_clock: JobClock | None = None  # of the job that this process shows: there is one terminal


class _Lines(io.TextIOBase):
    """A file for tqdm that writes states of its bars as lines, one a minute in all, for logs."""

    last = float("-inf")

    def write(self, text: str) -> int:
        line, now = text.strip("\r\n "), time.perf_counter()
        if line and now - _Lines.last >= QUIET_SECONDS:
            sys.stderr.write(line + "\n")
            _Lines.last = now
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


class Bar(tqdm):
    """A part of the whole job's bar."""

    def __init__(self, what: str, clock: JobClock, share: float, **options: Any):
        """
        Args:
            what: is counted.
            clock: of the job.
            share: of the clock's leg that one unit is.
        """
        self.what, self.clock, self.share = what, clock, share
        super().__init__(**options)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm fills in, with the state of the whole job."""
        values = super().format_dict
        name = self.clock.leg.name
        return values | dict(
            n=self.clock.share(),  # what the bar itself shows
            total=1.0,
            whole=self.clock.share(),
            left=about(self.clock.left()),
            stage=f"{name}: " if name else "",
            count=f"{self.what} {values['n']:g} of {values['total']:g}",
        )

    def update(self, n: float | None = 1) -> bool | None:
        """`n` more units are done."""
        self.clock.advance(self.share * (n or 0))
        return super().update(n)


@contextmanager
def show_job(legs: Sequence[Leg], slower: float = 1.0) -> Iterator[None]:
    """Inside, bars show the whole job of these `legs`, which is expected to take `slower` times as
    long as planned.
    """
    global _clock
    _clock = JobClock(legs, slower)
    try:
        yield
    finally:
        _clock = None


def on_progress(listener: Callable[[], object]) -> None:
    """`listener` is called whenever a bar of the job that is shown moves on."""
    if _clock is not None:
        _clock.listener = listener


def enter(stage: str) -> None:
    """The job's next part begins."""
    if _clock is not None:
        _clock.enter(stage)


def seconds_left() -> float | None:
    """Until the job that is shown ends; None where there is none."""
    return None if _clock is None else _clock.left()


def progress_bar(
    total: int, what: str, unit: str, shown: bool, done: int = 0, **options: Any
) -> Bar:
    """A bar on a terminal, and a line a minute elsewhere, of the job that is shown; of itself where
    there is none.

    Args:
        total: units of work, `done` of them before this process began.
        what: is counted.
        unit: the name of one unit, in the singular.
        shown: False on all processes but the main one. Without work nothing is shown either.
        options: further ones of tqdm.
    """
    clock = _clock
    if clock is None:
        clock = JobClock([])
        clock.enter("")
    options = dict(bar_format=ON_TERMINAL, leave=False, dynamic_ncols=True) | options
    if not sys.stderr.isatty():
        options |= dict(file=_Lines(), mininterval=QUIET_SECONDS, bar_format=IN_LOG, ncols=160)
    hidden = not shown or done >= total
    share = clock.begin(total, done)
    return Bar(what, clock, share, initial=done, total=total, unit=unit, disable=hidden, **options)


class TrainingBar:
    """Updates of an expert's roles, and their losses."""

    def __init__(self, first: int, last: int, shown: bool):
        """Shows updates `first` to `last`."""
        self.first = first
        self.started = time.perf_counter()
        self.bar = progress_bar(last, "update", "update", shown, first)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def update(self) -> None:
        """Counts one more update."""
        self.bar.update()

    def show(self, line: Mapping[str, Any]) -> None:
        """Adds the losses of a line of metrics.jsonl, and the seconds of an update."""
        seconds = (time.perf_counter() - self.started) / max(1, self.bar.n - self.first)
        losses = [f"{name} {value:.4g}" for name, value in line.items() if name.endswith("_loss")]
        words = ", ".join([*losses, f"{seconds:.2g} s/update"])
        self.bar.set_postfix_str(words, refresh=False)


def about(seconds: float) -> str:
    """A time to wait for, as roughly as it is known."""
    if seconds < 90:
        return "about a minute" if seconds > 30 else "under a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


def print_lines(*lines: str) -> None:
    """Prints, and leaves a bar on the terminal whole."""
    with tqdm.external_write_mode(file=sys.stdout):
        print(*lines, sep="\n", flush=True)


def escape_unencodable() -> None:
    """Makes stdout and stderr write escapes for characters that they cannot encode, such as those
    of Wan's negative prompt in a Windows pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a caller may have put something else there
            stream.reconfigure(errors="backslashreplace")
