"""Every objective on the random teacher: what learns when, what is evaluated, and 20 recorded
losses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TEXT_DIM, random_transformer
from torch.utils._python_dispatch import TorchDispatchMode

import train_distillation
from wan_distill.data.embeddings import PromptBank
from wan_distill.data.run import Sources
from wan_distill.data.samples import StoredSamples, trajectories
from wan_distill.errors import UsageError
from wan_distill.layout import LORA_FILE
from wan_distill.maths.distances import energy_distance, relative, score
from wan_distill.maths.randomness import generator
from wan_distill.maths.sigmas import expert_of
from wan_distill.methods.registry import make_method
from wan_distill.model.adapters import adapter_parameters, add_adapter, make_roles
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher
from wan_distill.model.student_files import init_student, save_lora
from wan_distill.results.evaluation import Evaluation, samplers
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import LORA_TARGETS
from wan_distill.settings.description import read_teacher
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import make_learners
from wan_distill.training.monitor import Monitor, warnings

RECORDED = Path(__file__).parent / "recorded"
PROMPTS = ["a red circle", "a blue square", "a green dot"]
BOUNDARY = 0.875


@pytest.fixture
def sources(small_config):
    """Makes Sources whose prompt embeddings are drawn, not encoded."""

    def make(**changes) -> Sources:
        config = small_config(monitor_samples=4, **changes)
        runtime = Runtime(config)
        bank = PromptBank(
            Path(config.output_dir) / "prompts", {}, config.max_sequence_length, runtime.device
        )
        for i, prompt in enumerate([*PROMPTS, config.negative_prompt]):
            bank.store(prompt, torch.randn(4, TEXT_DIM, generator=torch.Generator().manual_seed(i)))
        teacher = Teacher(read_teacher(config), config, runtime)
        return Sources(
            config, teacher, bank, PROMPTS, bank.batch([config.negative_prompt]), runtime
        )

    return make


def trained(sources: Sources, expert: str, moved: float = 0.0):
    """(method, denoiser, learners) as `train` makes them; `moved` gives the adapters an effect."""
    config = sources.config
    method = make_method(expert, sources)
    transformer = sources.teacher.load_expert(expert)
    parameters = make_roles(transformer, method, config, expert)
    for seed, role in enumerate(method.roles):
        for p in parameters[role].values():
            p.data.add_(moved * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    denoiser = Denoiser({expert: transformer}, config.boundary)
    learners = make_learners(method, parameters, config)
    return method, denoiser, learners


class Counted:
    """Counts forwards of a Denoiser by (role, with gradient), and keeps the sigmas."""

    def __init__(self, denoiser: Denoiser):
        self.calls, self.sigmas, self.inner = [], [], denoiser.velocity
        denoiser.velocity = self.velocity

    def velocity(self, x, sigma, prompt, *, role):
        self.calls.append((role, torch.is_grad_enabled()))
        self.sigmas.append((role, sigma))
        return self.inner(x, sigma, prompt, role=role)


# ------------------------------------------------------------------------------- 20 recorded losses


@pytest.mark.parametrize("method", ["trajectory", "consistency", "dmd", "dmd-samples"])
def test_twenty_recorded_losses(method, random_teacher, tmp_path):
    """A refactor leaves them where they are; a change of behaviour records them anew and says so in
    its commit.

    Tolerance 1e-3: the same draws on another CPU or torch differ by rounding, 1e-6 after one update
    and growing by Adam's division with each; an objective that is wrong anywhere is off by far more
    (a dropped factor, sign, role). To record: delete the file and run the test twice.
    """
    out = tmp_path / "out"
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS, "a yellow line"]), encoding="utf-8")
    recorded, samples, method = (
        RECORDED / f"{method}.json",
        method.endswith("samples"),
        method.removesuffix("-samples"),
    )
    settings = dict(
        teacher_path=random_teacher,
        prompts=tmp_path / "prompts.txt",
        method=method,
        height=32,
        width=32,
        num_frames=5,
        train_batch_size=2,
        sample_batch_size=8,
        num_trajectories=4,
        teacher_steps=6,
        rank=4,
        max_sequence_length=12,
        negative_prompt="",
        mixed_precision="no",
        gradient_checkpointing=False,
        monitor_steps=0,
        max_train_steps=20 if method != "dmd" else 2 if samples else 5,
        logging_steps=1,
        output_dir=out,
        real_score="samples" if samples else "guided",
        critic_warmup_steps=5,
        critic_updates=2,
        learning_rate=1e-3,
        fake_score_learning_rate=1e-3,
    )
    argv = [f"--{k}={v}" for k, v in settings.items() if not isinstance(v, bool)] + [
        "--no-gradient_checkpointing"
    ]
    assert train_distillation.main(argv) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [
        {k: v for k, v in line.items() if k == "expert" or k.endswith("_loss")} for line in lines
    ]
    assert [line["expert"] for line in losses] == ["high"] * 20 + ["low"] * 20
    if not recorded.exists():
        recorded.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"recorded {recorded.name}: look at it, run again, and commit it")
    for found, before in zip(losses, json.loads(recorded.read_text()), strict=True):
        assert found.pop("expert") == before.pop("expert") and found == pytest.approx(
            before, rel=1e-3
        )


# ---------------------------------------------------------------------------------------------- dmd


def test_the_critic_leads_and_the_schedule_is_exact(sources):
    method = make_method(
        "high", sources(method="dmd", critic_warmup_steps=3, critic_updates=2, diversity_weight=0.0)
    )
    roles = [method.role_at(step) for step in range(method.updates(2))]
    assert roles == ["fake_score"] * 3 + (["fake_score"] * 2 + ["student"]) * 2
    assert [method.drawn_at(step) for step in range(9)] == list(range(9))


@pytest.mark.parametrize("expert", ["high", "low"])
def test_both_scores_learn_side_by_side_on_the_same_draws(sources, expert):
    method = make_method(
        expert, sources(method="dmd", real_score="samples", critic_warmup_steps=3, critic_updates=2)
    )
    steps = range(method.updates(2))
    both = ["fake_score", "real_score"]
    assert [method.role_at(step) for step in steps] == both * 3 + (both * 2 + ["student"]) * 2
    for step in steps:
        assert method.drawn_at(step) == step - (method.role_at(step) == "real_score")
        batch = method.batch_at(step, step)
        inputs = method.inputs[4] if expert == "low" else method.samples
        for j, row in enumerate(
            batch.rows
        ):  # of student and teacher: the same prompt, and in the end the same noise
            assert torch.equal(batch.x[j], inputs.at([row], [batch.sigmas[0]])[0])
            assert torch.equal(inputs.noise(row), method.samples.noise(row))
            assert torch.equal(batch.prompt[j], method.samples.prompt([row])[0])


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_student_that_samples_like_the_teacher_is_not_moved(sources, expert):
    """Whatever noise the two scores pick up, it is the same: they stay alike to the bit, and their
    gap is 0.
    """
    made = sources(
        method="dmd",
        real_score="samples",
        critic_warmup_steps=0,
        critic_updates=3,
        diversity_weight=0.0,
        learning_rate=1e-2,
        fake_score_learning_rate=1e-2,
        adam_beta1=0.9,
    )
    method, denoiser, learners = trained(made, expert)

    def perfect(denoiser, batch):  # what the student of every exit should arrive at
        end = method.teacher_end(batch)
        velocity = denoiser.velocity(
            batch.x,
            torch.full((len(end),), batch.sigmas[0], dtype=torch.float64),
            batch.prompt,
            role="student",
        )
        return velocity, end

    method.rollout, moved = perfect, []
    for step in range(method.updates(2)):
        role, drawn = method.role_at(step), method.drawn_at(step)
        with denoiser.training(role):
            loss = method.loss(
                role, denoiser, method.batch_at(drawn, drawn), generator("side by side", drawn)
            )
            loss.value.backward()
        if role == "student":
            assert float(loss.metrics["matching_gradient"]) == 0
        learners[role].update(made.runtime, loss.value)
        moved.append((role, loss.value.item()))
    (_, fake), (_, real) = moved[:2]
    assert fake == real != moved[2][1]
    scores = [list(learners[role].parameters.values()) for role in ("fake_score", "real_score")]
    assert all(torch.equal(a, b) and a.abs().max() > 0 for a, b in zip(*scores, strict=True))


def test_what_the_warm_start_solved_is_not_solved_again(sources, tmp_path, monkeypatch):
    calls, solve_shard = [], StoredSamples._solve_shard
    monkeypatch.setattr(
        StoredSamples,
        "_solve_shard",
        lambda self, index, *more: calls.append(index) or solve_shard(self, index, *more),
    )
    first = sources(method="trajectory")
    solved = first.solved(trajectories)
    assert calls == [0, 0]

    def following(name: str, before, **changes):
        changes |= dict(output_dir=str(tmp_path / name), init_student_from=before.config.output_dir)
        return dataclasses.replace(first, config=dataclasses.replace(first.config, **changes))

    second = following("second", first)
    again = second.solved(trajectories)
    assert calls == [0, 0] and torch.equal(again._knot(3, 1), solved._knot(3, 1))
    third = following(
        "third", second, num_trajectories=40
    )  # handed on; a longer set begins with the shorter one
    again = third.solved(trajectories)
    assert (
        calls == [0, 0, 1, 1]
        and torch.equal(again._knot(3, 1), solved._knot(3, 1))
        and solved.shards == 1
    )
    damaged = again.shard(1)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    following("fourth", third, num_trajectories=40).solved(trajectories)
    assert calls == [0, 0, 1, 1, 1, 1]
    following("fifth", second, base_precision="nf4").solved(trajectories)  # another teacher
    assert calls[6:] == [0, 0]


def test_one_expert_at_a_time_is_in_memory(sources, monkeypatch):
    alive, load = [], Teacher.load_expert

    def loading(self, expert, exact=False):
        assert not [name for name, model in alive if model() is not None], (
            f"loading {expert}: another is still there"
        )
        transformer = load(self, expert, exact)
        alive.append((expert, weakref.ref(transformer)))
        return transformer

    monkeypatch.setattr(Teacher, "load_expert", loading)
    made = sources(method="trajectory")
    made.solved(trajectories)
    evaluation = Evaluation(made.config, made.teacher, made.bank, PROMPTS, made.runtime)
    evaluation._sample(samplers(made.config)[2], made.negative)
    assert [expert for expert, _ in alive] == ["high", "low"] * 2


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("exit", [0, 1])
@pytest.mark.parametrize("real", ["guided", "samples"])
def test_nothing_runs_past_the_exit_and_only_the_exit_learns(sources, expert, exit, real):
    method, denoiser, _ = trained(
        sources(method="dmd", diversity_weight=0.0, real_score=real), expert, moved=0.02
    )
    batch = dataclasses.replace(method.batch_at(0, 0), exit=exit)
    counted = Counted(denoiser)
    with denoiser.training("student"):
        method.loss("student", denoiser, batch, generator("g")).value.backward()
    rollout = [call for call in counted.calls if call[0] == "student"]
    assert rollout == [("student", False)] * exit + [("student", True)]
    judge = "teacher" if real == "guided" else "real_score"
    assert [call for call in counted.calls if call[0] != "student"] == [
        (judge, False),
        ("fake_score", False),
    ]
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in adapter_parameters(denoiser.experts[expert], "student").values()
    )
    counted.calls.clear()
    with denoiser.training("fake_score"):
        method.loss("fake_score", denoiser, batch, generator("g")).value.backward()
    assert counted.calls == [("student", False)] * (exit + 1) + [("fake_score", True)]
    if real == "samples":  # no rollout: the teacher's samples are on disk
        with denoiser.training("real_score"):
            method.loss("real_score", denoiser, batch, generator("g")).value.backward()
        assert counted.calls[exit + 2 :] == [("real_score", True)]
    for role in method.scores:
        assert all(
            p.grad is not None and p.grad.abs().max() > 0
            for p in adapter_parameters(denoiser.experts[expert], role).values()
        )
    scored = torch.cat([sigma for role, sigma in counted.sigmas if role != "student"])
    assert {expert_of(float(s), BOUNDARY) for s in scored} == {expert}


def test_the_exit_is_agreed_over_ranks_and_changes_with_the_update(sources):
    method = make_method(
        "high", sources(method="dmd", diversity_weight=0.0, sampling_steps=(2, 4, 8))
    )
    kinds = set()
    for step in range(80):
        ranks = [method.batch_at(step, micro_batch) for micro_batch in (2 * step, 2 * step + 1)]
        assert len({(b.sigmas, b.exit) for b in ranks}) == 1 and not torch.equal(
            ranks[0].x, ranks[1].x
        )
        kinds.add((len(ranks[0].sigmas) - 1, ranks[0].exit))
    assert kinds == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}


@pytest.mark.parametrize(
    "steps, end", [((1,), 0.0), ((2,), 5 / 6), ((3,), 5 / 7), ((6,), 5 / 6), ((8,), 5 / 6)]
)
def test_any_number_of_steps_has_its_own_hand_over(sources, steps, end):
    made = sources(method="dmd", diversity_weight=0.0, sampling_steps=steps)
    assert made.config.experts == (("high", "low") if end else ("high",))
    batch = make_method("high", made).batch_at(0, 0)
    assert batch.sigmas[0] == 1 and batch.sigmas[-1] == pytest.approx(end)


def test_the_diversity_loss_takes_the_first_step_from_the_matching_loss(sources):
    method, denoiser, _ = trained(sources(method="dmd", diversity_weight=0.05), "high", moved=0.02)
    assert {method.batch_at(step, step).exit for step in range(20)} == {1}
    batch = method.batch_at(0, 0)
    second = method.anchors.knots[0]
    assert torch.equal(
        batch.x,
        method.anchors.at(range(4), [1.0] * 4)[
            [i for row in batch.x for i in range(4) if torch.equal(row, method.anchors.noise(i))]
        ],
    )
    with denoiser.training("student"):
        loss = method.loss("student", denoiser, batch, generator("g"))
    with torch.no_grad():
        sigma = torch.ones(2, dtype=torch.float64)
        velocity = denoiser.velocity(batch.x, sigma, batch.prompt, role="student")
    target = (batch.x - batch.anchor) / (1 - second)
    torch.testing.assert_close(loss.metrics["diversity_loss"], (velocity - target).square().mean())


def test_the_low_phase_begins_where_the_distilled_high_expert_ends(sources):
    from wan_distill.layout import LORA_FILE
    from wan_distill.maths.flow import sample
    from wan_distill.model.student_files import save_lora

    made = sources(method="dmd", diversity_weight=0.0)
    _, denoiser, learners = trained(made, "high", moved=0.05)
    save_lora(
        Path(made.config.output_dir) / LORA_FILE["high"],
        learners["student"].exported(),
        made.config,
        made.teacher.info,
        "high",
    )
    low = make_method("low", made)
    inputs = low.inputs[4]
    with torch.no_grad():
        expected = sample(
            lambda x, s: denoiser.velocity(x, s, inputs.prompt([0]), role="student"),
            inputs.noise(0)[None],
            low.config.sigmas()[:3],
        )
    torch.testing.assert_close(inputs.at([0], [5 / 6]), expected, rtol=1e-4, atol=1e-5)
    before = inputs.folder
    save_lora(
        Path(made.config.output_dir) / LORA_FILE["high"],
        {k: 2 * v for k, v in learners["student"].exported().items()},
        made.config,
        made.teacher.info,
        "high",
    )
    assert make_method("low", made).inputs[4].folder != before  # another high expert, other inputs


def test_without_a_distilled_high_expert_the_low_ones_pairs_share_their_beginning(sources):
    method = make_method("low", sources(method="dmd", real_score="samples", expert="low"))
    batch = method.batch_at(0, 0)
    assert torch.equal(batch.x, method.samples.at(batch.rows, [batch.sigmas[0]] * len(batch.rows)))


class Waits(TorchDispatchMode):
    """Raises where the host would wait for the device, which is `meta`: there values do not exist,
    so reading them raises anyway, and copies to it must be told not to wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ in ("_to_copy", "copy_"):
            given = [a.device.type for a in args if isinstance(a, torch.Tensor)]
            if "cpu" in given and result.device.type == "meta":
                assert (kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2]), (
                    "waits for a copy"
                )
        return result


