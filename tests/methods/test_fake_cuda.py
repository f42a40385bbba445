"""Every method and engine makes its updates by CUDA's rules, at A14B's width and full clip: nothing
is on a wrong device, attention gets one dtype, and the host waits once an update.

What a CPU build of torch cannot do, and how it is emulated: fake_cuda.py.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

METHODS: dict[str, dict[str, Any]] = {
    "trajectory": dict(method="trajectory"),
    "consistency": dict(method="consistency"),
    "dmd": dict(method="dmd"),
    "dmd-samples": dict(method="dmd", real_score="samples"),
    "dmd-paired": dict(method="dmd", real_score="paired"),
    "trajectory-i2v": dict(method="trajectory", picture=True),
    "consistency-i2v": dict(method="consistency", picture=True),
    "dmd-i2v": dict(method="dmd", real_score="guided", picture=True),
}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8": dict(base_precision="fp8"),
    "int8": dict(base_precision="int8"),
    "nf4": dict(base_precision="nf4"),
    "offload": dict(offload=True),
    "nf4-offload": dict(base_precision="nf4", offload=True),
    "keep-attention": dict(keep_attention=True),
    "no-checkpointing": dict(gradient_checkpointing=False),
}
SHORT = [("dmd", "plain"), ("trajectory", "fp8"), ("consistency", "nf4-offload")]
ONE_EXPERT = {"trajectory": dict(expert="low"), "consistency": dict(expert="high"), "dmd": {}}
FAULTS = {
    "item": "aten._local_scalar_dense",
    "cpu": "waits for values of the card",
    "copy": "waits for a copy to the card",
    "device": "at least two devices, cuda:0 and cpu",
    "norms": "attention gets torch.float32",
}
pytestmark = [
    pytest.mark.journey,  # it compiles C++, and imports torch once more: as long as a whole run
    pytest.mark.skipif(
        sys.platform != "linux" or shutil.which("g++") is None,
        reason="the two interfaces are compiled by g++, for the libraries of torch on Linux",
    ),
]


def results(cases: list[tuple[str, dict[str, Any], str | None]]) -> dict[str, str | None]:
    """What went wrong in each case, by its name."""
    script = Path(__file__).with_name("fake_cuda.py")
    command = [sys.executable, str(script), json.dumps(cases)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return dict(json.loads(line) for line in ended.stdout.splitlines())


@pytest.fixture(scope="module")
def short_results() -> dict[str, str | None]:
    """The default method, the coarser bases, and each fault in turn."""
    cases: list[Any] = [
        (f"{method} {engine}", METHODS[method] | ENGINES[engine] | ONE_EXPERT[method], None)
        for method, engine in SHORT
    ]
    small = dict(method="dmd", blocks=1, expert="high", num_frames=17)
    return results([*cases, *((fault, small, fault) for fault in FAULTS)])


@pytest.mark.parametrize(("method", "engine"), SHORT)
def test_an_update_obeys_the_card(method, engine, short_results):
    assert short_results[f"{method} {engine}"] is None


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault, short_results):
    assert FAULTS[fault] in (short_results[fault] or "nothing was found")


@pytest.mark.long
@pytest.mark.parametrize("blocks", [2, 3])
def test_every_method_with_every_engine_obeys_the_card(blocks):
    cases = [
        (f"{method} {engine}", METHODS[method] | ENGINES[engine] | dict(blocks=blocks), None)
        for method, engine in itertools.product(METHODS, ENGINES)
    ]
    assert results(cases) == {name: None for name, _, _ in cases}
