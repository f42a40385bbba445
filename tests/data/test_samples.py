"""Stored samples: what they hold, what is found again, and what is taken over from another run."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS
from safetensors.torch import load_file, save_file

from wan_distill.data import solving
from wan_distill.data.run import Run
from wan_distill.data.samples import SampleRequest, SampleStore, open_inputs
from wan_distill.data.solving import solve_missing
from wan_distill.errors import Stopped, UsageError
from wan_distill.maths.flow import euler_step, guide, sigma_batch
from wan_distill.maths.sigmas import expert_of
from wan_distill.model.denoiser import Denoiser
from wan_distill.settings.sample_specs import anchors, trajectories


@pytest.fixture
def solved(monkeypatch):
    """(expert, row) of each sample that an expert has carried, in order."""
    carried, solve = [], solving._solve_batch

    def recording(run, expert, denoiser, store, rows, bar):
        carried.extend((expert, row) for row in rows)
        return solve(run, expert, denoiser, store, rows, bar)

    monkeypatch.setattr(solving, "_solve_batch", recording)
    return carried


def solve_all(run: Run) -> SampleStore:
    """The trajectories of `run`, all of them solved."""
    store = SampleStore(run, trajectories(run.config))
    solve_missing(run, [SampleRequest(store, frozenset(range(len(store))))])
    return store


def test_samples_are_the_guided_teachers_own_path(make_run):
    """Another sampler, written out: both experts, guidance, one step after the other."""
    run = make_run(method="trajectory")
    store = solve_all(run)
    experts = {e: run.teacher.load_expert(e) for e in ("high", "low")}
    denoiser = Denoiser(experts, run.config.boundary_ratio)
    x, condition = store.noise(1)[None], run.condition([PROMPTS[1]])
    negative = run.condition([""])
    for sigma, after in itertools.pairwise(store.spec.sigmas):
        now = sigma_batch(sigma, x)
        with torch.no_grad():
            with_prompt = denoiser.velocity(x, now, condition, role="teacher")
            without = denoiser.velocity(x, now, negative, role="teacher")
        scale = 4.0 if expert_of(sigma, 0.875) == "high" else 3.0
        x = euler_step(x, guide(with_prompt, without, scale), now, sigma_batch(after, x))
        if after in store.spec.stored:
            torch.testing.assert_close(store.at([1], [after]), x, rtol=1e-4, atol=1e-5)
    assert len(store.spec.sigmas) == 7 and store.spec.stored == run.config.sigmas()[1:]


def test_rows_are_read_at_their_own_sigmas_and_prompts(make_run):
    run = make_run(method="trajectory", num_trajectories=5)
    store = solve_all(run)
    sigmas = (1.0, *store.spec.stored)
    rows = [4, 0, 4, 2, 1]
    latents = store.at(rows, sigmas)
    for j, (row, sigma) in enumerate(zip(rows, sigmas, strict=True)):
        assert torch.equal(latents[j], store.at([row], [sigma])[0])
    assert torch.equal(latents[0], store.noise(4))
    assert len({float(x.sum()) for x in latents}) == 5  # all of them differ
    assert store.prompts_of(rows) == [PROMPTS[row % 3] for row in rows]
    assert torch.equal(store.condition(rows).prompt, run.embeddings.batch(store.prompts_of(rows)))
    with pytest.raises(ValueError):
        store.at([0], [0.123])  # not stored


def test_anchors_are_the_trajectories_at_the_second_sigma(make_run):
    run = make_run(method="dmd", diversity_weight=1.0)
    store = open_inputs(run, "high").samples["anchors"]
    solve_missing(run, [SampleRequest(store, frozenset([0, 3]))])
    assert store.spec == anchors(run.config) and store.spec.stored == (0.9375,)
    second = [0.9375, 0.9375]
    assert torch.equal(store.at([0, 3], second), solve_all(run).at([0, 3], second))


@pytest.mark.parametrize("damage", ["cut", "absent", "altered", "no hash"])
def test_a_damaged_sample_is_named_with_the_remedy(make_run, damage):
    run = make_run(method="trajectory")
    store = solve_all(run)
    file = store.file(2)
    store.at([2], [0.9375])  # also one that was read before
    damage_file(file, damage)
    with pytest.raises(UsageError, match=r"000002\.safetensors: missing or damaged.*run again"):
        store.at([2], [0.9375])


def damage_file(file: Path, damage: str) -> None:
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:40])
    elif damage == "altered":  # its header stays whole
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif damage == "no hash":
        save_file(load_file(file), file)
    else:
        file.unlink()


def test_a_sample_that_takes_anothers_place_is_read_anew(make_run):
    run = make_run(method="trajectory")
    store = solve_all(run)
    before = store.at([2], [0.0])
    other = store.file(1).read_bytes()
    store.file(2).unlink()
    store.file(2).write_bytes(other)
    assert not torch.equal(store.at([2], [0.0]), before)
    assert torch.equal(store.at([2], [0.0]), store.at([1], [0.0]))


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_a_damaged_hand_over_is_refused(make_run, monkeypatch, damage):
    run = make_run(method="trajectory", num_trajectories=1)
    store = SampleStore(run, trajectories(run.config))
    carried = solving._solve_batch

    def stopping(run, expert, *rest):
        if expert == "low":
            raise Stopped("between the experts")
        return carried(run, expert, *rest)

    monkeypatch.setattr(solving, "_solve_batch", stopping)
    with pytest.raises(Stopped):
        solve_all(run)
    damage_file(store.handed_over(0), damage)
    monkeypatch.setattr(solving, "_solve_batch", carried)
    with pytest.raises(
        UsageError, match=r"handed-over\.safetensors: missing or damaged.*delete it"
    ):
        solve_all(run)


# ----------------------------------------------------------------------------------- found again


def test_samples_that_are_here_are_not_solved_again(make_run, solved):
    run = make_run(method="trajectory")
    before = solve_all(run).at([0, 1], [0, 0])
    assert sorted(solved) == [(expert, row) for expert in ("high", "low") for row in range(4)]
    solved.clear()
    assert torch.equal(solve_all(run).at([0, 1], [0, 0]), before) and solved == []


def test_what_the_warm_start_solved_is_not_solved_again(make_run, tmp_path, solved):
    def following(name: str, before: Run, **changes) -> Run:
        """A run that begins with `before`, in a folder of its own."""
        changes |= dict(output_dir=str(tmp_path / name), init_student_from=before.config.output_dir)
        config = dataclasses.replace(first.config, **changes)
        return dataclasses.replace(first, config=config)

    def solve(run: Run) -> SampleStore:
        solved.clear()
        return solve_all(run)

    first = make_run(method="trajectory")
    original = solve(first)
    assert len(solved) == 2 * 4
    second = following("second", first)
    taken_over = solve(second)
    assert solved == [] and taken_over.folder != original.folder
    assert torch.equal(taken_over.at([3], [0.9375]), original.at([3], [0.9375]))

    # Handed on once more. A longer set begins with the shorter one.
    third = following("third", second, num_trajectories=10)
    longer = solve(third)
    assert solved == [(expert, row) for expert in ("high", "low") for row in range(4, 10)]
    assert torch.equal(longer.at([3], [0.9375]), original.at([3], [0.9375]))

    damaged = longer.file(7)
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    solve(following("fourth", third, num_trajectories=10))
    assert solved == [("high", 7), ("low", 7)]
    solve(following("fifth", second, base_precision="nf4"))  # another teacher
    assert len(solved) == 2 * 4


def test_a_folder_says_what_its_name_stands_for(make_run):
    run = make_run(method="trajectory")
    store = SampleStore(run, trajectories(run.config))
    assert not store.folder.exists()  # opening a set writes nothing
    solve_missing(run, [SampleRequest(store, frozenset([1]))])
    names = {file.name for file in store.folder.iterdir()}
    assert names == {"key.json", "000001.safetensors"}
    for word in ("teacher", "prompts", "sigmas", "a red circle", "guidance"):
        assert word in (store.folder / "key.json").read_text(encoding="utf-8")
