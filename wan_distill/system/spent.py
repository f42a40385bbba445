"""What a job has taken so far: seconds by part, and its peak of memory.

Kept in one file, which goes on over interruptions: `{"seconds": {part: seconds}, "now": part or
null, "left": seconds or null, "finished": time or null, "began": time, "peak_bytes": n, "device":
"NVIDIA H100", "gpu": true, "processes": 1, "device_seconds": seconds}`. Times are like
2026-11-26T12:00:00Z. `processes` are the last run's, `device_seconds` those of all runs together.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from wan_distill.system.console import seconds_left
from wan_distill.system.records import read_record, write_record
from wan_distill.system.runtime import Runtime

SAVED_EVERY = 10.0  # seconds, at least, between writes while a part goes on


class Spent:
    """Counts the seconds of the parts of a job. Parts may be nested: only the innermost counts.

    Args:
        file: where the counts are kept; those of an earlier run of the same job are added to.
    """

    def __init__(self, file: Path, runtime: Runtime):
        self.file = file
        self.is_main = runtime.is_main
        on_gpu = runtime.device.type == "cuda"
        title = torch.cuda.get_device_name(runtime.device) if on_gpu else runtime.device.type
        self.about: dict[str, Any] = dict(seconds={}, peak_bytes=0, began=_now())
        self.about |= read_spent(file)
        self.about.setdefault("device_seconds", device_seconds(self.about))
        self.about |= dict(device=title, gpu=on_gpu, processes=runtime.processes)
        self.about |= dict(now=None, finished=None)
        self.open: list[str] = []
        self.since = time.perf_counter()
        self.saved = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time is counted as `name`'s, after an error too."""
        self._count()
        self.open.append(name)
        self.save()
        try:
            yield
        finally:
            self._count()
            self.open.pop()
            self.save()

    def _count(self) -> None:
        now = time.perf_counter()
        if self.open:
            seconds, passed = self.about["seconds"], now - self.since
            seconds[self.open[-1]] = seconds.get(self.open[-1], 0.0) + passed
            self.about["device_seconds"] += passed * self.about["processes"]
        self.since = now

    def tick(self) -> None:
        """Counts and writes now and then, so that a kill loses little."""
        if time.perf_counter() - self.saved > SAVED_EVERY:
            self._count()
            self.save()

    def save(self) -> None:
        """Writes the file, on the main process."""
        self.saved = time.perf_counter()
        self.about["peak_bytes"] = max(self.about["peak_bytes"], peak_bytes())
        self.about["now"] = self.open[-1] if self.open else None
        self.about["left"] = seconds_left()
        if self.is_main:
            write_record(self.file, self.about)

    def finish(self) -> None:
        """Notes that the job is done."""
        self.about["finished"] = _now()
        self.save()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read_spent(file: Path) -> dict[str, Any]:
    """What `Spent` wrote, nothing without a file. Raises UsageError where it is damaged."""
    return read_record(file, "delete it, and the job's time is counted anew")


def device_seconds(spent: dict[str, Any]) -> float:
    """Seconds x devices of all runs; of a file without that number, as if all had been alike."""
    alike = spent.get("processes", 1) * sum(spent.get("seconds", {}).values())
    return float(spent.get("device_seconds", alike))


def peak_bytes() -> int:
    """The most memory that this process has had: of its GPU, otherwise of the host."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
