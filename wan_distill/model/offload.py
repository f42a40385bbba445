"""Matrices in host memory: how they lie there, and how they come to the device in time."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

LARGEST_CHUNK = 1 << 32


def chunk_size(left: int, size: int) -> int:
    """Bytes of the next chunk, where `left` are still to come, `size` of them now.

    A power of two, to which torch rounds pinned memory up anyway: a tensor of 141 MB of its own
    takes 268 MB. Not larger than what is left, as far as `size` allows.
    """
    fitting = min(LARGEST_CHUNK, 1 << max(0, left.bit_length() - 1))
    return max(fitting, 1 << (size - 1).bit_length())


class HostPool:
    """Host memory for tensors of `total` bytes in few large chunks, pinned where there is a GPU."""

    def __init__(self, total: int):
        self.left = total
        self.chunk = torch.empty(0, dtype=torch.uint8)

    def place(self, values: Tensor) -> Tensor:
        """A copy of `values` in this memory."""
        size = values.nbytes
        if size > self.chunk.numel():
            pin = torch.cuda.is_available()
            chunk = chunk_size(self.left, size)
            self.chunk = torch.empty(chunk, dtype=torch.uint8, pin_memory=pin)
        place, self.chunk = self.chunk[:size], self.chunk[size:]
        self.left -= size
        return place.view(values.dtype).view(values.shape).copy_(values)


class BlockFetcher:
    """Copies each block's matrices to the device while the block before it works.

    Blocks run from first to last in a forward, from last to first where a backward pass recomputes
    them. Two blocks' matrices are on the device at most. Only for blocks that are recomputed:
    otherwise the graph would hold all of them.

    Args:
        layers: for each block, its layers with `codes` in host memory; `fetched` is set here.
    """

    def __init__(self, blocks: nn.ModuleList, layers: list[list[Any]], device: torch.device):
        self.layers = layers
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.at = len(layers)
        self.copies: dict[int, tuple[list[Tensor], Any]] = {}
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, index))

    @torch.compiler.disable  # of a compiled block it would be a part, and each block's another one
    def _before(self, index: int, *given: Any) -> None:
        # A backward pass copies other blocks than a forward does, and `--keep_attention` counts the
        # operations of a block in both: these are none of its own.
        with _disable_current_modes():
            self._enter(index)

    def _enter(self, index: int) -> None:
        """Before block `index` works: waits for its matrices, and begins to copy the next ones."""
        backwards = index in (self.at - 1, self.at)
        ahead = index - 1 if backwards else index + 1
        self.at = index
        for other in set(self.copies) - {index}:
            del self.copies[other]
            for layer in self.layers[other]:
                layer.fetched = None
        if index not in self.copies:
            self._begin(index)
        tensors, done = self.copies[index]
        if done is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(done)
            for tensor in tensors:
                tensor.record_stream(here)
        for layer, tensor in zip(self.layers[index], tensors, strict=True):
            layer.fetched = tensor
        if 0 <= ahead < len(self.layers):
            self._begin(ahead)

    def _begin(self, index: int) -> None:
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            tensors = [
                layer.codes.to(self.device, non_blocking=True) for layer in self.layers[index]
            ]
            done = None if self.stream is None else self.stream.record_event()
        self.copies[index] = tensors, done
