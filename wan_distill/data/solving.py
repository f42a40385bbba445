"""Solves the samples that are missing: one expert after the other, each process its own share.

Experts take turns: the high one carries every sample to the boundary, then the low one finishes, so
that a single expert is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wan_distill.data.batches import Named, finish_batches, store_batch
from wan_distill.data.rollout import Latents, carry
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore
from wan_distill.errors import NonFiniteError, UsageError
from wan_distill.maths.sigmas import Expert, expert_sigmas
from wan_distill.model.denoiser import Denoiser, nonfinite_weight
from wan_distill.model.student_files import load_student
from wan_distill.system.console import progress_bar
from wan_distill.system.files import DamagedFile, read_hashed


def solve_missing(run: Run, requests: Iterable[SampleRequest]) -> None:
    """Solves what is missing of `requests`, and nothing else. All processes call it.

    Samples are stored as they come: an interruption loses at most one batch of each process.

    Raises:
        Stopped: after a signal; what is solved is kept.
        NonFiniteError: an expert gives latents that are not finite; they are not stored.
    """
    todo = [(store, _own_share(run, store, rows)) for store, rows in _merged(requests)]
    total = sum(
        len(rows) * len(_owned(run, store, expert)[1:])
        for store, rows in todo
        for expert in run.info.experts
    )
    with progress_bar(total, "solving samples", "step", run.runtime.is_main) as bar:
        for expert in run.info.experts:
            for sampler in ("teacher", "student"):
                chosen = [(store, rows) for store, rows in todo if store.spec.sampler == sampler]
                _solve_stage(run, expert, chosen, bar)
    run.runtime.state.wait_for_everyone()


def _merged(requests: Iterable[SampleRequest]) -> list[tuple[SampleStore, list[int]]]:
    """Requests for one folder as one, in the order of their first mention."""
    stores: dict[str, SampleStore] = {}
    rows: dict[str, set[int]] = {}
    for request in requests:
        name = str(request.store.folder)
        stores.setdefault(name, request.store)
        rows.setdefault(name, set()).update(request.rows)
    return [(store, sorted(rows[name])) for name, store in stores.items()]


def _own_share(run: Run, store: SampleStore, rows: list[int]) -> list[int]:
    """The missing rows that are this process' work: every so many whole batches.

    Batches are the same for any number of processes, so samples are too, to the bit: sums round
    differently in batches of other sizes. Divided by their place among all rows: dividing the
    missing ones would race, since processes list the folder at different times.
    """
    finish_batches(store)
    size = run.config.sample_batch_size
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    mine = batches[run.runtime.sample_rank :: run.runtime.sample_groups]
    return run.runtime.value_of_main(
        [row for batch in mine for row in batch if not store.is_solved(row)]
    )


def _owned(run: Run, store: SampleStore, expert: Expert) -> tuple[float, ...]:
    return expert_sigmas(store.spec.sigmas, expert, run.config.boundary_ratio)


def _solve_stage(
    run: Run, expert: Expert, todo: list[tuple[SampleStore, list[int]]], bar: tqdm
) -> None:
    """One expert's part of all samples of one sampler; freed before the next expert loads."""
    denoiser = None
    for store, rows in todo:
        sigmas = _owned(run, store, expert)
        if not sigmas:
            continue
        waiting = _waiting(run, store, rows, first=sigmas[0] == store.spec.sigmas[0])
        bar.update((len(rows) - len(waiting)) * (len(sigmas) - 1))
        size = run.config.sample_batch_size
        batches = [waiting[i : i + size] for i in range(0, len(waiting), size)]
        count = len(batches)
        if run.runtime.sharded:  # a forward needs all processes
            count = int(run.runtime.max_over_ranks(count))
        if count and denoiser is None:
            denoiser = _load(run, expert, store)
        for i in range(count):
            run.runtime.raise_if_stopped()
            assert denoiser is not None
            if i < len(batches):
                _solve_batch(run, expert, denoiser, store, batches[i], bar)
            else:
                _repeat(run, expert, denoiser, store)


