"""What holds for every method: which samples it reads, its intervals, its memory, its waiting."""

from __future__ import annotations

import weakref
from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from lessons import make_lesson
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from wan_distill.data.samples import SampleStore, open_inputs
from wan_distill.maths.randomness import generator
from wan_distill.methods import METHODS, make_method
from wan_distill.settings.command_line import build_parser
from wan_distill.settings.job import STAGES
from wan_distill.settings.recipes import RECIPES

EXPERTS = pytest.mark.parametrize("expert", ["high", "low"])
# Settings that make the objectives as different as they can be.
KINDS = {
    "trajectory": dict(method="trajectory"),
    "consistency": dict(method="consistency"),
    "dmd": dict(method="dmd", real_score="guided"),
    "dmd-plain": dict(method="dmd", real_score="guided", diversity_weight=0.0),
    "dmd-samples": dict(method="dmd", real_score="samples"),
    "dmd-paired": dict(method="dmd", real_score="paired"),
}
SHORT = dict(critic_warmup_steps=1, critic_updates=2)


def test_recipes_methods_and_the_choices_of_the_flag_are_the_same():
    (flag,) = (a for a in build_parser()._actions if "--method" in a.option_strings)
    assert set(RECIPES) == set(METHODS) and len(METHODS) == 3
    assert set(flag.choices) == {*RECIPES, *STAGES}
    assert {method for stages in STAGES.values() for method in stages} <= set(RECIPES)


# ------------------------------------------------------------------------------- samples it reads