@pytest.mark.parametrize("method", ["trajectory", "consistency", "dmd", "dmd-samples"])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_the_host_never_waits_for_the_device_in_a_loss_and_its_backward(sources, method, expert):
    real = "samples" if method.endswith("-samples") else "guided"
    made = sources(
        method=method.removesuffix("-samples"),
        real_score=real,
        critic_warmup_steps=0,
        critic_updates=1,
    )
    method, denoiser, _ = trained(made, expert)
    made.runtime.device = made.bank.device = torch.device("meta")
    object.__setattr__(made, "negative", made.negative.to("meta"))
    denoiser.experts[expert].to("meta")
    with Waits():
        for step in range(method.updates(1)):
            role = method.role_at(step)
            with denoiser.training(role):
                method.loss(
                    role, denoiser, method.batch_at(step, step), generator(step)
                ).value.backward()


# -------------------------------------------------------------------------------------- consistency


def test_the_consistency_loss_vanishes_for_a_straight_flow(sources):
    """Where every velocity is one constant, one teacher step and the student's jump on land exactly
    on one point.
    """
    method, denoiser, _ = trained(sources(method="consistency"), "high")
    constant = torch.full((16, 2, 4, 4), 0.3)

    def velocity(x, sigma, prompt, *, role):
        return constant.expand_as(x)

    denoiser.velocity = velocity
    for step in range(4):
        loss = method.loss("student", denoiser, method.batch_at(step, step), generator("c", step))
        assert float(loss.value) < 1e-6
    denoiser.velocity = lambda x, sigma, prompt, *, role: (
        constant.expand_as(x) * (1.5 if role == "student" else 1)
    )
    assert (
        float(method.loss("student", denoiser, method.batch_at(0, 0), generator("c")).value) > 1e-4
    )


