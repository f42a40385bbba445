"""The loop of one expert, without the command line: draws, intervals, and what is exported."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch
from lessons import Lesson, make_lesson
from safetensors.torch import load_file

import train_distillation
from wan_distill.data.run import Run
from wan_distill.errors import UsageError
from wan_distill.maths.randomness import generator
from wan_distill.methods.base import Loss
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import read_metadata, to_original_names
from wan_distill.planning import levers
from wan_distill.results import Reporting
from wan_distill.training import checkpoint, previews
from wan_distill.training.learner import Learner
from wan_distill.training.metrics import Metrics, read_lines
from wan_distill.training.monitor import Monitor


def distil(run: Run, expert: str = "high", shown=()) -> None:
    train_distillation.distil(
        run, expert, list(shown), Reporting((run.config,), run.info, run.runtime)
    )


def update(run: Run, step: int, lesson: Lesson, role: str = "student") -> Metrics:
    """One update as `train` makes it, and the metrics that it leaves."""
    metrics = Metrics(run.folder.metrics, run.runtime)
    train_distillation.update(
        run,
        step,
        lesson.method,
        lesson.inputs,
        lesson.denoiser,
        lesson.learners[role],
        SimpleNamespace(metrics=metrics),
    )
    return metrics


# ------------------------------------------------------------------------------------------- draws


def test_no_two_micro_batches_ranks_or_updates_share_their_draws(make_run):
    """Neither their noise nor their samples; the same run has the same ones again."""
    run = make_run(method="trajectory", gradient_accumulation_steps=2, num_trajectories=64)
    lesson = make_lesson(run, "high")
    batch_at, drawn = lesson.method.batch_at, []

    def recording(inputs, step, micro_batch):
        drawn.append([step, micro_batch])
        return batch_at(inputs, step, micro_batch)

    def losses(role, denoiser, batch, rng):
        drawn[-1].append(float(torch.randn(1, generator=rng)))
        yield Loss(sum(p.sum() for p in lesson.learners[role].parameters.values()))

    lesson.method.batch_at, lesson.method.losses = recording, losses
    run.runtime.sample_groups = 2
    for _ in range(2):
        for run.runtime.sample_rank in (0, 1):
            for step in (0, 1, 2):
                update(run, step, lesson)
    first, again = drawn[:12], drawn[12:]
    assert first == again
    assert sorted(index for _, index, _ in first) == list(range(12))
    assert all(index // 4 == step for step, index, _ in first)
    assert len({noise for *_, noise in first}) == 12


def test_a_signal_stops_an_update_between_its_micro_batches(make_run):
    """Of A14B an update takes minutes, and a scheduler grants half a minute."""
    run = make_run(method="trajectory", gradient_accumulation_steps=3)
    lesson = make_lesson(run, "high")
    student, seen = lesson.learners["student"], []
    before = {name: p.detach().clone() for name, p in student.parameters.items()}

    def losses(role, denoiser, batch, rng):
        seen.append(1)
        run.runtime.signal = signal.SIGTERM if len(seen) == 2 else None
        yield Loss(sum(p.square().sum() for p in student.parameters.values()))

    lesson.method.losses = losses
    arguments = (run, 0, lesson.method, lesson.inputs, lesson.denoiser, student)
    assert not train_distillation.update(*arguments, SimpleNamespace())
    assert len(seen) == 2 and student.done == 0
    for name, parameter in student.parameters.items():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_the_seed_and_the_expert_are_in_the_draws(make_run):
    noise = []
    for expert, seed in (("high", 0), ("high", 1), ("low", 0)):
        run = make_run(method="trajectory", seed=seed)
        lesson = make_lesson(run, expert)

        def losses(role, denoiser, batch, rng, lesson=lesson):
            noise.append(float(torch.randn(1, generator=rng)))
            yield Loss(sum(p.sum() for p in lesson.learners[role].parameters.values()))

        lesson.method.losses = losses
        update(run, 0, lesson)
    assert len(set(noise)) == 3


@pytest.mark.parametrize(("role", "step"), [("fake_score", 0), ("real_score", 1), ("student", 2)])
def test_the_gradient_is_the_mean_over_micro_batches_of_all_parts(
    make_run, monkeypatch, role, step
):
    """And so are the metrics: of a whole loss, not of its parts."""
    run = make_run(
        method="dmd",
        real_score="samples",
        critic_warmup_steps=0,
        critic_updates=1,
        score_draws=2,
        gradient_accumulation_steps=2,
        num_trajectories=16,
        diversity_weight=1.0,
    )
    lesson = make_lesson(run, "high", moved=0.02)
    assert lesson.method.role_at(step) == role
    learner = lesson.learners[role]
    totals, gradients, matching = [], [], []
    drawn = lesson.method.draws_of(step)
    for index in (2 * drawn, 2 * drawn + 1):
        batch = lesson.method.batch_at(lesson.inputs, drawn, index)
        parts = lesson.learn(role, batch, generator(run.config.seed, "high", index))
        assert len(parts) == 2
        totals.append(sum(part.value.item() for part in parts))
        matching += [part.metrics.get("matching_gradient") for part in parts]
        gradients.append([p.grad for p in learner.parameters.values()])
        for p in learner.parameters.values():
            p.grad = None

    real, seen = Learner.update, []

    def recording(self, runtime, loss):
        seen.extend(p.grad.clone() for p in self.parameters.values())
        return real(self, runtime, loss)

    monkeypatch.setattr(Learner, "update", recording)
    line = update(run, step, lesson, role).write()
    for gradient, a, b in zip(seen, *gradients, strict=True):
        torch.testing.assert_close(gradient, (a + b) / 2, rtol=1e-4, atol=1e-7)
    assert line[f"{role}_loss"] == pytest.approx(sum(totals) / 2, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in seen]).norm()
    assert line[f"{role}_gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    if role == "student":
        first, _, second, _ = matching  # of each micro-batch, its parts
        assert line["matching_gradient"] == pytest.approx(float(first + second) / 2, rel=1e-5)


# --------------------------------------------------------------------------------------- intervals


def test_everything_is_counted_in_updates_of_the_student(make_run, monkeypatch):
    """Four warm-up updates of the critic, then two before each of the student's: an interval of one
    student update has three updates, and so has one of the warm-up.
    """
    run = make_run(
        method="dmd",
        critic_warmup_steps=4,
        critic_updates=2,
        max_train_steps=2,
        logging_steps=1,
        checkpointing_steps=1,
        checkpoints_total_limit=None,
        validation_steps=1,
        monitor_steps=1,
    )
    monkeypatch.setattr(previews, "MAX_SHARE", 1.0)
    written = []
    monkeypatch.setattr(previews, "write_video", lambda file, clip, fps: written.append(file.name))
    distil(run, "high", ["a red circle"])
    lines = read_lines(run.folder.metrics)
    assert [(line["step"], line["student_updates"]) for line in lines] == [(3, 0), (7, 1), (10, 2)]
    assert ["student_loss" in line for line in lines] == [False, True, True]
    assert ["monitor_score" in line for line in lines] == [True, True, True]
    saved = [folder.name for folder in checkpoint.found(run.folder.expert("high"))]
    assert saved == ["checkpoint-10", "checkpoint-7", "checkpoint-3"]
    assert written == [f"high-{who}-0.mp4" for who in ("teacher", "000000", "000001", "000002")]


# -------------------------------------------------------------------------------- what is exported


def test_the_best_weights_are_exported_not_the_last(make_run, monkeypatch):
    run = make_run(method="trajectory", monitor_steps=1, max_train_steps=3, ema_decay=0.0)
    scores, weights = iter([3.0, 2.0, 1.0, 2.5]), []
    monkeypatch.setattr(
        "wan_distill.training.monitor.scores_without_each", lambda *_: [next(scores)]
    )
    check = Monitor.check

    def recording(self, denoiser, learner):
        weights.append({name: p.detach().clone() for name, p in learner.parameters.items()})
        return check(self, denoiser, learner)

    monkeypatch.setattr(Monitor, "check", recording)
    distil(run)
    exported = load_file(run.folder.lora("high"))
    best = to_original_names(weights[2], run.config.lora_alpha)
    last = to_original_names(weights[3], run.config.lora_alpha)
    assert all(torch.equal(exported[name], tensor) for name, tensor in best.items())
    assert any(not torch.equal(exported[name], tensor) for name, tensor in last.items())


@pytest.mark.journey  # as long as a whole run
def test_the_exported_weights_have_clips_where_no_preview_showed_them(make_run, monkeypatch):
    """Previews at 0 and at the end; the best weights are those after two of three updates."""
    run = make_run(
        method="trajectory", monitor_steps=1, max_train_steps=3, validation_steps=3, ema_decay=0.0
    )
    scores, shown = iter([3.0, 2.0, 1.0, 2.5]), {}
    monkeypatch.setattr(
        "wan_distill.training.monitor.scores_without_each", lambda *_: [next(scores)]
    )
    monkeypatch.setattr(
        previews, "write_video", lambda file, clip, fps: shown.update({file.name: clip})
    )
    distil(run, "high", ["a red circle"])
    assert list(shown) == [f"high-{n}-0.mp4" for n in ("teacher", "000000", "000003", "000002")]
    assert read_metadata(run.folder.lora("high"))["updates"] == 2
    clips = [shown[f"high-00000{n}-0.mp4"] for n in (0, 2, 3)]
    assert all(abs(clips[1] - other).max() > 0 for other in (clips[0], clips[2]))


def test_without_checks_the_average_is_exported(make_run, monkeypatch):
    run = make_run(method="trajectory", monitor_steps=0, ema_decay=0.5, ema_start=0)
    learners, real = [], Learner.update

    def recording(self, *given):
        learners.append(self)
        return real(self, *given)

    monkeypatch.setattr(Learner, "update", recording)
    distil(run)
    average = to_original_names(learners[-1].average, run.config.lora_alpha)
    exported = load_file(run.folder.lora("high"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in average.items())


# ------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_computes_blocks_again(make_run, monkeypatch, checkpointing):
    run = make_run(method="trajectory", monitor_steps=0, gradient_checkpointing=checkpointing)
    forwards, load = [], Teacher.load_expert

    def loading(self, expert, exact=False):
        transformer = load(self, expert, exact)
        transformer.blocks[0].attn1.to_q.register_forward_hook(
            lambda *_: forwards.append(torch.is_grad_enabled())
        )
        return transformer

    monkeypatch.setattr(Teacher, "load_expert", loading)
    distil(run)
    assert sum(forwards) == 4 * (2 if checkpointing else 1)  # two updates of two steps


def test_running_out_of_memory_names_the_phase(make_run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    run = make_run(method="trajectory")
    monkeypatch.setattr(levers, "savings", lambda config, info, need: [(2e9, "--offload")])
    monkeypatch.setattr(Teacher, "load_expert", full)
    with pytest.raises(UsageError, match="out of GPU memory while solving samples"):
        distil(run)
    monkeypatch.undo()
    monkeypatch.setattr(levers, "savings", lambda config, info, need: [(2e9, "--offload")])
    monkeypatch.setattr(Learner, "update", full)
    with pytest.raises(
        UsageError, match=r"training the high expert.*--offload saves about 2\.0 GB"
    ):
        distil(run)
