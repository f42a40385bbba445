"""The matrix rate of a device."""

from __future__ import annotations

import time

import torch


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of a large square matrix product on `device`: what the hardware gives
    at best.
    """
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    product, count = a @ a, 0
    float(product[0, 0])  # waits for the device
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(8):
            product = a @ a
        float(product[0, 0])
        count += 8
    return 2 * size**3 * count / elapsed
