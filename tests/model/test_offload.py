"""Matrices in host memory: in few chunks, and on the device before they are needed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from wan_distill.model import offload
from wan_distill.model.offload import LARGEST_CHUNK, BlockFetcher, HostPool, chunk_size

# Of an A14B block in bf16: eight square matrices and the two of its feed-forward network.
A14B_BLOCK = [2 * 5120**2] * 8 + [2 * 5120 * 13824] * 2


def test_pinned_memory_is_hardly_larger_than_what_lies_in_it():
    """Each chunk is a power of two, to which torch would round it up."""
    sizes = A14B_BLOCK * 40
    left, chunk, chunks = sum(sizes), 0, []
    for size in sizes:
        if size > chunk:
            chunks.append(chunk_size(left, size))
            chunk = chunks[-1]
        chunk, left = chunk - size, left - size
    assert all(chunk.bit_count() == 1 and chunk <= LARGEST_CHUNK for chunk in chunks)
    alone = sum(1 << (size - 1).bit_length() for size in sizes)
    assert sum(chunks) < 1.03 * sum(sizes) and alone > 1.4 * sum(sizes)


def test_what_is_placed_comes_back():
    tensors = [
        torch.randn(3, 5, dtype=torch.bfloat16),
        torch.arange(24, dtype=torch.uint8).view(4, 6),
        torch.randn(70, 2, dtype=torch.bfloat16),
    ]
    pool = HostPool(sum(t.nbytes for t in tensors))
    placed = [pool.place(t) for t in tensors]
    assert pool.left == 0
    for tensor, copy in zip(tensors, placed, strict=True):
        assert torch.equal(tensor, copy) and copy.data_ptr() != tensor.data_ptr()
    assert placed[0].untyped_storage().data_ptr() == placed[1].untyped_storage().data_ptr()


# ------------------------------------------------------------------------------ the order of copies


class Codes:
    """Stands in for a matrix: says when it is copied."""

    def __init__(self, name: str, events: list[str]):
        self.name = name
        self.events = events

    def to(self, device, non_blocking):
        assert non_blocking
        torch.zeros(1).clone()  # an operation, as a copy is one
        self.events.append(f"copy {self.name}")
        return self

    def record_stream(self, stream):
        self.events.append(f"used {self.name}")


class Layer:
    def __init__(self, name: str, events: list[str]):
        self.codes = Codes(name, events)
        self.fetched = None


class Block(nn.Module):
    def __init__(self, layer: Layer, events: list[str]):
        super().__init__()
        self.layer = layer
        self.events = events

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.layer.fetched is self.layer.codes
        self.events.append(f"work {self.layer.codes.name}")
        return x


class Stream:
    """Stands in for a CUDA stream, of which a CPU build has none."""

    def __init__(self, device):
        self.waited = []

    def record_event(self):
        return self

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def fetched(monkeypatch):
    """(blocks, layers, events) with a fetcher for a GPU."""
    current = Stream(None)
    monkeypatch.setattr(offload.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(offload.torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(offload.torch.cuda, "current_stream", lambda device: current)
    events: list[str] = []
    layers = [Layer(str(i), events) for i in range(4)]
    blocks = nn.ModuleList(Block(layer, events) for layer in layers)
    BlockFetcher(blocks, [[layer] for layer in layers], torch.device("cuda"))
    yield blocks, layers, events
    assert len(current.waited) == 2 * len(blocks)  # once before each block, in either pass


def test_the_next_block_is_copied_before_this_one_works(fetched):
    blocks, layers, events = fetched
    for _ in range(2):  # two evaluations
        events.clear()
        for block in blocks:
            block(torch.zeros(()))
            assert sum(layer.fetched is not None for layer in layers) == 1
        assert [event for event in events if not event.startswith("used")] == [
            *("copy 0", "copy 1", "work 0", "copy 2", "work 1", "copy 3", "work 2", "work 3")
        ]


def test_a_backward_pass_fetches_from_last_to_first(fetched):
    blocks, layers, events = fetched
    for block in blocks:
        block(torch.zeros(()))
    events.clear()
    for block in reversed(blocks):
        block(torch.zeros(()))
        assert sum(layer.fetched is not None for layer in layers) == 1
    work = [event for event in events if not event.startswith("used")]
    assert work == ["copy 2", "work 3", "copy 1", "work 2", "copy 0", "work 1", "work 0"]


def test_copies_are_no_operations_of_the_block_that_waits_for_them(fetched):
    """`--keep_attention` counts a block's operations; forwards and backwards copy other blocks."""
    blocks, _, events = fetched
    seen = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(())
    with Counting():
        for block in [*blocks, *reversed(blocks)]:
            block(x)
    assert any(event.startswith("copy") for event in events) and not seen


class Product(nn.Module):
    """A block of one layer, whose matrix is fetched."""

    def __init__(self):
        super().__init__()
        self.codes = torch.eye(3)
        self.fetched = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.fetched


def graphs(count: int) -> int:
    """How often `count` blocks are compiled."""
    torch._dynamo.reset()
    counters.clear()
    blocks = nn.ModuleList(Product() for _ in range(count))
    BlockFetcher(blocks, [[block] for block in blocks], torch.device("cpu"))
    x = torch.ones(2, 3)
    for block in blocks:
        block.compile(backend="eager")
        x = block(x)
    assert torch.equal(x, torch.ones(2, 3))
    return counters["stats"]["unique_graphs"]


def test_compiled_blocks_share_their_graph():
    """With one for each of A14B's 40 blocks, torch would stop compiling and say nothing."""
    assert graphs(5) == graphs(2) == 1
