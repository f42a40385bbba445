"""The processes of a run: ranks, devices, signals, collectives."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from wan_distill.errors import Stopped
from wan_distill.settings.config import Config

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# While the main process encodes prompts or solves the last samples, the others wait in a
# collective.
COLLECTIVE_TIMEOUT = timedelta(hours=3)


def process_state() -> PartialState:
    """Joins the process group where a launcher made one; without an accelerator that is gloo on the
    CPU.
    """
    if "WORLD_SIZE" not in os.environ:
        return PartialState()
    # Not told so, accelerate lets every rank of a machine without accelerator believe that it is
    # alone.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)


class Runtime:
    """Ranks, device and stop requests of this process."""

    def __init__(self, config: Config):
        self.config = config
        self.state = process_state()
        self.device = self.state.device
        self.processes = self.state.num_processes
        self.is_main = self.state.is_main_process
        self.sharded = config.shard and self.processes > 1
        self.together = config.context_parallel and self.processes > 1
        # This process' share of the samples: none of its own where all work on each sample
        # together.
        self.sample_rank, self.sample_groups = (
            (0, 1) if self.together else (self.state.process_index, self.processes)
        )
        self.joint = self.sharded or self.together
        """whether every forward needs all processes"""
        self.dtype = DTYPES[config.mixed_precision]
        self.signal: int | None = None
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):  # SIGBREAK is Windows' own
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        """The first signal asks for a save after the update in flight; a second one ends the
        process at once.
        """
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print(
            "\nStopping after this update and saving; once more to stop at once.",
            file=sys.stderr,
            flush=True,
        )

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop; all ranks get the same answer."""
        return bool(self.max_over_ranks(float(self.signal is not None)))

    def stop_here_if_asked(self) -> None:
        """For loops whose finished pieces are on disk already. Raises Stopped after a signal to
        this process.
        """
        if self.stop_requested() if self.joint else self.signal is not None:  # joint: all or none
            raise Stopped("Stopped; what is finished is kept. Run the same command to go on.")

    def max_over_ranks(self, value: float) -> float:
        """The largest `value` over ranks, the same on all of them."""
        if self.processes == 1:
            return value
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def samples_student(self) -> bool:
        """Whether this process samples the student: the main one, but all of them where each
        forward needs all.
        """
        return self.is_main or self.joint

    def told_by_main(self, value):
        """What the main process says, where all work together; elsewhere `value` itself."""
        if not self.together:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def say(self, *lines: str) -> None:
        """Prints on the main process only."""
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    def autocast(self):
        """bf16/fp16 arithmetic around a low-precision base, whose float32 adapters would otherwise
        promote it.
        """
        return torch.autocast(
            self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32
        )

    def micro_batch(self, step: int, micro: int) -> int:
        """Global index of a micro-batch: the same work is done for any split into processes and
        accumulation.
        """
        return (
            step * self.config.gradient_accumulation_steps + micro
        ) * self.sample_groups + self.sample_rank

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Mean gradient over ranks in one all-reduce: data parallelism without wrapping the model.

        With `--context_parallel` the sum: each rank's is that of its own tokens.
        """
        if self.processes == 1:
            return
        gradients = [p.grad for p in parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.sample_groups
        for gradient, mean in zip(
            gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True
        ):
            gradient.copy_(mean)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`; the host does not wait for it (from pageable memory a large copy
    would).
    """
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)
