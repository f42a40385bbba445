"""The matrix rate of a device, and how much of a processor other work takes meanwhile."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil
import torch

NOTICED = 0.05  # of the processor: less is within what the measurement can tell
LARGEST = 0.95  # that is believed of so short a measurement


class MatrixRate(NamedTuple):
    """Measured in a moment."""

    rate: float
    """operations per second"""
    busy: float = 0.0
    """share in [0, 1) of what this process could have had of the processor that other work took; of
    a GPU it is not known, and 0"""

    @property
    def alone(self) -> float:
        """The rate where nothing else runs."""
        return self.rate / (1 - self.busy)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> MatrixRate:
    """Operations per second of a large square matrix product on `device`: what the hardware gives
    at best.
    """
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    product, count = a @ a, 0
    float(product[0, 0])  # waits for the device
    psutil.cpu_percent()  # the next call says how busy the processor was since this one
    used, started = time.process_time(), time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(8):
            product = a @ a
        float(product[0, 0])
        count += 8
    used = (time.process_time() - used) / elapsed
    busy = psutil.cpu_percent() / 100
    rate = 2 * size**3 * count / elapsed
    if device.type != "cpu":
        return MatrixRate(rate)
    return MatrixRate(rate, taken(used, torch.get_num_threads(), busy, psutil.cpu_count() or 1))


def taken(used: float, threads: int, busy: float, cores: int) -> float:
    """The share of what `threads` threads could have had of the processor that other work took.

    A process that gets less than it asks for may also be held back by a limit of its own, as in a
    container: only what others really used counts.

    Args:
        used: cores that this process used.
        busy: share of all `cores` that was used, by whomever.
    """
    missed = 1 - used / min(threads, cores)
    others = busy - used / cores
    share = min(missed, others, LARGEST)
    return share if share > NOTICED else 0.0
