"""One role's optimizer, learning rate and moving average, against formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from lessons import make_lesson

from wan_distill.errors import NonFiniteError
from wan_distill.maths.randomness import generator
from wan_distill.methods import make_method
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import Learner, make_learners

PLAIN = dict(method="trajectory", lr_scheduler="constant", lr_warmup_steps=0, ema_decay=0.0)
ADAMW = PLAIN | dict(optimizer="adamw")
START = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


def gradient(step: int) -> torch.Tensor:
    return torch.randn(START.shape, generator=torch.Generator().manual_seed(step))


def new_learner(config, role="student", updates: int = 100) -> Learner:
    return Learner(role, {"weight": torch.nn.Parameter(START.clone())}, config, updates)


def train(learner: Learner, steps, scale: float = 1.0) -> list[torch.Tensor]:
    """The weight after each update."""
    runtime, (weight,) = Runtime(learner.config), learner.parameters.values()
    weights = []
    for step in steps:
        weight.grad = scale * gradient(step)
        learner.update(runtime, torch.tensor(1.0))
        weights.append(weight.detach().clone())
    return weights


# --------------------------------------------------------------------------------------- optimizer


def adamw_by_hand(steps, lr=0.01, beta1=0.9, beta2=0.999, decay=0.0, eps=1e-8, norm=math.inf):
    """Decoupled weight decay (arXiv 1711.05101, algorithm 2), in float64."""
    weight, first, second = START.double(), 0.0, 0.0
    for count, step in enumerate(steps, start=1):
        g = gradient(step).double()
        g = g * min(1.0, norm / float(g.norm()))
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g.square()
        weight = weight * (1 - lr * decay)
        change = first / (1 - beta1**count)
        weight = weight - lr * change / ((second / (1 - beta2**count)).sqrt() + eps)
    return weight.float()


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (dict(), dict()),
        (dict(learning_rate=0.05), dict(lr=0.05)),
        (dict(adam_beta1=0.0), dict(beta1=0.0)),
        (dict(adam_beta2=0.5), dict(beta2=0.5)),
        (dict(adam_weight_decay=0.3), dict(decay=0.3)),
        (dict(adam_epsilon=0.1), dict(eps=0.1)),
        (dict(max_grad_norm=0.2, adam_beta2=0.5), dict(norm=0.2, beta2=0.5)),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_an_update_is_adamws_with_these_settings(small_config, settings, by_hand):
    """One setting at a time; those that are not given are not torch's: no weight decay."""
    config = small_config(**ADAMW | dict(learning_rate=0.01, max_grad_norm=1e9) | settings)
    learner = new_learner(config)
    last = train(learner, range(4))[-1]
    torch.testing.assert_close(last, adamw_by_hand(range(4), **by_hand), rtol=1e-4, atol=1e-6)
    if by_hand:  # the setting does something
        assert (last - adamw_by_hand(range(4))).abs().max() > 1e-3


def muon_by_hand(steps, lr=0.01, decay=0.0):
    """Nesterov's momentum of 0.95 as a mean, five steps of Newton and Schulz with the coefficients
    of Jordan et al., and the size of arXiv 2502.16982, equation 4; in float64.
    """
    weight, momentum = START.double(), torch.zeros_like(START).double()
    for step in steps:
        g = gradient(step).double()
        momentum = 0.95 * momentum + 0.05 * g
        x = 0.05 * g + 0.95 * momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        weight = weight * (1 - lr * decay) - lr * 0.2 * max(weight.shape) ** 0.5 * x
    return weight.float()


@pytest.mark.parametrize(
    ("settings", "by_hand"),
    [
        (dict(), dict()),
        (dict(learning_rate=0.05), dict(lr=0.05)),
        (dict(adam_weight_decay=3.0), dict(decay=3.0)),
    ],
    ids=lambda settings: ",".join(settings),
)
def test_an_update_is_muons_with_these_settings(small_config, settings, by_hand):
    """The default of a regression. torch's own takes its steps in bf16."""
    config = small_config(**PLAIN | dict(learning_rate=0.01, max_grad_norm=1e9) | settings)
    assert config.optimizer == "muon"
    learner = new_learner(config)
    change = train(learner, range(4))[-1] - START
    wanted = muon_by_hand(range(4), **by_hand) - START
    torch.testing.assert_close(change, wanted, rtol=0, atol=0.02 * float(wanted.abs().max()))
    if by_hand:  # the setting does something
        assert (wanted - (muon_by_hand(range(4)) - START)).abs().max() > 1e-2


