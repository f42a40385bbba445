"""What a run needs around the maths: ranks, keyed randomness, signals, optimizers, the moving average."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.config import Config, Halted, Stopped, UsageError
from wan_distill.denoiser import Role, adapter_parameters, add_adapter
from wan_distill.methods import Method
from wan_distill.prune import prune, trainable
from wan_distill.schedule import Expert

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# While the main process encodes prompts or solves the last samples, the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(hours=3)
Named = dict[str, Tensor]


class NonFiniteError(Halted):
    """A loss, gradient, weight or latent is NaN or infinite; raised before anything is spoilt by it."""


def nonfinite_weight(module: torch.nn.Module) -> str | None:
    """The first weight of `module` that is not finite everywhere, by name."""
    return next((name for name, p in module.named_parameters() if not torch.isfinite(p.detach().float()).all()), None)


# ------------------------------------------------------------------------------------------------ keyed randomness


def keyed_seed(*keys) -> int:
    """A 63-bit seed that depends on all of `keys` and on nothing else (not on rank, device or history)."""
    digest = hashlib.sha256(json.dumps(keys).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*keys) -> torch.Generator:
    """A CPU generator seeded by `keys`: the same draws on any device and any number of processes."""
    return torch.Generator().manual_seed(keyed_seed(*keys))


def keyed_noise(shape: tuple[int, ...], *keys) -> Tensor:
    """Standard normal float32 noise of one sample, [C, F, H, W], a function of `keys` alone."""
    return torch.randn(shape, generator=generator(*keys))


@functools.lru_cache(maxsize=8)
def _permutation(size: int, *keys) -> list[int]:
    return torch.randperm(size, generator=generator(*keys)).tolist()


def keyed_order(*keys, position: int, size: int) -> int:
    """The `position`-th element of an endless sequence that visits all `size` elements, shuffled anew each epoch."""
    epoch, offset = divmod(position, size)
    return _permutation(size, *keys, epoch)[offset]


# ----------------------------------------------------------------------------------------------------- the process


def process_state() -> PartialState:
    """Joins the process group where a launcher made one; without an accelerator that is gloo on the CPU."""
    if "WORLD_SIZE" not in os.environ:
        return PartialState()
    # Not told so, accelerate lets every rank of a machine without accelerator believe that it is alone.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)


class Runtime:
    """Ranks, device and stop requests of this process."""

    def __init__(self, config: Config):
        self.config = config
        self.state = process_state()
        self.device = self.state.device
        self.processes = self.state.num_processes
        self.is_main = self.state.is_main_process
        self.sharded = config.shard and self.processes > 1
        self.together = config.context_parallel and self.processes > 1
        # This process' share of the samples: none of its own where all work on each sample together.
        self.rank, self.world = (0, 1) if self.together else (self.state.process_index, self.processes)
        self.joint = self.sharded or self.together
        """whether every forward needs all processes"""
        self.dtype = DTYPES[config.mixed_precision]
        self.signal: int | None = None
        for name in ("SIGTERM", "SIGINT", "SIGBREAK"):  # SIGBREAK is Windows' own
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), self._on_signal)

    def _on_signal(self, number: int, frame) -> None:
        """The first signal asks for a save after the update in flight; a second one ends the process at once."""
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number
        print("\nStopping after this update and saving; once more to stop at once.", file=sys.stderr, flush=True)

    def stop_requested(self) -> bool:
        """Whether any rank was told to stop; all ranks get the same answer."""
        return bool(self.agree(float(self.signal is not None)))

    def stop_here_if_asked(self) -> None:
        """For loops whose finished pieces are on disk already. Raises Stopped after a signal to this process."""
        if self.stop_requested() if self.joint else self.signal is not None:  # joint: all or none
            raise Stopped("Stopped; what is finished is kept. Run the same command to go on.")

    def agree(self, value: float) -> float:
        """The largest `value` over ranks, the same on all of them."""
        if self.processes == 1:
            return value
        largest = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest)

    def looks(self) -> bool:
        """Whether this process samples the student: the main one, but all of them where each forward needs all."""
        return self.is_main or self.joint

    def told_by_main(self, value):
        """What the main process says, where all work together; elsewhere `value` itself."""
        if not self.together:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0)
        return held[0]

    def say(self, *lines: str) -> None:
        """Prints on the main process only."""
        if self.is_main:
            print(*lines, sep="\n", flush=True)

    def autocast(self):
        """bf16/fp16 arithmetic around a low-precision base, whose float32 adapters would otherwise promote it."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def micro_batch(self, step: int, micro: int) -> int:
        """Global index of a micro-batch: the same work is done for any split into processes and accumulation."""
        return (step * self.config.gradient_accumulation_steps + micro) * self.world + self.rank

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Mean gradient over ranks in one all-reduce: data parallelism without wrapping the model.

        With `--context_parallel` the sum: each rank's is that of its own tokens.
        """
        if self.processes == 1:
            return
        gradients = [p.grad for p in parameters]
        flat = torch._utils._flatten_dense_tensors(gradients)
        dist.all_reduce(flat)
        flat /= self.world
        for gradient, mean in zip(gradients, torch._utils._unflatten_dense_tensors(flat, gradients), strict=True):
            gradient.copy_(mean)


# ------------------------------------------------------------------------------------------------- what is learned


class Learner:
    """One role's trainable tensors with their optimizer and, for the student, their moving average."""

    def __init__(self, role: Role, parameters: dict[str, torch.nn.Parameter], config: Config, updates: int):
        self.role = role
        self.parameters = parameters
        self.config = config
        self.updates = updates
        self.done = 0
        self.peak_lr = config.learning_rate if role == "student" else config.fake_score_learning_rate
        self.optimizer = adamw(config)(
            parameters.values(), lr=self.peak_lr, betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay, eps=config.adam_epsilon,
            **({} if config.use_8bit_adam else {"fused": True}))
        self.average = {name: p.detach().clone() for name, p in parameters.items()} if self.averages else {}

    @property
    def averages(self) -> bool:
        return self.role == "student" and self.config.ema_decay > 0

    def learning_rate(self) -> float:
        """Warm-up, then constant or decaying; a pure function of the update, so nothing needs saving."""
        warmup, kind = self.config.lr_warmup_steps, self.config.lr_scheduler
        if kind != "constant" and self.done < warmup:
            return self.peak_lr * (self.done + 1) / warmup
        left = 1 - (self.done - warmup) / max(1, self.updates - warmup)
        factor = {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}.get(kind, 1.0)
        return self.peak_lr * factor

    def update(self, runtime: Runtime, loss: Tensor) -> float:
        """Averages gradients over ranks, checks, clips, steps. Returns the gradient's norm before clipping.

        Raises NonFiniteError, on every rank and with no weight changed, when any rank's `loss` or gradient is not
        finite; the gradients are then gone.
        """
        runtime.average_gradients(self.parameters.values())
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        # The one wait for the device in an update: a bad one must not happen.
        norm, loss = torch.stack([norm.double(), loss.detach().double()]).tolist()
        if runtime.agree(float(not (math.isfinite(norm) and math.isfinite(loss)))):
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteError(f"loss {loss:g}, gradient norm {norm:g}")
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.averages:
            decay = self.config.ema_decay if self.done > self.config.ema_start else 0.0
            torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)
        return norm

    @torch.no_grad()
    def update_norm(self) -> float | None:
        """Norm of the last change of the weights, weight decay aside, as AdamW's moments tell (8-bit ones do not)."""
        if self.config.use_8bit_adam:
            return None
        total = 0.0
        for group in self.optimizer.param_groups:
            (first, second), lr = group["betas"], group["lr"]
            for p in group["params"]:
                if state := self.optimizer.state.get(p):
                    step = float(state["step"])
                    change = state["exp_avg"] / (1 - first**step)
                    change = change / ((state["exp_avg_sq"] / (1 - second**step)).sqrt() + group["eps"])
                    total += float((lr * change).square().sum())
        return math.sqrt(total)

    def exported(self) -> Named:
        """The tensors to ship: the moving average where one is kept."""
        return self.average if self.averages else {name: p.detach() for name, p in self.parameters.items()}

    @contextmanager
    def shipped(self) -> Iterator[None]:
        """Inside, the parameters are those that `exported` would ship."""
        held = {name: p.detach().clone() for name, p in self.parameters.items()} if self.averages else {}
        try:
            for name in held:
                self.parameters[name].data.copy_(self.average[name])
            yield
        finally:
            for name, p in held.items():
                self.parameters[name].data.copy_(p)

    def tensors(self) -> Named:
        """Everything needed to go on, as flat named tensors."""
        saved = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        saved |= {f"average.{name}": p for name, p in self.average.items()}
        for name, p in self.parameters.items():
            saved |= {f"adam.{key}.{name}": torch.as_tensor(value) for key, value in self.optimizer.state[p].items()}
        return saved

    @torch.no_grad()
    def restore(self, saved: Named, done: int) -> None:
        """Puts back what `tensors` gave; KeyError or RuntimeError where it does not fit."""
        self.done = done
        for name, p in self.parameters.items():
            p.copy_(saved[f"weight.{name}"])
        for full, value in saved.items() if done else ():
            if full.startswith("adam."):
                _, key, name = full.split(".", 2)
                p, counts = self.parameters[name], key == "step" and not value.is_floating_point()
                # bitsandbytes counts in an int; torch's fused AdamW wants its count beside the weights
                self.optimizer.state[p][key] = int(value) if counts else value.to(p.device, copy=True)
        if any((("state1" in state) != self.config.use_8bit_adam) for state in self.optimizer.state.values()):
            raise KeyError("--use_8bit_adam: its moments and those of plain AdamW are not the same tensors")
        for name, p in self.average.items():
            p.copy_(saved[f"average.{name}"])


