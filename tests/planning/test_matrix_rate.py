"""The matrix rate, and what other work took of the processor while it was measured."""

from __future__ import annotations

import pytest
import torch

from wan_distill.planning.matrix_rate import MatrixRate, matrix_rate, taken


@pytest.mark.parametrize(
    ("used", "threads", "busy", "cores", "share"),
    [
        (2.0, 2, 1.0, 2, 0.0),  # alone
        (1.96, 2, 1.0, 2, 0.0),  # as good as alone
        (0.5, 2, 1.0, 2, 0.75),  # six others share two cores with its two threads
        (1.0, 1, 1.0, 2, 0.0),  # a core for each
        (2.0, 64, 0.05, 64, 0.0),  # held back by a limit, not by others
        (2.0, 64, 0.33, 64, 0.29875),
        (0.01, 2, 1.0, 2, 0.95),  # not believed
        (1.0, 8, 1.0, 2, 0.5),  # more threads than cores
    ],
)
def test_only_what_others_took_counts(used, threads, busy, cores, share):
    assert taken(used, threads, busy, cores) == pytest.approx(share)


def test_the_rate_alone_is_what_the_rest_of_the_processor_would_give_too():
    assert MatrixRate(3e11).alone == 3e11
    assert MatrixRate(3e11, busy=0.75).alone == 12e11


def test_this_machine_is_measured():
    found = matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert found.rate > 1e8 and 0 <= found.busy < 1