def test_scores_have_their_own_learning_rate(small_config):
    config = small_config(
        **PLAIN | dict(method="dmd"), learning_rate=0.05, fake_score_learning_rate=0.01
    )
    for role, rate in (("student", 0.05), ("fake_score", 0.01), ("real_score", 0.01)):
        learner = new_learner(config, role)
        assert learner.learning_rate() == rate
        moved = (train(learner, [0])[0] - START).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=0.05, atol=0)


@pytest.mark.parametrize("warmup", [0, 4])
@pytest.mark.parametrize("kind", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_decays(small_config, kind, warmup):
    config = small_config(
        method="trajectory", lr_scheduler=kind, lr_warmup_steps=warmup, learning_rate=0.1
    )
    learner = new_learner(config, updates=12)
    rates = []
    for learner.done in range(12):
        rates.append(learner.learning_rate())
    left = [1 - n / (12 - warmup) for n in range(12 - warmup)]
    decay = {
        "linear": left,
        "cosine": [0.5 - 0.5 * math.cos(math.pi * share) for share in left],
    }.get(kind, [1.0] * len(left))
    rise = [(n + 1) / warmup for n in range(warmup)]
    if kind == "constant":
        rise, decay = [], [1.0] * 12
    assert rates == pytest.approx([0.1 * factor for factor in [*rise, *decay]])


def test_the_rate_of_an_update_is_that_of_its_place(small_config):
    config = small_config(
        method="trajectory", lr_scheduler="linear", lr_warmup_steps=2, learning_rate=0.1
    )
    learner, used = new_learner(config, updates=5), []
    for step in range(5):
        train(learner, [step])
        used.append(learner.optimizer.param_groups[0]["lr"])
    assert used == pytest.approx([0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3])


def test_every_role_knows_its_number_of_updates(small_config):
    config = small_config(
        method="dmd",
        real_score="samples",
        max_train_steps=3,
        critic_warmup_steps=4,
        critic_updates=2,
    )
    method = make_method(config, "high")
    parameters = {role: {"w": torch.nn.Parameter(torch.zeros(1))} for role in method.roles}
    learners = make_learners(method, parameters, config)
    counts = {role: learner.updates for role, learner in learners.items()}
    assert counts == {"student": 3, "fake_score": 10, "real_score": 10}


# --------------------------------------------------------------------------------- moving average


@pytest.mark.parametrize(("decay", "start"), [(0.9, 0), (0.5, 2), (0.9, 100)])
def test_the_average_follows_the_weights_from_its_start_on(small_config, decay, start):
    """Before `--ema_start` it is the weight itself."""
    learner = new_learner(small_config(**PLAIN | dict(ema_decay=decay, ema_start=start)))
    average = START
    for done in range(1, 6):
        (weight,) = train(learner, [done])
        average = weight if done <= start else decay * average + (1 - decay) * weight
        torch.testing.assert_close(learner.exported()["weight"], average)
    if start < 5:
        assert (average - weight).abs().max() > 1e-5


def test_without_a_decay_the_weights_themselves_are_exported(small_config):
    learner = new_learner(small_config(**PLAIN))
    (weight,) = train(learner, [0])
    assert torch.equal(learner.exported()["weight"], weight) and learner.average == {}
    score = new_learner(small_config(**PLAIN | dict(ema_decay=0.9)), role="fake_score")
    train(score, [0])
    assert score.average == {}  # only the student has one


def test_inside_shipped_the_parameters_are_the_exported_ones(small_config):
    learner = new_learner(small_config(**PLAIN | dict(ema_decay=0.9, ema_start=0)))
    (weight,) = train(learner, [0])
    with learner.shipped():
        inside = learner.parameters["weight"].detach().clone()
    assert torch.equal(inside, learner.average["weight"]) and not torch.equal(inside, weight)
    assert torch.equal(learner.parameters["weight"], weight)
    with pytest.raises(ValueError), learner.shipped():
        raise ValueError
    assert torch.equal(learner.parameters["weight"], weight)  # also after an error


# -------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("what", ["loss", "gradient", "gradient of another rank"])
def test_what_is_not_finite_never_reaches_the_weights(small_config, what):
    learner = new_learner(small_config(**PLAIN | dict(ema_decay=0.9, ema_start=0)))
    (before,) = train(learner, [0])
    state = {name: tensor.clone() for name, tensor in learner.tensors().items()}
    runtime = Runtime(learner.config)
    if what == "gradient of another rank":
        runtime.max_over_ranks = lambda value: 1.0
    learner.parameters["weight"].grad = gradient(1)
    if what == "gradient":
        learner.parameters["weight"].grad[0, 1] = math.inf
    loss = torch.tensor(math.nan if what == "loss" else 1.0)
    with pytest.raises(NonFiniteError, match=r"loss .*gradient norm"):
        learner.update(runtime, loss)
    assert learner.done == 1 and torch.equal(learner.parameters["weight"], before)
    assert learner.parameters["weight"].grad is None
    assert all(torch.equal(tensor, state[name]) for name, tensor in learner.tensors().items())


def test_the_norm_is_that_before_clipping(small_config):
    learner = new_learner(small_config(**PLAIN, max_grad_norm=0.1))
    learner.parameters["weight"].grad = gradient(0)
    norm = learner.update(Runtime(learner.config), torch.tensor(1.0))
    assert norm == pytest.approx(float(gradient(0).norm()))


# --------------------------------------------------------------------------------- saved, restored


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_restored_learner_goes_on_to_the_bit(small_config, optimizer):
    settings = dict(lr_scheduler="cosine", lr_warmup_steps=2, ema_decay=0.9, ema_start=1)
    config = small_config(method="trajectory", optimizer=optimizer, **settings)
    whole, first = new_learner(config, updates=6), new_learner(config, updates=6)
    train(whole, range(6))
    train(first, range(3))
    saved = {name: tensor.clone() for name, tensor in first.tensors().items()}
    second = new_learner(config, updates=6)
    second.restore(saved, done=3)
    train(second, range(3, 6))
    assert second.done == whole.done == 6
    assert set(second.tensors()) == set(whole.tensors())
    for name, tensor in whole.tensors().items():
        assert torch.equal(second.tensors()[name], tensor), name


def test_tensors_that_do_not_fit_are_refused(small_config):
    learner = new_learner(small_config(**PLAIN))
    train(learner, [0])
    saved = learner.tensors()
    with pytest.raises(KeyError):
        new_learner(small_config(**PLAIN)).restore({}, 1)
    with pytest.raises(RuntimeError):
        new_learner(small_config(**PLAIN)).restore(saved | {"weight.weight": torch.ones(5)}, 1)
    with pytest.raises(KeyError, match="average"):
        new_learner(small_config(**PLAIN | dict(ema_decay=0.9))).restore(saved, 1)


@pytest.mark.parametrize(("old", "new"), [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizers_moments_are_refused(small_config, old, new):
    learner = new_learner(small_config(**PLAIN | dict(optimizer=old)))
    train(learner, [0])
    with pytest.raises(KeyError, match="--optimizer"):
        new_learner(small_config(**PLAIN | dict(optimizer=new))).restore(learner.tensors(), 1)


def test_the_update_norm_is_that_of_the_weights_last_change(make_run):
    run = make_run(method="trajectory", lr_warmup_steps=0, optimizer="adamw")
    lesson = make_lesson(run, "high")
    learner, norms = lesson.learners["student"], []
    for step in range(3):
        before = {name: p.detach().clone() for name, p in learner.parameters.items()}
        parts = lesson.learn("student", lesson.batch(step), generator("u", step))
        learner.update(run.runtime, sum(part.value for part in parts))
        changes = [float((p - before[n]).square().sum()) for n, p in learner.parameters.items()]
        norms.append(sum(changes) ** 0.5)
        assert learner.update_norm() == pytest.approx(norms[-1], rel=1e-3)
    assert norms[0] > 0 and norms[0] != pytest.approx(norms[-1], rel=1e-3)