def adamw(config: Config) -> type[torch.optim.Optimizer]:
    """torch's AdamW, or bitsandbytes' with 8-bit moments (arXiv 2110.02861)."""
    if not config.use_8bit_adam:
        return torch.optim.AdamW
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit


def make_roles(transformer: WanTransformer3DModel, method: Method, config: Config,
               expert: Expert) -> dict[Role, dict[str, torch.nn.Parameter]]:
    """Role -> what it trains: an adapter each on the frozen base or, with `--student_layers`, all that is left."""
    if config.student_layers:
        prune(transformer, config.student_layers)
        return {"student": trainable(transformer)}
    for role in method.roles:
        begins_as = "fake_score" if role == "real_score" else role  # the two scores are compared: from one beginning
        add_adapter(transformer, role, rank=config.rank, alpha=config.adapter_alpha(role), layers=config.lora_layers,
                    seed=keyed_seed(config.seed, expert, begins_as))
    return {role: adapter_parameters(transformer, role) for role in method.roles}


def make_learners(method: Method, parameters: dict[Role, dict], config: Config) -> dict[Role, Learner]:
    """A learner for each role of `method`; how often each steps follows from `method.role_at`."""
    total = method.updates(config.max_train_steps)
    counts = {role: 0 for role in method.roles}
    for step in range(total):
        counts[method.role_at(step)] += 1
    return {role: Learner(role, parameters[role], config, counts[role]) for role in method.roles}


def claim(output_dir: Path) -> None:
    """Makes the output folder and shows that it can be written to. Raises UsageError."""
    probe = output_dir / f".writable.{os.getpid()}"  # its own: the processes of one run claim the same folder at once
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--output_dir {output_dir}: cannot be written ({error.strerror}); choose another") from error