def _waiting(run: Run, store: SampleStore, rows: list[int], first: bool) -> list[int]:
    """Those of `rows` that this expert has still to carry; `first`: it is the one that begins."""
    waiting = [row for row in rows if not (first and store.handed_over(row).exists())]
    return run.runtime.value_of_main(waiting)


def _load(run: Run, expert: Expert, store: SampleStore) -> Denoiser:
    transformer = run.teacher.load_expert(expert)
    if expert in store.students:
        load_student(transformer, store.students[expert])
    return run.denoiser(expert, transformer)


def _solve_batch(
    run: Run, expert: Expert, denoiser: Denoiser, store: SampleStore, rows: list[int], bar: tqdm
) -> None:
    """Carries one batch through `expert` and stores each of its samples."""
    sigmas = _owned(run, store, expert)
    if not (run.runtime.sharded or run.runtime.context_parallel):  # there all have the same work
        finished = [row for row in rows if _is_finished(store, row)]
        bar.update(len(finished) * (len(sigmas) - 1))
        rows = [row for row in rows if row not in finished]
        if not rows:
            return
    begun = [_begin(store, row, sigmas[0]) for row in rows]
    latents = torch.stack([x for x, _ in begun])
    ((_, reached),) = _carried(run, expert, denoiser, store, rows, latents, bar)
    if not all(torch.isfinite(x).all() for x in reached.values()):
        raise NonFiniteError(_complaint(store, rows, expert, denoiser))
    if run.runtime.context_parallel and not run.runtime.is_main:
        return
    contents: dict[Path, Named] = {}
    for j, row in enumerate(rows):
        passed = [reached[sigma][j] for sigma in sigmas[1:] if sigma in store.spec.stored]
        done = [*begun[j][1], *passed]
        latents_stored = {"latents": torch.stack(done)} if done else {}
        if sigmas[-1] > store.spec.sigmas[-1]:
            contents[store.handed_over(row)] = {"here": reached[sigmas[-1]][j]} | latents_stored
        else:
            assert done  # the last solver point is a stored one
            contents[store.file(row)] = latents_stored
    store_batch(store, rows, contents)


def _is_finished(store: SampleStore, row: int) -> bool:
    """Whether another run, which has the same --samples_dir, has finished a sample meanwhile."""
    return store.file(row).exists() and not store.handed_over(row).exists()


def _begin(store: SampleStore, row: int, sigma: float) -> tuple[Tensor, list[Tensor]]:
    """Latents at `sigma`, where this expert begins, and those stored on the way there."""
    if sigma == store.spec.sigmas[0]:
        return store.noise(row), []
    try:
        tensors = read_hashed(store.handed_over(row))
    except DamagedFile as error:
        raise UsageError(f"{error}; delete it and run again") from error
    return tensors["here"], list(tensors.get("latents", ()))


def _carried(
    run: Run,
    expert: Expert,
    denoiser: Denoiser,
    store: SampleStore,
    rows: list[int],
    latents: Tensor,
    bar: tqdm | None,
) -> list[tuple[slice, Latents]]:
    steps = carry(
        run,
        denoiser,
        expert,
        latents,
        store.prompts_of(rows),
        _owned(run, store, expert),
        role="student" if expert in store.students else "teacher",
        guided=store.spec.sampler == "teacher",
        solver=store.spec.solver,
        store=store.spec.stored,
        advance=bar.update if bar is not None else (lambda samples: None),
    )
    return list(steps)


def _repeat(run: Run, expert: Expert, denoiser: Denoiser, store: SampleStore) -> None:
    """As many forwards as a batch takes, for the processes that still have one."""
    noise = store.noise(0)[None]
    _carried(run, expert, denoiser, store, [0], noise, None)


def _complaint(store: SampleStore, rows: list[int], expert: Expert, denoiser: Denoiser) -> str:
    weight = nonfinite_weight(denoiser.experts[expert])
    where = f"its weight {weight} is not either" if weight else "its weights are"
    return (
        f"{store.spec.kind} {rows[0]}: the {expert} expert gives latents that are not finite; "
        f"{where}: download the teacher again, or try --mixed_precision no"
    )