@pytest.mark.parametrize("expert", ["high", "low"])
def test_consistency_is_learned_where_the_sampler_will_be(sources, expert):
    """At the step's first point the input is the teacher's stored latents to the bit, and each
    update has one step.
    """
    method, denoiser, _ = trained(sources(method="consistency", solver_points=8), expert)
    inner, seen = denoiser.velocity, []

    def velocity(x, sigma, prompt, *, role):
        seen.append((x, sigma))
        return inner(x, sigma, prompt, role=role)

    denoiser.velocity, begun = velocity, 0
    for step in range(12):
        seen.clear()
        start, end, prompt, points = method.batch_at(step, step)
        method.loss("student", denoiser, (start, end, prompt, points), generator("where", step))
        x, sigma = (
            seen[0][0].chunk(2)[0],
            seen[0][1].chunk(2)[0],
        )  # the guided teacher's, in one forward
        for j in range(len(x)):
            along = (points[0] - float(sigma[j])) / (points[0] - points[-1])
            torch.testing.assert_close(x[j], start[j] + along * (end[j] - start[j]))
            if float(sigma[j]) == points[0]:
                assert torch.equal(x[j], start[j])
                begun += 1
        rows = [
            i
            for row in start
            for i in range(4)
            if torch.equal(row, method.samples.at([i], [points[0]])[0])
        ]
        assert torch.equal(end, method.samples.at(rows, [points[-1]] * len(rows)))
    assert begun


