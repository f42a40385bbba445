"""What pip installs as commands: the scripts, wherever they are."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from wan_distill.interrupts import end_quietly

BESIDE = Path(__file__).resolve().parents[1]  # the package: a checkout, or site-packages
INSTALLED = "wan_distill_scripts"  # their package, where pip has copied them (setup.py)


def script(name: str) -> ModuleType:
    """A script as a module: of the installed package, or of a checkout (`pip install -e .`)."""
    places = (BESIDE / INSTALLED, BESIDE)  # the second may hold anybody's `sample.py`
    file = next(f for place in places if (f := place / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(f"{INSTALLED}.{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str) -> int:
    """The exit code of a script on this process's arguments."""
    end_quietly()  # Ctrl-C while it is imported
    return int(script(name).main(sys.argv[1:]))


def train() -> int:
    return run("train_distillation")


def sample() -> int:
    return run("sample")


def check() -> int:
    return run("test_umt5_weights")


def convert() -> int:
    return run("convert_lora")
