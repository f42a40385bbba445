"""Solving: exactly what was asked for, one expert at a time, interrupted anywhere, shared out."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import weakref

import pytest
import torch

from wan_distill.data import batches, solving
from wan_distill.data.rollout import carry
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.data.solving import solve_missing
from wan_distill.errors import NonFiniteError, Stopped
from wan_distill.model import loading
from wan_distill.model.loading import Teacher
from wan_distill.results.evaluation import Evaluation
from wan_distill.results.samplers import samplers
from wan_distill.settings.sample_specs import SampleSpec, anchors, trajectories
from wan_distill.system.files import write_hashed


def files_of(store: SampleStore) -> list[str]:
    return sorted(file.name for file in store.folder.glob("*.safetensors"))


def names(rows) -> list[str]:
    return [f"{row:06d}.safetensors" for row in sorted(rows)]


@pytest.fixture
def carried(monkeypatch) -> list[tuple[str, int]]:
    """(expert, number of samples) of each call of the sampling loop."""
    calls = []

    def recording(run, denoiser, expert, latents, *rest, **options):
        calls.append((expert, len(latents)))
        return carry(run, denoiser, expert, latents, *rest, **options)

    monkeypatch.setattr(solving, "carry", recording)
    return calls


def latents_of(store: SampleStore, rows: list[int]) -> torch.Tensor:
    return store.at(rows, [0.0] * len(rows))


# --------------------------------------------------------------------------------- exactly so many


def test_six_asked_for_are_six_solved(make_run, carried):
    run = make_run(method="trajectory", num_trajectories=200, sample_batch_size=4)
    store = SampleStore(run, trajectories(run.config))
    rows = {0, 7, 8, 31, 100, 199}
    solve_missing(run, [SampleRequest(store, frozenset(rows))])
    assert files_of(store) == names(rows)
    assert carried == [("high", 4), ("high", 2), ("low", 4), ("low", 2)]


def test_requests_for_one_folder_are_solved_together(make_run):
    """Also where two stores of the same samples ask; other sets are solved in the same pass."""
    run = make_run(method="dmd")
    first, second = (SampleStore(run, trajectories(run.config)) for _ in range(2))
    other = SampleStore(run, anchors(run.config))
    requests = [
        SampleRequest(first, frozenset([0, 1])),
        SampleRequest(other, frozenset([3])),
        SampleRequest(second, frozenset([1, 2])),
    ]
    solve_missing(run, requests)
    assert first.folder == second.folder and files_of(first) == names([0, 1, 2])
    assert files_of(other) == names([3])


def test_batches_and_order_change_no_sample(make_run):
    run = make_run(method="trajectory", sample_batch_size=3)
    store = SampleStore(run, trajectories(run.config))
    solve_missing(run, [SampleRequest(store, frozenset(range(4)))])
    together = latents_of(store, [0, 1, 2, 3])
    alone = make_run(method="trajectory", sample_batch_size=1, output_dir=str(store.folder / "x"))
    again = SampleStore(alone, trajectories(alone.config))
    for row in (2, 0):
        solve_missing(alone, [SampleRequest(again, frozenset([row]))])
    torch.testing.assert_close(latents_of(again, [0, 2]), together[[0, 2]], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------- memory and interruption


def test_one_expert_at_a_time_is_in_memory(make_run, monkeypatch):
    alive, load = [], Teacher.load_expert

    def loading(self, expert, exact=False):
        others = [name for name, model in alive if model() is not None]
        assert not others, f"loading {expert}: {others} is still there"
        transformer = load(self, expert, exact)
        alive.append((expert, weakref.ref(transformer)))
        return transformer

    monkeypatch.setattr(Teacher, "load_expert", loading)
    run = make_run(method="trajectory")
    store = SampleStore(run, trajectories(run.config))
    solve_missing(run, [SampleRequest(store, frozenset(range(4)))])
    Evaluation(run, run.prompts)._sample(samplers(run.config).few_guided)
    assert [expert for expert, _ in alive] == ["high", "low"] * 2


def test_nothing_is_loaded_where_nothing_is_missing(make_run, monkeypatch):
    run = make_run(method="trajectory")
    request = SampleRequest(SampleStore(run, trajectories(run.config)), frozenset([0]))
    solve_missing(run, [request])

    def loading(self, expert, exact=False):
        raise AssertionError(f"loads {expert}")

    monkeypatch.setattr(Teacher, "load_expert", loading)
    solve_missing(run, [request])
    solve_missing(run, [])


def test_a_stop_keeps_what_is_solved_and_the_rest_follows(make_run, monkeypatch):
    """Stopped after each batch in turn: in the end no sample was carried twice by an expert."""
    run = make_run(method="trajectory", sample_batch_size=2)
    store = SampleStore(run, trajectories(run.config))
    solve, carried = solving._solve_batch, []

    def stopping(run, expert, denoiser, store, rows, bar):
        carried.extend((expert, row) for row in rows)
        solve(run, expert, denoiser, store, rows, bar)
        run.runtime.signal = 15

    monkeypatch.setattr(solving, "_solve_batch", stopping)
    request = SampleRequest(store, frozenset(range(4)))
    stops = 0
    for _ in range(9):
        run.runtime.signal = None
        try:
            solve_missing(run, [request])
        except Stopped:
            stops += 1
            continue
        break
    assert stops == 3  # after four batches nothing is left
    assert carried == [(expert, row) for expert in ("high", "low") for row in range(4)]
    assert files_of(store) == names(range(4))  # and no half of any


@pytest.mark.journey  # as long as a whole run
def test_another_run_may_finish_samples_of_a_shared_folder_meanwhile(make_run, monkeypatch):
    """Between this run's experts: what is finished has no hand-over left to begin with."""
    run = make_run(method="trajectory", sample_batch_size=2)
    store = SampleStore(run, trajectories(run.config))
    request = SampleRequest(store, frozenset(range(4)))
    solve_missing(run, [request])
    finished = {row: store.file(row).read_bytes() for row in (0, 1, 2)}
    for row in range(4):
        store.file(row).unlink()
    load = solving._load

    def loading_low(run, expert, store):
        if expert == "low":
            for row, content in finished.items():
                store.file(row).write_bytes(content)
                store.handed_over(row).unlink()
        return load(run, expert, store)

    monkeypatch.setattr(solving, "_load", loading_low)
    solve, steps = solving.progress_bar, []

    @contextlib.contextmanager
    def counting(total, *rest):
        with solve(total, *rest) as bar:
            update = bar.update
            bar.update = lambda n=1: (steps.append(n), update(n))
            yield bar
            assert sum(steps) == total

    monkeypatch.setattr(solving, "progress_bar", counting)
    solve_missing(run, [request])
    assert files_of(store) == names(range(4))
    assert {row: store.file(row).read_bytes() for row in finished} == finished


