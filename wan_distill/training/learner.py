"""One role's trainable tensors with their optimizer and moving average."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from wan_distill.errors import NonFiniteError
from wan_distill.methods.base import Method
from wan_distill.settings.config import Config
from wan_distill.settings.recipes import Role
from wan_distill.system.runtime import Runtime
from wan_distill.training.optimizers import first_moment, has_adam_moments, make_optimizer

Named = dict[str, Tensor]
Parameters = dict[str, torch.nn.Parameter]


class Learner:
    """One role's trainable tensors with their optimizer and the student's moving average."""

    def __init__(self, role: Role, parameters: Parameters, config: Config, updates: int):
        self.role = role
        self.parameters = parameters
        self.config = config
        self.updates = updates
        self.done = 0
        self.peak_lr = (
            config.learning_rate if role == "student" else config.fake_score_learning_rate
        )
        self.optimizer = make_optimizer(config, parameters.values(), self.peak_lr)
        self.average = (
            {name: p.detach().clone() for name, p in parameters.items()} if self.averages else {}
        )

    @property
    def averages(self) -> bool:
        return self.role == "student" and self.config.ema_decay > 0

    def learning_rate(self) -> float:
        """Warm-up, then constant or decaying; a pure function of the update, so nothing needs
        saving.
        """
        warmup, kind = self.config.lr_warmup_steps, self.config.lr_scheduler
        if kind != "constant" and self.done < warmup:
            return self.peak_lr * (self.done + 1) / warmup
        left = 1 - (self.done - warmup) / max(1, self.updates - warmup)
        factor = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}.get(kind, 1.0)
        return self.peak_lr * factor

    def update(self, runtime: Runtime, loss: Tensor) -> float:
        """Averages gradients over ranks, checks, clips, steps. Returns the gradient's norm before
        clipping.

        Raises NonFiniteError, on every rank and with no weight changed, when any rank's `loss` or
        gradient is not finite; the gradients are then gone.
        """
        runtime.average_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        # The one wait for the device in an update: a bad one must not happen.
        norm, loss = torch.stack([norm.double(), loss.detach().double()]).tolist()
        if runtime.max_over_ranks(float(not (math.isfinite(norm) and math.isfinite(loss)))):
            self.forget_gradients()
            raise NonFiniteError(f"loss {loss:g}, gradient norm {norm:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.forget_gradients()
        self.done += 1
        if self.averages:
            decay = self.config.ema_decay if self.done > self.config.ema_start else 0.0
            torch._foreach_lerp_(
                list(self.average.values()),
                [p.detach() for p in self.parameters.values()],
                1 - decay,
            )
        return norm

    @torch.no_grad()
    def forget_gradients(self) -> None:
        """Of the micro-batches of an update that is over, or that is not made."""
        self.optimizer.zero_grad(set_to_none=True)

    def update_norm(self) -> float | None:
        """Norm of the last change of the weights, weight decay aside, as AdamW's moments tell.
        8-bit ones do not, and Muon's changes have the norm that its learning rate gives them.
        """
        if not has_adam_moments(self.config):
            return None
        total = 0.0
        for group in self.optimizer.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if state := self.optimizer.state.get(p):
                    step = float(state["step"])
                    change = state["exp_avg"] / (1 - first**step)
                    change = change / (
                        (state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"]
                    )
                    total += float((lr * change).square().sum())
        return math.sqrt(total)

    def is_finite(self) -> bool:
        """Whether all its weights are numbers."""
        return all(bool(p.detach().isfinite().all()) for p in self.parameters.values())

    def exported(self) -> Named:
        """The tensors to ship: the moving average where one is kept."""
        return (
            self.average
            if self.averages
            else {name: p.detach() for name, p in self.parameters.items()}
        )

    def shipped(self) -> AbstractContextManager[None]:
        """Inside, the parameters are those that `exported` would ship."""
        return self.holding(self.average)

    @contextmanager
    def holding(self, weights: Named) -> Iterator[None]:
        """Inside, the parameters are `weights`; those that it does not name stay as they are."""
        held = {name: self.parameters[name].detach().clone() for name in weights}
        try:
            for name, tensor in weights.items():
                self.parameters[name].data.copy_(tensor)
            yield
        finally:
            for name, p in held.items():
                self.parameters[name].data.copy_(p)

    def tensors(self) -> Named:
        """Everything needed to go on, as flat named tensors."""
        saved = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        saved |= {f"average.{name}": p for name, p in self.average.items()}
        kind = "muon" if self.config.optimizer == "muon" else "adam"
        for name, p in self.parameters.items():
            saved |= {
                f"{kind}.{key}.{name}": _own(key, value)
                for key, value in self.optimizer.state[p].items()
            }
        return saved

    @torch.no_grad()
    def restore(self, saved: Named, done: int) -> None:
        """Puts back what `tensors` gave; KeyError or RuntimeError where it does not fit."""
        self.done = done
        for name, p in self.parameters.items():
            p.copy_(saved[f"weight.{name}"])
        for full, value in saved.items() if done else ():
            if full.startswith(("adam.", "muon.")):
                _, key, name = full.split(".", 2)
                p, counts = self.parameters[name], key == "step" and not value.is_floating_point()
                # bitsandbytes counts in an int; torch's fused AdamW wants its count beside the
                # weights
                self.optimizer.state[p][key] = (
                    int(value) if counts else value.to(p.device, copy=True)
                )
        expected = first_moment(self.config)
        if any(expected not in self.optimizer.state[p] for p in self.parameters.values() if done):
            raise KeyError("its moments are of another --optimizer, or --use_8bit_adam differs")
        for name, average in self.average.items():
            average.copy_(saved[f"average.{name}"])


def _own(key: str, value: Any) -> Tensor:
    """A moment to be stored. bitsandbytes' tables of levels are one for all weights, and a file
    takes no tensor twice.
    """
    tensor = torch.as_tensor(value)
    return tensor.clone() if key.startswith("qmap") else tensor


def make_learners(
    method: Method[Any], parameters: dict[Role, Parameters], config: Config
) -> dict[Role, Learner]:
    """A learner for each role of `method`; how often each steps follows from `method.role_at`."""
    total = method.updates(config.max_train_steps)
    counts = dict.fromkeys(method.roles, 0)
    for step in range(total):
        counts[method.role_at(step)] += 1
    return {role: Learner(role, parameters[role], config, counts[role]) for role in method.roles}
