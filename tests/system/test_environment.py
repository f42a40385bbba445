"""The environment variables that torch reads when it loads."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

import wan_distill
from wan_distill.settings.assets import EMBEDDED_TEACHER

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", ALLOCATOR, "PYTORCH_ALLOC_CONF")


def after_import(monkeypatch: pytest.MonkeyPatch, **given: str) -> dict[str, str]:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that the test's end restores all of them
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(wan_distill)
    return {name: os.environ[name] for name in NAMES if name in os.environ}


@pytest.mark.skipif(sys.platform != "linux", reason="segments that grow exist on Linux only")
def test_torch_gets_segments_that_grow_and_threads_that_do_not_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = {"GOMP_SPINCOUNT": "10000", ALLOCATOR: "expandable_segments:True"}
    assert after_import(monkeypatch) == expected


@pytest.mark.parametrize(
    "given",
    [
        {"GOMP_SPINCOUNT": "1", ALLOCATOR: "max_split_size_mb:64"},
        {"OMP_WAIT_POLICY": "active", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
    ],
)
def test_what_the_user_has_set_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str]
) -> None:
    assert after_import(monkeypatch, **given) == given


def test_they_are_set_before_torch_loads() -> None:
    """Importing the package must not import torch; and torch comes after it in the scripts."""
    code = "import sys, wan_distill; sys.exit('torch' in sys.modules)"
    root = str(EMBEDDED_TEACHER.parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    assert (
        subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
    )