# ----------------------------------------------------------------------------------------- monitors


@pytest.mark.parametrize("expert", ["high", "low"])
def test_a_student_as_good_as_its_teacher_is_left_alone_and_a_worse_one_is_not_kept(
    sources, expert, tmp_path, capsys
):
    made = sources(method="trajectory", monitor_steps=1, ema_decay=0.5)
    _, denoiser, learners = trained(made, expert)
    monitor = Monitor(expert, made, tmp_path)
    monitor.student_x0 = lambda denoiser: monitor.real.clone()
    values = monitor.look(denoiser, learners["student"])
    assert values["monitor_score"] == pytest.approx(0, abs=1e-6) and values[
        "monitor_diversity"
    ] == pytest.approx(1)
    best = monitor.exported(learners["student"])
    assert "no nearer to the teacher than it began" in capsys.readouterr().out
    for p in learners["student"].parameters.values():
        p.data.add_(0.3)
    del monitor.student_x0
    for p in learners["student"].average.values():
        p.add_(0.3)
    worse = monitor.look(denoiser, learners["student"])
    assert worse["monitor_score"] > 0.01
    assert all(
        torch.equal(kept, best[name])
        for name, kept in monitor.exported(learners["student"]).items()
    )
    again = Monitor(expert, made, tmp_path)
    again.resume(5)
    assert again.best == monitor.best
    again.resume(0)
    assert (
        not again.file.exists()
        and again.exported(learners["student"]) is learners["student"].average
    )


