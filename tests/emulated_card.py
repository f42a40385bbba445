"""A card in the host's memory: a script runs on CUDA tensors to its end on a machine without one.

    python tests/emulated_card.py train_distillation.py --method dmd --output_dir ...

The tensors are torch's own of the device `cuda`; the CPU makes each operation on them
(emulated_card.cpp), with CUDA's autocast policy. What a card refuses is refused: tensors on two
devices, values that nobody copied back, memory of the card that is to be pinned. Not to be had
here are a card's kernels (so no `--compile`, no 8-bit Adam), its speed, and memory that runs out;
streams and events do nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
MEMORY = 85_000_000_000
PROPERTIES = SimpleNamespace(
    total_memory=MEMORY, name="an emulated card", major=9, minor=0, multi_processor_count=132
)


def load_library() -> None:
    """Compiles and loads emulated_card.cpp; before torch, which asks for a GPU at its import."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    libraries = torch / "lib"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "emulated_card.so"
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-O0", f"-I{torch / 'include'}"]
        command += [str(HERE / "emulated_card.cpp"), "-o", str(library)]
        command += [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library))


class Stream:
    """Stands in for CUDA's."""

    def __init__(self, device: Any = None):
        self.device = device

    def record_event(self) -> None: ...

    def wait_event(self, event: Any) -> None: ...


def be_a_card() -> None:
    """Makes torch's Python side, which a CPU build lacks, believe in the card."""
    import torch

    torch._C._set_only_lift_cpu_tensors(True)  # constants are the host's, as with a real card
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    answers: dict[str, Any] = dict(
        _lazy_init=None,
        is_bf16_supported=True,
        current_device=0,
        device_count=1,
        set_device=None,
        synchronize=None,
        empty_cache=None,
        manual_seed_all=None,
        get_device_name=PROPERTIES.name,
        get_device_properties=PROPERTIES,
        get_device_capability=(PROPERTIES.major, PROPERTIES.minor),
        mem_get_info=(MEMORY, MEMORY),
        max_memory_allocated=1,
        stream=nullcontext(),
    )
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *given, answer=answer, **named: answer)
    torch.cuda.Stream = torch.cuda.current_stream = Stream


def main() -> None:
    load_library()
    import torch

    be_a_card()
    # Imported now: with a card at hand they look for its kernels.
    import peft  # noqa: F401
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline  # noqa: F401
    from transformers import UMT5EncoderModel  # noqa: F401

    torch.cuda.is_available = lambda: True
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(HERE.parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
