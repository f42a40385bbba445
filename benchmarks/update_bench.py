"""Measures updates of one model and method against bare forwards and backwards; used by step.py."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from random_model import NoCheckpoints, random_expert, random_inputs
from torch import Tensor, nn

import train_distillation
from wan_distill.methods import make_method
from wan_distill.model.adapters import make_roles
from wan_distill.model.checkpointing import recompute_blocks
from wan_distill.model.denoiser import Denoiser
from wan_distill.planning.matrix_rate import matrix_rate
from wan_distill.planning.memory import estimate, shape_of
from wan_distill.planning.trace import Ledger, trace
from wan_distill.planning.work import update_work
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import make_learners
from wan_distill.training.metrics import Metrics
from wan_distill.training.rehearsal import hold_moments

WARM_UP = 2  # updates before those that are measured


@dataclass(frozen=True)
class Call:
    """One forward of the transformer."""

    with_gradient: bool
    inputs: tuple[Tensor, ...]
    """x, timestep and prompt."""


@dataclass(frozen=True)
class Measurement:
    """One update."""

    role: Role
    seconds: float
    bare_seconds: float
    """of the same forwards and backwards in a bare loop"""
    evaluations: int
    """transformer evaluations of single samples"""


class Recorder:
    """Records the transformer's forwards while `on`, so that they can be repeated bare."""

    def __init__(self, transformer: nn.Module):
        self.calls: list[Call] = []
        self.on = False
        transformer.register_forward_pre_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if self.on:
            trained = any(p.requires_grad for p in module.parameters())
            self.calls.append(Call(torch.is_grad_enabled() and trained, inputs))


class Bench:
    """One model, one method, the high expert: updates and their bare equivalents."""

    def __init__(self, config: Config, info: TeacherInfo):
        self.config = config
        self.info = info
        self.runtime = Runtime(self.config)
        self.device = self.runtime.device
        self.inputs = random_inputs(self.config, self.info, self.runtime)
        self.method = make_method(self.config, "high")
        self.transformer = random_expert(self.config, self.info, self.runtime)
        parameters = make_roles(self.transformer, self.method.roles, self.config, "high")
        recompute_blocks(self.transformer, self.config)
        self.denoiser = Denoiser(
            {"high": self.transformer},
            self.config.boundary_ratio,
            autocast=self.runtime.autocast,
        )
        self.learners = make_learners(self.method, parameters, self.config)
        hold_moments(self.learners.values())
        self.progress = NoCheckpoints(Metrics(self.inputs.run.folder.metrics, self.runtime))
        self.recorder = Recorder(self.transformer)

    # ------------------------------------------------------------------------------------ seconds

    def update(self, step: int) -> tuple[Role, float]:
        """One update as train_distillation.py makes it. Returns its role and its seconds."""
        role = self.method.role_at(step)
        started = self._time()
        train_distillation.update(
            self.inputs.run,
            step,
            self.method,
            self.inputs,
            self.denoiser,
            self.learners[role],
            self.progress,
        )
        return role, self._time() - started

    def bare(self, role: Role, calls: list[Call]) -> float:
        """Seconds of the same forwards, each followed by a backward where it had gradients."""
        started = self._time()
        with self.denoiser.training(role), self.runtime.autocast():
            for call in calls:
                with torch.set_grad_enabled(call.with_gradient):
                    output = self.transformer(*call.inputs, return_dict=False)[0]
                if call.with_gradient:
                    output.backward(torch.ones_like(output))
        seconds = self._time() - started
        for parameter in self.learners[role].parameters.values():
            parameter.grad = None
        return seconds

    @torch.no_grad()
    def guidance(self, call: Call) -> float:
        """Seconds of a guided evaluation as one forward, over those as two (median of 5)."""
        both = tuple(torch.cat([x, x]) for x in call.inputs)
        ratios = []
        for _ in range(6):
            seconds = []
            for forwards in ([both], [call.inputs, call.inputs]):
                started = self._time()
                with self.denoiser.acting_as("teacher"), self.runtime.autocast():
                    for inputs in forwards:
                        self.transformer(*inputs, return_dict=False)
                seconds.append(self._time() - started)
            ratios.append(seconds[0] / seconds[1])
        return statistics.median(ratios[1:])

    def _time(self) -> float:
        """The time in seconds, after all work given to the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    # -------------------------------------------------------------------------- memory and work

    def peak(self) -> int:
        """Bytes measured: by the allocator on CUDA, elsewhere by a ledger over more updates."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        resident = [*self.transformer.parameters(), *self.transformer.buffers()]
        for learner in self.learners.values():
            resident += learner.average.values()
            for state in learner.optimizer.state.values():
                resident += state.values()
        largest = 0
        for step in range(self.method.updates(1)):
            with Ledger(resident) as ledger:
                self.update(step)
            largest = max(largest, ledger.peak)
        return largest + sum(t.untyped_storage().nbytes() for t in resident)

    def flops(self) -> dict[Role, float]:
        """Predicted operations of one update, by role."""
        cost = trace(shape_of(self.config, self.info))
        works = update_work(self.config, cost)
        return {work.role: work.flops for work in works if work.expert == "high"}

    # ------------------------------------------------------------------------------------- figures

    def measure(self, updates: int) -> list[Measurement]:
        """`updates` updates, and their bare equivalents in turns with them."""
        measurements = []
        for step in range(-WARM_UP, updates):
            self.recorder.calls = []
            self.recorder.on = True
            role, seconds = self.update(abs(step))
            self.recorder.on = False
            bare_seconds = self.bare(role, self.recorder.calls)
            evaluations = sum(len(call.inputs[0]) for call in self.recorder.calls)
            if step >= 0:
                measurements.append(Measurement(role, seconds, bare_seconds, evaluations))
        return measurements

    def figures(self, updates: int) -> dict[str, Any]:
        """All figures, from `updates` updates."""
        measurements = self.measure(updates)
        by_role = defaultdict(list)
        for measurement in measurements:
            by_role[measurement.role].append(measurement)
        rate = matrix_rate(self.device, self.runtime.dtype).rate
        flops = self.flops()
        operations = sum(flops[m.role] for m in measurements)
        names = ("method", "height", "width", "num_frames", "mixed_precision")
        settings = {name: getattr(self.config, name) for name in names}
        return dict(
            overhead=statistics.median(m.seconds / m.bare_seconds for m in measurements),
            guidance_in_one=self.guidance(self.recorder.calls[0]),
            seconds_per_update={
                role: statistics.median(m.seconds for m in group) for role, group in by_role.items()
            },
            evaluations_per_update={
                role: statistics.mean(m.evaluations for m in group)
                for role, group in by_role.items()
            },
            flops_per_update=flops,
            matmul_rate=rate,
            matmul_share=operations / sum(m.seconds for m in measurements) / rate,
            peak_bytes=self.peak(),
            predicted_peak_bytes=estimate(self.config, self.info).peak,
            updates=updates,
            device=torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            torch=torch.__version__,
            settings=settings | dict(batch=self.config.train_batch_size),
        )