def test_looking_leaves_the_student_as_it_is(sources, tmp_path):
    made = sources(method="trajectory", monitor_steps=1, ema_decay=0.5)
    _, denoiser, learners = trained(made, "high", moved=0.02)
    learner = learners["student"]
    for p in learner.average.values():
        p.zero_()
    before = {name: p.detach().clone() for name, p in learner.parameters.items()}
    monitor = Monitor("high", made, tmp_path)
    shipped = monitor.look(denoiser, learner)
    assert all(torch.equal(p, before[name]) for name, p in learner.parameters.items())
    for p in learner.parameters.values():
        p.data.zero_()
    assert (
        shipped["monitor_score"] == monitor.look(denoiser, learner)["monitor_score"]
    )  # the average was looked at


def test_the_update_norm_is_that_of_the_weights_last_change(sources):
    made = sources(method="trajectory", lr_warmup_steps=0)
    method, denoiser, learners = trained(made, "high")
    learner, norms = learners["student"], []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in learner.parameters.items()}
        with denoiser.training("student"):
            loss = method.loss(
                "student", denoiser, method.batch_at(step, step), generator("u", step)
            ).value
            loss.backward()
        learner.update(made.runtime, loss)
        norms.append(
            sum(float((p - before[n]).square().sum()) for n, p in learner.parameters.items()) ** 0.5
        )
        assert learner.update_norm() == pytest.approx(norms[-1], rel=1e-3)
    assert norms[0] > 0 and norms[0] != pytest.approx(norms[-1], rel=1e-3)