@EXPERTS
@pytest.mark.parametrize("steps", [(4,), (2, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_samples_that_are_solved_are_those_that_batches_read(
    make_run, monkeypatch, kind, expert, steps
):
    """Over a whole run with two micro-batches per update, of more samples than it needs."""
    settings = KINDS[kind] | SHORT | dict(sampling_steps=steps, gradient_accumulation_steps=2)
    run = make_run(max_train_steps=3, num_trajectories=100, **settings)
    read = defaultdict(set)

    def at(self, rows, sigmas):
        stored = {row for row, sigma in zip(rows, sigmas, strict=True) if sigma != 1}
        assert all(sigma in (1.0, *self.spec.stored) for sigma in sigmas)
        read[self.folder] |= stored
        return torch.zeros(len(rows), *run.latent_shape)

    monkeypatch.setattr(SampleStore, "at", at)
    inputs, method = open_inputs(run, expert), make_method(run.config, expert)
    for step in range(method.updates(3)):
        drawn = method.draws_of(step)
        for micro in range(2):
            method.batch_at(inputs, drawn, 2 * drawn + micro)

    announced = defaultdict(set)
    for purpose, rows in method.rows_read(2).items():
        announced[inputs.samples[purpose].folder] |= rows
    assert announced == read
    assert all(rows < set(range(100)) for rows in read.values())  # fewer than there are
    assert bool(read) == (kind != "dmd-plain" or expert == "low")


def test_anchors_are_read_for_updates_of_the_student_only(make_run):
    run = make_run(**KINDS["dmd"], **SHORT, num_trajectories=100)
    method = make_method(run.config, "high")
    for step in range(method.updates(4)):
        reads = method.rows_at(step, step)
        assert ("anchors" in reads) == (method.role_at(step) == "student")
    student_rows = {
        row
        for step in range(method.updates(2))
        if method.role_at(step) == "student"
        for row in method.rows_at(step, step)["anchors"]
    }
    assert method.rows_read(1)["anchors"] == student_rows and len(student_rows) == 4


# -------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("real", ["guided", "samples"])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0, 1, 7, 12])
def test_an_interval_ends_after_so_many_updates_of_the_student(small_config, real, every, warmup):
    """From the student's first update on; before it, intervals have the same length."""
    config = small_config(
        method="dmd", real_score=real, critic_warmup_steps=warmup, critic_updates=2
    )
    method = make_method(config, "high")
    before, each = method.updates(0), method.updates(1) - method.updates(0)
    ends = [done for done in range(method.updates(7) + 1) if method.is_interval(done, every)]
    students = [sum(method.role_at(step) == "student" for step in range(done)) for done in ends]
    of_warmup = [done for done in ends if done <= before]
    assert of_warmup == list(range(every * each, before + 1, every * each))
    counted = students[len(of_warmup) :]
    assert counted == list(range(every, 8, every))
    # An interval ends with an update of the student, not in the middle of the critic's.
    assert all(method.role_at(done - 1) == "student" for done in ends[len(of_warmup) :])


@pytest.mark.parametrize("kind", ["trajectory", "consistency"])
def test_the_intervals_of_a_single_role_are_plain(small_config, kind):
    method = make_method(small_config(method=kind), "low")
    assert [done for done in range(13) if method.is_interval(done, 4)] == [4, 8, 12]


# ------------------------------------------------------------------------------- memory and waits


class SavedTensor:
    """A tensor that autograd keeps for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


class Graphs:
    """Counts the tensors that autograd keeps at this moment."""

    def __init__(self):
        self.kept = weakref.WeakSet()

    def __enter__(self):
        self.hooks = saved_tensors_hooks(self.keep, lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def keep(self, tensor):
        saved = SavedTensor(tensor)
        self.kept.add(saved)
        return saved

    def __len__(self):
        return len(self.kept)


@EXPERTS
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_graph_is_in_memory_and_the_parts_add_up_to_the_loss(make_run, kind, expert):
    """Each part is computed when the graph of the part before is gone, and the gradients are those
    of the sum.
    """
    run = make_run(**KINDS[kind], critic_warmup_steps=0, critic_updates=1, score_draws=3)
    lesson = make_lesson(run, expert, moved=0.02)
    sizes = []
    for step in range(lesson.method.updates(1)):
        role, batch = lesson.method.role_at(step), lesson.batch(step)
        trained = list(lesson.learners[role].parameters.values())
        values, kept = [], []
        with Graphs() as graphs, lesson.denoiser.training(role):
            for part in lesson.method.losses(role, lesson.denoiser, batch, generator("parts")):
                kept.append(len(graphs))
                part.value.backward()
                assert len(graphs) == 0
                values.append(part.value.item())
        gradients = [p.grad for p in trained]
        for p in trained:
            p.grad = None

        with Graphs() as graphs, lesson.denoiser.training(role):
            parts = lesson.method.losses(role, lesson.denoiser, batch, generator("parts"))
            total = torch.stack([part.value for part in parts]).sum()
            assert len(graphs) >= sum(kept) > 0  # here all of them are kept
            total.backward()
        assert sum(values) == pytest.approx(total.item(), rel=1e-5)
        for p, gradient in zip(trained, gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-7)
            p.grad = None
        sizes.append((role, len(values)))
    draws = 3 if expert == "high" else 1  # the low phase ends at 0: its target is exact
    expected = {
        "trajectory": [("student", 2)],  # each step of the phase
        "dmd": [("fake_score", draws), ("student", 2 if expert == "high" else 1)],
        "dmd-paired": [("fake_score", draws), ("student", 2 if expert == "high" else 1)],
        "dmd-plain": [("fake_score", draws), ("student", 1)],
        "dmd-samples": [
            ("fake_score", draws),
            ("real_score", draws),
            ("student", 2 if expert == "high" else 1),
        ],
    }
    assert sizes == expected.get(kind, [("student", 1)])


class Waits(TorchDispatchMode):
    """Raises where the host would wait for the device, which is `meta`: there values do not exist,
    so reading them raises anyway, and copies to it must be told not to wait.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in ("_to_copy", "copy_"):
            given = [a.device.type for a in args if isinstance(a, torch.Tensor)]
            if "cpu" in given and result.device.type == "meta":
                told = (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])
                assert told, "waits for a copy"
        return result


@pytest.mark.journey  # as long as a whole run
@EXPERTS
@pytest.mark.parametrize("kind", ["trajectory", "consistency", "dmd", "dmd-samples", "dmd-paired"])
def test_the_host_never_waits_for_the_device_in_a_loss_and_its_backward(make_run, kind, expert):
    run = make_run(**KINDS[kind], critic_warmup_steps=0, critic_updates=1)
    lesson = make_lesson(run, expert)
    run.runtime.device = run.embeddings.device = torch.device("meta")
    vars(run).pop("negative", None)
    lesson.denoiser.experts[expert].to("meta")
    lesson.denoiser.autocast = nullcontext  # this device has none
    with Waits():
        for step in range(lesson.method.updates(1)):
            lesson.learn(lesson.method.role_at(step), lesson.batch(step), generator(step))