def test_a_kill_between_the_files_of_a_batch_changes_no_batch_that_follows(make_run, monkeypatch):
    """Each write of a file is once the last one: the same batches are solved as without a kill."""

    class Killed(BaseException):
        pass

    def solve(name: str, writes: int) -> tuple[dict[str, bytes], int]:
        """What is stored after a kill before write number `writes` and a second run; and how many
        writes the first run made.
        """
        run = make_run(method="trajectory", sample_batch_size=2, num_trajectories=3)
        config = dataclasses.replace(run.config, output_dir=str(run.folder.path / name))
        store = SampleStore(dataclasses.replace(run, config=config), trajectories(config))
        request, done = SampleRequest(store, frozenset(range(3))), []

        def dying(file, tensors):
            if len(done) == writes:
                raise Killed
            done.append(file)
            write_hashed(file, tensors)

        with monkeypatch.context() as patch:
            patch.setattr(batches, "write_hashed", dying)
            with contextlib.suppress(Killed):
                solve_missing(store.run, [request])
        solve_missing(store.run, [request])
        assert files_of(store) == names(range(3))
        stored = {row: store.at([row], [0.0]).numpy().tobytes() for row in range(3)}
        return stored, len(done)

    undisturbed, total = solve("undisturbed", 10**9)
    assert total == 2 * (2 + 1 + 1)  # of two experts: a batch of two, and one alone
    for writes in range(total):
        assert solve(f"killed-{writes}", writes)[0] == undisturbed, writes


def test_latents_that_are_not_finite_are_not_stored(make_run, monkeypatch):
    run = make_run(method="trajectory")
    load = Teacher.load_expert

    def poisoned(self, expert, exact=False):
        transformer = load(self, expert, exact)
        if expert == "low":
            transformer.blocks[0].ffn.net[2].weight.data[0, 0] = math.nan
        return transformer

    monkeypatch.setattr(Teacher, "load_expert", poisoned)
    store = SampleStore(run, trajectories(run.config))
    with pytest.raises(NonFiniteError, match=r"the low expert.*blocks.0.ffn.net.2.weight"):
        solve_missing(run, [SampleRequest(store, frozenset(range(4)))])
    assert not set(names(range(4))) & set(files_of(store))


# ------------------------------------------------------------------------------------ several ranks


def test_ranks_share_the_samples_without_overlap(make_run):
    """Whole batches, by their place among those asked for, not among the missing: ranks list the
    folder at different times.
    """
    run = make_run(method="trajectory", num_trajectories=50, sample_batch_size=2)
    store = SampleStore(run, trajectories(run.config))
    rows = frozenset(range(3, 50, 4))
    solve_missing(run, [SampleRequest(store, frozenset([7, 11]))])
    run.runtime.sample_groups = 3
    shares = []
    for run.runtime.sample_rank in range(3):
        solve_missing(run, [SampleRequest(store, rows)])
        shares.append(set(files_of(store)))
    new = [len(b - a) for a, b in zip([{*names([7, 11])}, *shares], shares, strict=False)]
    assert new == [3, 3, 4] and shares[-1] == set(names(rows))


def test_a_process_with_less_to_do_joins_the_forwards_of_the_others(make_run, monkeypatch, carried):
    """Where the base is spread over all processes, a forward needs all of them."""
    run = make_run(method="trajectory", sample_batch_size=2)
    run.runtime.sharded = True
    run.runtime.max_over_ranks = lambda value: value + 2.0  # another has two batches more
    monkeypatch.setattr(
        loading.Teacher, "_load_sharded", lambda *given: loading.Teacher._load_plain(*given, True)
    )
    store = SampleStore(run, trajectories(run.config))
    solve_missing(run, [SampleRequest(store, frozenset([1]))])
    assert carried == [(expert, 1) for expert in ("high", "low") for _ in range(3)]
    assert files_of(store) == names([1])  # what was only repeated is not stored


def test_a_set_that_one_expert_finishes_is_complete_at_once(make_run):
    run = make_run(method="dmd")
    spec = SampleSpec("handovers", "teacher", (1.0, 0.95, 5 / 6), (5 / 6,), 4)
    store = SampleStore(run, spec)
    solve_missing(run, [SampleRequest(store, frozenset([0]))])
    assert files_of(store) == names([0]) and store.at([0], [5 / 6]).shape == (1, *run.latent_shape)
