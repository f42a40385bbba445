"""What pip installs as commands: the scripts, wherever they are."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from wan_distill.settings.assets import REPOSITORY

INSTALLED = "wan_distill_scripts"  # their package, where pip has copied them (setup.py)


def script(name: str) -> ModuleType:
    """A script as a module: of the installed package, or of a checkout (`pip install -e .`)."""
    places = (REPOSITORY / INSTALLED, REPOSITORY)  # the second may hold anybody's `sample.py`
    file = next(f for place in places if (f := place / f"{name}.py").exists())
    spec = importlib.util.spec_from_file_location(f"{INSTALLED}.{name}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train() -> int:
    return int(script("train_distillation").main(sys.argv[1:]))


def sample() -> int:
    return int(script("sample").main(sys.argv[1:]))


def check() -> int:
    return int(script("test_umt5_weights").main(sys.argv[1:]))


def convert() -> int:
    return int(script("convert_lora").main(sys.argv[1:]))
