"""Randomness by key: a draw depends on the purpose it is for, not on the draws made before it.

A key is a sequence of strings and integers, such as (seed, "dmd", position). Equal keys give equal
draws on every rank, on every device and after every restart.
"""

from __future__ import annotations

import functools
import hashlib
import json

import torch
from torch import Tensor

Key = int | str


def keyed_seed(*keys: Key) -> int:
    """A seed in [0, 2^63) that depends on all of `keys` and on nothing else."""
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*keys: Key) -> torch.Generator:
    """A CPU generator seeded by `keys`."""
    return torch.Generator().manual_seed(keyed_seed(*keys))


def keyed_noise(shape: tuple[int, ...], *keys: Key) -> Tensor:
    """Standard normal noise of one sample: float32, on the CPU, of `shape` (usually C, F, H, W)."""
    return torch.randn(shape, generator=generator(*keys))


@functools.lru_cache(maxsize=8)
def _permutation(size: int, *keys: Key) -> list[int]:
    return torch.randperm(size, generator=generator(*keys)).tolist()


def keyed_order(*keys: Key, position: int, size: int) -> int:
    """Element `position` of an endless sequence over range(size), shuffled anew in each epoch.

    An epoch is `size` positions and contains each element once. `position` is 0 or more.
    """
    epoch, offset = divmod(position, size)
    return _permutation(size, *keys, epoch)[offset]
