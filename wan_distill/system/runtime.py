"""The processes of a run: ranks, devices, signals, collectives."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from wan_distill.errors import Stopped
from wan_distill.settings.config import Config
from wan_distill.system.console import print_lines

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# While the main process encodes prompts or solves the last samples, the others wait in a
# collective.
COLLECTIVE_TIMEOUT = timedelta(hours=3)
SAME_SIGNAL = 3.0  # seconds within which a second SIGTERM is another program's copy of the first
Value = TypeVar("Value")


def process_state() -> PartialState:
    """Joins the process group where a launcher made one; without an accelerator that is gloo on the
    CPU.
    """
    if "WORLD_SIZE" not in os.environ:
        return PartialState()
    # Without `cpu`, accelerate lets every rank of a machine that has no accelerator believe that it
    # is alone.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)


def be_deterministic(asked: bool) -> None:
    """Where asked, makes each operation give the same bits every time, or raise where it has no
    such way.
    """
    if asked:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its start
    torch.use_deterministic_algorithms(asked)


class Runtime:
    """Ranks, device and stop requests of this process.

    Attributes:
        device: where this process computes.
        dtype: of the frozen base and of its arithmetic.
        processes: their number, those on other machines included.
        is_main: whether this is the process that writes the run's files and prints.
        sharded: whether the frozen base is spread over all processes (--shard).
        context_parallel: whether all processes work on each sample together (--context_parallel).
        joint: whether every forward needs all processes: either of the two.
        sample_rank: which share of the samples is this process' own.
        sample_groups: the number of such shares; 1 where all work on each sample together.
    """

    def __init__(self, config: Config):
        """Joins the process group and takes over the signals. Call it in the main thread."""
        be_deterministic(config.deterministic)
        self.config = config
        self.state = process_state()
        self.device: torch.device = self.state.device
        self.dtype = DTYPES[config.mixed_precision]
        self.processes: int = self.state.num_processes
        self.is_main: bool = self.state.is_main_process
        self.sharded = config.shard and self.processes > 1
        self.context_parallel = config.context_parallel and self.processes > 1
        self.joint = self.sharded or self.context_parallel
        self.sample_rank: int = 0 if self.context_parallel else self.state.process_index
        self.sample_groups: int = 1 if self.context_parallel else self.processes
        self.signal: int | None = None
        self.signalled = 0.0
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):  # SIGBREAK exists on Windows only
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)

    # ------------------------------------------------------------------------------------- stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first signal asks for a save after the current micro-batch; a second one ends the
        process at once.
        """
        now = time.monotonic()
        if self.signal is not None:
            # A scheduler may signal torchrun and its processes, and torchrun sends its own on.
            if number == self.signal == signal.SIGTERM and now - self.signalled < SAME_SIGNAL:
                return
            os._exit(128 + number)
        self.signal, self.signalled = number, now
        print(
            "\nStopping and saving; once more to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def stop_requested(self) -> bool:
        """Whether any rank got a signal. All ranks must ask; they get the same answer."""
        return bool(self.max_over_ranks(float(self.signal is not None)))

    def raise_if_stopped(self) -> None:
        """For loops whose finished pieces are on the disk already.

        Raises Stopped after a signal to this process; where every forward needs all processes, on
        all of them after a signal to any.
        """
        if self.stop_requested() if self.joint else self.signal is not None:
            raise Stopped("Stopped; what is finished is kept. Run the same command to go on.")

    # ------------------------------------------------------------------------------- between ranks

    def max_over_ranks(self, value: float) -> float:
        """The largest `value` over ranks. All ranks must ask; they get the same answer."""
        if self.processes == 1:
            return value
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def value_of_main(self, value: Value) -> Value:
        """The main process' `value`, where all work together; elsewhere this process' own."""
        if not self.context_parallel:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replaces gradients by their mean over ranks, in one all-reduce.

        That is data parallelism without wrapping the model. With `--context_parallel` it is the
        sum, since each rank's gradient is that of its own tokens. All `parameters` must have a
        gradient, of one dtype.
        """
        if self.processes == 1:
            return
        gradients = []
        for p in parameters:
            assert p.grad is not None, "a trained tensor without a gradient"
            gradients.append(p.grad)
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total)
        total /= self.sample_groups
        sizes = [gradient.numel() for gradient in gradients]
        for gradient, mean in zip(gradients, total.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))

    # ------------------------------------------------------------------------ this process' share

    def samples_student(self) -> bool:
        """Whether this process samples the student: the main one, but all of them where every
        forward needs all.
        """
        return self.is_main or self.joint

    def micro_batch(self, step: int, micro: int, count: int) -> int:
        """Global index of this process' micro-batch number `micro`, of `count`, of update `step`.

        However the same number of micro-batches is split into processes and accumulation, an update
        works on the same indices.
        """
        first = (step * count + micro) * self.sample_groups
        return first + self.sample_rank

    def say(self, *lines: str) -> None:
        """Prints, on the main process only."""
        if self.is_main:
            print_lines(*lines)

    # --------------------------------------------------------------------------------- arithmetic

    def autocast(self) -> torch.autocast:
        """Arithmetic in the base's dtype: its adapters are float32 and would otherwise promote it.

        Off where the base is float32.
        """
        # The cache is off because of torch < 2.11: a weight that was cast under `no_grad` came out
        # of it again where a gradient was wanted, and had none.
        return torch.autocast(
            self.device.type,
            dtype=self.dtype,
            enabled=self.dtype != torch.float32,
            cache_enabled=False,
        )


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, copied while the host goes on; themselves where they are there already.

    From pageable memory the host would wait for a large copy, so it is pinned first.
    """
    leaves_host = device.type == "cuda" and values.device.type == "cpu"
    return (values.pin_memory() if leaves_host else values).to(device, non_blocking=True)
