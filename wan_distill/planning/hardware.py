"""The GPUs that a plan can be made for, and this machine."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import psutil
import torch

from wan_distill.errors import UsageError
from wan_distill.planning.matrix_rate import MatrixRate, matrix_rate
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.scale import scale_of
from wan_distill.system.runtime import DTYPES, process_state

GB = 1e9
# Of a card: the rest is the CUDA context (0.5 GB) and what fragmentation takes.
USABLE = 0.92
# Of the dense bf16 rate that training is assumed to reach where it was not measured: 395 of an
# H100's 989 TFLOP/s, as published runs of 14B video models do.
SHARE_OF_DATASHEET = 0.4
# A14B's updates on an H200, torch 2.11 (benchmarks/gpu.py): 0.49 to 0.51, its samples 0.55. An H100
# multiplies as fast; a fifth of the time moves memory, which takes it 1.43 times as long.
SHARE_OF_H200 = 0.5
SHARE_OF_H100 = 0.46
# Of a rate that was measured here: on that H200 0.72 of it. On a CPU half, and less where the
# transformer is narrow: at width 128 the default job's updates reach 0.4, its samples more; the
# four clips an update of benchmarks/step.py 0.20 to 0.22, and 0.36 to 0.40 at width 256.
SHARE_OF_MEASURED = {"cuda": 0.7, "cpu": 0.5}
FULL_SHARE_WIDTH = 160  # of a transformer; narrower ones spend more on all but matrix products


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    title: str
    memory: float
    """bytes, as CUDA reports them: more than the decimal gigabytes of the name"""
    rate: float
    """dense bf16 operations per second with float32 accumulation, by the datasheet"""

    share: float = SHARE_OF_DATASHEET
    """of `rate`, what training is assumed to reach"""


GPUS = {
    "b200": Gpu("B200", 191.5e9, 2250e12),
    "h200": Gpu("H200", 150.1e9, 989e12, SHARE_OF_H200),
    "h100": Gpu("H100 SXM", 85.0e9, 989e12, SHARE_OF_H100),
    "h100-pcie": Gpu("H100 PCIe", 85.0e9, 756e12),
    "rtx-pro-6000": Gpu("RTX PRO 6000 Blackwell", 102.0e9, 503e12),
    "a100-80": Gpu("A100 80 GB", 85.0e9, 312e12),
    "a100-40": Gpu("A100 40 GB", 42.3e9, 312e12),
    "l40s": Gpu("L40S", 48.3e9, 362e12),
    "rtx-5090": Gpu("RTX 5090", 34.2e9, 209e12),
    "rtx-4090": Gpu("RTX 4090", 25.7e9, 165e12),
}


@dataclass(frozen=True)
class Hardware:
    """What a run is planned for."""

    title: str
    count: int
    memory: float
    """bytes of one device"""
    rate: float
    """operations per second of one device that training is assumed to reach"""
    reason: str
    """where `rate` comes from"""
    named: bool
    """whether `--gpu` names it, so that nothing of this machine matters"""

    is_gpu: bool = True
    """whether it is paid for by the hour"""
    busy: float = 0.0
    """share of the processor that other work takes; `rate` is that without it"""

    @property
    def slower(self) -> float:
        """How many times as long everything takes if other work goes on as it did at the start."""
        return 1 / (1 - self.busy)

    @property
    def usable(self) -> float:
        """Bytes of one device that a run can use."""
        return USABLE * self.memory


def parse_gpu(text: str) -> tuple[Gpu, int]:
    """`h100` or `h100:8` -> the GPU and their number. Raises UsageError."""
    match = re.fullmatch(r"([a-z0-9-]+)(?::(\d+))?", text.strip().lower())
    count = int(match[2] or 1) if match else 0
    if match is None or match[1] not in GPUS or count < 1:
        raise UsageError(
            f"--gpu {text}: is none that this tool knows; give one of {', '.join(GPUS)}, with :N "
            "for several"
        )
    return GPUS[match[1]], count


def measured_share(width: int, device: str = "cpu") -> float:
    """Of the matrix rate measured here, what training a transformer of this width reaches."""
    most = SHARE_OF_MEASURED.get(device, SHARE_OF_DATASHEET)
    return most * min(1.0, width / FULL_SHARE_WIDTH)


@functools.cache
def measured(device: torch.device, dtype: torch.dtype) -> MatrixRate:
    """Once per process, so that all that is said of a plan agrees."""
    return matrix_rate(device, dtype)


def hardware_of(config: Config, info: TeacherInfo) -> Hardware:
    """The GPUs that `--gpu` names, or this machine."""
    if config.gpu is not None:
        gpu, count = parse_gpu(config.gpu)
        rate = gpu.share * gpu.rate
        reason = f"{gpu.share:.0%} of the dense bf16 rate, {gpu.rate / 1e12:.0f} TFLOP/s"
        return Hardware(gpu.title, count, gpu.memory, rate, reason, named=True)
    state = process_state()
    device = state.device
    found = measured(device, DTYPES[config.mixed_precision])
    title, memory = device.type, float(psutil.virtual_memory().available)
    if device.type == "cuda":
        title = torch.cuda.get_device_name(device)
        memory = float(torch.cuda.mem_get_info(device)[1])
    share = measured_share(scale_of(config, info).width, device.type)
    reason = f"{share:.0%} of the matrix rate measured here, {found.alone / 1e12:.3g} TFLOP/s"
    if found.busy:
        reason += f" if nothing else runs; other work took {found.busy:.0%} of the processor"
    rate, is_gpu = share * found.alone, device.type != "cpu"
    count = state.num_processes
    return Hardware(title, count, memory, rate, reason, False, is_gpu, found.busy)
