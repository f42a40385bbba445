"""What a run shows while it works: progress bars, and lines where output is not a terminal."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

from wan_distill.settings.config import Config

QUIET_SECONDS = 30  # between lines of a bar where output is not a terminal


class _Lines:
    """A file for tqdm that writes each state of a bar as a line of its own, for logs."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            sys.stderr.write(text + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(total: int, what: str, unit: str, shown: bool, done: int = 0, **options) -> tqdm:
    """A bar on a terminal, a line every half minute elsewhere; on the main process, and only where
    there is work.
    """
    if not sys.stderr.isatty():
        options = dict(file=_Lines(), mininterval=QUIET_SECONDS, ncols=80) | options
    idle = not shown or done >= total
    return tqdm(initial=done, total=total, desc=what, unit=unit, disable=idle, **options)


class TrainingBar:
    """Updates of one expert: losses, seconds an update, and the time that the whole run still
    needs.
    """

    def __init__(self, expert: str, first: int, last: int, config: Config, shown: bool):
        later = len(config.experts) - 1 - config.experts.index(expert)
        self.after, self.started, self.first = later * last, time.perf_counter(), first
        lines = (
            {}
            if sys.stderr.isatty()
            else dict(mininterval=float("inf"), miniters=last + 1, ncols=160)
        )
        self.bar = progress_bar(last, f"{expert} expert", "update", shown, first, **lines)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def update(self) -> None:
        self.bar.update()

    def tell(self, line: dict) -> None:
        """Shows what a line of metrics.jsonl says; in a log this is the one line of its interval."""
        each = (time.perf_counter() - self.started) / max(1, self.bar.n - self.first)
        left = (self.bar.total - self.bar.n + self.after) * each
        losses = [f"{name} {value:.4g}" for name, value in line.items() if name.endswith("_loss")]
        left = tqdm.format_interval(left)
        self.bar.set_postfix_str(
            ", ".join([*losses, f"{each:.2g} s/update", f"training left {left}"])
        )


def speak_plainly() -> None:
    """What stdout or stderr cannot encode, such as Wan's negative prompt in a Windows pipe, is
    shown as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a caller has put something else in its place
            stream.reconfigure(errors="backslashreplace")
