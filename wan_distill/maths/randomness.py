"""Randomness by key: each draw is a function of what it is for, never of a generator's history."""

from __future__ import annotations

import functools
import hashlib
import json

import torch
from torch import Tensor


def keyed_seed(*keys) -> int:
    """A 63-bit seed that depends on all of `keys` and on nothing else (not on rank, device or
    history).
    """
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*keys) -> torch.Generator:
    """A CPU generator seeded by `keys`: the same draws on any device and any number of processes."""
    return torch.Generator().manual_seed(keyed_seed(*keys))


def keyed_noise(shape: tuple[int, ...], *keys) -> Tensor:
    """Standard normal float32 noise of one sample, [C, F, H, W], a function of `keys` alone."""
    return torch.randn(shape, generator=generator(*keys))


@functools.lru_cache(maxsize=8)
def _permutation(size: int, *keys) -> list[int]:
    return torch.randperm(size, generator=generator(*keys)).tolist()


def keyed_order(*keys, position: int, size: int) -> int:
    """The `position`-th element of an endless sequence that visits all `size` elements, shuffled
    anew each epoch.
    """
    epoch, offset = divmod(position, size)
    return _permutation(size, *keys, epoch)[offset]