def test_the_score_tells_sets_apart_by_content_and_by_motion():
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(64, 1, 3, 4, 4, generator=rng), torch.randn(64, 1, 3, 4, 4, generator=rng)
    frozen = b[:, :, :1].expand_as(b)
    assert abs(score(a, b)) < 0.02
    assert energy_distance((a + 1).flatten(1), b.flatten(1)) > 0.1
    assert score(frozen, a) > 0.3
    assert math.isfinite(score(a[:, :, :1], b[:, :, :1]))  # a single frame


def test_warnings_are_plain_words():
    fine = dict(motion=1.0, saturation=1.0, diversity=1.0, luminance=0.0)
    assert warnings(fine) == []
    for change, word in (
        (dict(motion=0.3), "freezes"),
        (dict(luminance=0.2), "over-exposes"),
        (dict(saturation=1.6), "over-exposes"),
        (dict(diversity=0.2), "collapses"),
    ):
        (line,) = warnings(fine | change)
        assert word in line and "--" in line
    teacher = dict(motion=float("nan"), saturation=0.5, luminance=0.4, diversity=2.0)
    assert relative(teacher, teacher) == dict(saturation=1.0, diversity=1.0, luminance=0.0)


# --------------------------------------------------------------------------------------- warm start


def test_a_warm_start_begins_with_the_other_runs_student(sources, tmp_path):
    made = sources(method="dmd", lora_alpha=16.0, diversity_weight=0.0)
    _, first, learners = trained(made, "high", moved=0.05)
    file = tmp_path / LORA_FILE["high"]
    save_lora(file, learners["student"].exported(), made.config, made.teacher.info, "high")
    second = random_transformer(1)
    add_adapter(second, "student", rank=4, alpha=2.0, layers=LORA_TARGETS, seed=9)
    init_student(second, file)
    x = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    prompt, sigma = torch.zeros(1, 12, TEXT_DIM), torch.tensor([0.9], dtype=torch.float64)
    with torch.no_grad():
        wanted = first.velocity(x, sigma, prompt, role="student")
        found = Denoiser({"high": second}, BOUNDARY).velocity(x, sigma, prompt, role="student")
        teacher = first.velocity(x, sigma, prompt, role="teacher")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - teacher).abs().max() > 1e-3
    smaller = random_transformer(1)
    add_adapter(smaller, "student", rank=2, alpha=2.0, layers=LORA_TARGETS, seed=9)
    with pytest.raises(UsageError, match="--rank"):
        init_student(smaller, file)


def test_a_warm_start_that_does_not_fit_is_refused_before_anything_is_solved(
    sources, tmp_path, capsys
):
    made = sources(method="trajectory")
    _, _, learners = trained(made, "high")
    file = tmp_path / "first" / LORA_FILE["high"]
    file.parent.mkdir()
    save_lora(file, learners["student"].exported(), made.config, made.teacher.info, "high")
    flags = [
        "--method",
        "dmd",
        "--output_dir",
        str(tmp_path / "second"),
        "--teacher_path",
        made.config.teacher_path,
        "--prompts",
        str(EMBEDDED_TEACHER / "prompts.txt"),
        "--mixed_precision",
        "no",
        "--height",
        "32",
        "--width",
        "32",
        "--num_frames",
        "5",
    ]
    fitting = ["--init_student_from", str(file.parent), "--rank", "4", "--expert", "high"]
    cases = [
        (["--expert", "both"], "holds no low_noise_lora.safetensors"),
        (["--rank", "8"], "its rank is 4"),
        (
            ["--lora_layers", "to_q"],
            "its layers to_q,to_k,to_v,to_out.0,ffn.net.0.proj,ffn.net.2; give the same",
        ),
        (["--init_student_from", str(tmp_path)], "holds no high_noise_lora.safetensors"),
    ]
    for more, said in cases:
        assert train_distillation.main([*flags, *fitting, *more]) == 2
        assert said in capsys.readouterr().err
    assert train_distillation.main([*flags, *fitting, "--dry_run"]) == 0
    file.write_bytes(file.read_bytes()[:-9])
    assert train_distillation.main([*flags, *fitting]) == 2 and "damaged" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
