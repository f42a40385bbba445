"""What ranks agree on, with two threads in the place of two processes, and autocast."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from wan_distill.errors import Stopped
from wan_distill.settings.config import Config
from wan_distill.system.runtime import SAME_SIGNAL, Runtime, to_device


@pytest.fixture(autouse=True)
def signals_of_the_tests() -> Iterator[None]:
    """A Runtime takes the process' signals over."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Ranks:
    """Runtimes of two ranks and the collectives between them."""

    def __init__(self, config: Config, monkeypatch: pytest.MonkeyPatch, **attributes: Any):
        self.runtimes = [Runtime(config) for _ in range(2)]
        for rank, runtime in enumerate(self.runtimes):
            runtime.processes = 2
            runtime.sample_rank, runtime.sample_groups = rank, 2
            runtime.is_main = rank == 0
            for name, value in attributes.items():
                setattr(runtime, name, value)
        self.here = threading.local()
        self.meeting = threading.Barrier(2, timeout=20)
        self.sent: list[Any] = [None, None]
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "broadcast_object_list", self.broadcast)

    def exchange(self, value: Any) -> list[Any]:
        self.sent[self.here.rank] = value
        self.meeting.wait()
        received = list(self.sent)
        self.meeting.wait()
        return received

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        a, b = self.exchange(tensor.clone())
        tensor.copy_(torch.maximum(a, b) if op == dist.ReduceOp.MAX else a + b)

    def broadcast(self, values: list[Any], src: int) -> None:
        values[:] = self.exchange(list(values))[src]

    def ask(self, question: Callable[[Runtime], Any]) -> list[Any]:
        """What each rank answers; an exception is an answer."""
        answers: list[Any] = [None, None]

        def answer(rank: int) -> None:
            self.here.rank = rank
            try:
                answers[rank] = question(self.runtimes[rank])
            except Exception as error:
                answers[rank] = error

        threads = [threading.Thread(target=answer, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


# -------------------------------------------------------------------------------------------- ranks


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_any_rank_stops_all(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, signalled: int
) -> None:
    ranks = Ranks(small_config(), monkeypatch)
    assert ranks.ask(Runtime.stop_requested) == [False, False]
    ranks.runtimes[signalled].signal = signal.SIGTERM
    assert ranks.ask(Runtime.stop_requested) == [True, True]


def test_the_largest_value_is_the_same_on_all_ranks(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(small_config(), monkeypatch)
    largest = ranks.ask(lambda runtime: runtime.max_over_ranks(0.1 - runtime.sample_rank))
    assert largest == [0.1, 0.1]


def test_a_loop_stops_alone_unless_every_forward_needs_all(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(**attributes: bool) -> list[bool]:
        ranks = Ranks(small_config(), monkeypatch, **attributes)
        ranks.runtimes[1].signal = signal.SIGTERM
        return [isinstance(a, Stopped) for a in ranks.ask(Runtime.raise_if_stopped)]

    assert stops(joint=False) == [False, True]
    assert stops(joint=True) == [True, True]


def test_the_main_process_decides_only_where_all_work_together(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(together: bool) -> list[Any]:
        ranks = Ranks(small_config(), monkeypatch, context_parallel=together)
        return ranks.ask(lambda runtime: runtime.value_of_main([runtime.is_main]))

    assert answers(together=False) == [[True], [False]]
    assert answers(together=True) == [[True], [True]]


def gradient_of(rank: int, size: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(10 * seed + rank))


@pytest.mark.parametrize("groups", [2, 1])
def test_gradients_are_averaged_to_the_bit(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, groups: int
) -> None:
    """Their sum where both work on the same samples; also of gradients that are not contiguous."""
    sizes = [(3, 4), (5,), (), (2, 1, 3)]

    def averaged(runtime: Runtime) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
        for seed, p in enumerate(parameters):
            gradient = gradient_of(runtime.sample_rank, tuple(p.shape), seed)
            p.grad = gradient.T.contiguous().T if p.ndim == 2 else gradient
        runtime.average_gradients(p for p in parameters)
        return [p.grad for p in parameters if p.grad is not None]

    first, second = Ranks(small_config(), monkeypatch, sample_groups=groups).ask(averaged)
    for seed, (size, a, b) in enumerate(zip(sizes, first, second, strict=True)):
        expected = (gradient_of(0, size, seed) + gradient_of(1, size, seed)) / groups
        assert torch.equal(a, expected) and torch.equal(b, expected)


def test_a_trained_tensor_without_a_gradient_is_an_error(
    small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, it would shift the others' places on this rank alone."""
    ranks = Ranks(small_config(), monkeypatch)
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(AssertionError, match="without a gradient"):
        ranks.runtimes[0].average_gradients(parameters)


def test_any_split_of_an_update_works_on_the_same_micro_batches(
    small_config: Callable[..., Config],
) -> None:
    def indices(processes: int, accumulation: int, step: int) -> list[int]:
        runtime = Runtime(small_config(gradient_accumulation_steps=accumulation))
        runtime.sample_groups = processes
        found = []
        for runtime.sample_rank in range(processes):
            micros = range(accumulation)
            found += [runtime.micro_batch(step, micro, accumulation) for micro in micros]
        return sorted(found)

    assert indices(1, 4, 3) == indices(2, 2, 3) == indices(4, 1, 3) == [12, 13, 14, 15]


# ------------------------------------------------------------------------------------------ signals


def test_the_first_signal_asks_and_the_second_ends(
    small_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime, codes = Runtime(small_config()), []
    monkeypatch.setattr(os, "_exit", codes.append)
    assert not runtime.stop_requested()
    signal.raise_signal(signal.SIGTERM)
    assert runtime.stop_requested() and "once more to stop at once" in capsys.readouterr().err
    with pytest.raises(Stopped, match="Run the same command"):
        runtime.raise_if_stopped()
    assert codes == []
    signal.raise_signal(signal.SIGTERM)  # a scheduler's and torchrun's copy of it
    assert codes == []
    runtime.signalled -= SAME_SIGNAL
    signal.raise_signal(signal.SIGTERM)
    assert codes == [128 + signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)  # Ctrl-C is a person's: at once
    assert codes[1:] == [128 + signal.SIGINT]


# --------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("no", torch.float32)])
def test_arithmetic_is_in_the_bases_dtype(
    small_config: Callable[..., Config], precision: str, dtype: torch.dtype
) -> None:
    runtime = Runtime(small_config(mixed_precision=precision))
    assert runtime.dtype == dtype
    adapter = torch.nn.Linear(4, 4)
    x = torch.ones(2, 4)
    assert adapter(x).dtype == torch.float32
    with runtime.autocast():
        assert adapter(x).dtype == dtype


def test_weights_that_were_cast_without_gradients_are_cast_again(
    small_config: Callable[..., Config],
) -> None:
    """Only torch < 2.11 takes a cast without gradient from autocast's cache. On later releases no
    gradient shows whether the cache is on, so the test asks torch.
    """
    runtime = Runtime(small_config(mixed_precision="bf16"))
    layer = torch.nn.Linear(4, 4)
    with runtime.autocast():
        assert not torch.is_autocast_cache_enabled()
        with torch.no_grad():
            layer(torch.ones(2, 4))
        layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.abs().min() > 0
    assert torch.is_autocast_cache_enabled()


def test_to_device_changes_nothing() -> None:
    values = torch.randn(3)
    assert torch.equal(to_device(values, torch.device("cpu")), values)


# ------------------------------------------------------------------------------------ the same bits


@pytest.fixture
def own_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("own_choice")
def test_deterministic_operations_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    Runtime(Config(mixed_precision="no"))
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    Runtime(Config(mixed_precision="no", deterministic=True))
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # cuBLAS alone reads a variable
