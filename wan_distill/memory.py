"""How much memory and arithmetic an update takes: traced on fake tensors, from configuration files alone.

An update of a model with two and with three blocks is run on tensors that have shapes but no data
(`FakeTensorMode`), while a ledger counts every storage and every matrix product. All blocks of a Wan transformer
are alike, so memory and arithmetic are affine in their number and the true depth follows exactly.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from wan_distill.config import Config, UsageError
from wan_distill.denoiser import adapter_parameters, add_adapter
from wan_distill.schedule import sigma_grid

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GB = 1e9
FP32 = 4
ADAM_MOMENTS = 2
USABLE = 0.92  # of a card: the rest is the CUDA context (0.5 GB) and what fragmentation takes
# Bytes per weight of the blocks' matrices. nf4: 4 bits and one fp32 scale per 64 weights (QLoRA, arXiv 2305.14314).
BASE_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + FP32 / 64}


class Ledger(TorchDispatchMode):
    """Counts, while active, bytes of tensor storage alive (`live`, `peak`) and floating-point operations (`flops`).

    Works on any device and on fake tensors. `held` exist already and are not counted.
    """

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = self.flops = 0
        self._seen = weakref.WeakSet(t.untyped_storage() for t in held)
        self._kept = [t.untyped_storage() for t in held]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())
        self.flops += _operations(func, args, kwargs or {}, result)
        return result

    def _release(self, size: int) -> None:
        self.live -= size


def _operations(func, args, kwargs, result) -> int:
    """Floating-point operations of one call; only matrix products and attention count."""
    name = func._overloadpacket.__name__
    if name.startswith("_scaled_dot_product"):
        backward = name.endswith("_backward")
        query, key = args[1:3] if backward else args[:2]
        forward = 4 * math.prod(query.shape) * key.shape[-2]  # Q K^T and P V, 2 operations a multiply-add
        return forward * 5 // 2 if backward else forward  # five products instead of two (FlashAttention-2, sec. 3)
    formula = flop_registry.get(func._overloadpacket)
    return formula(*args, **kwargs, out_val=result) if formula else 0


@dataclass(frozen=True)
class Shape:
    """Everything that the cost of an update depends on: sizes of the transformer, the clip and the adapters."""

    transformer: tuple
    latents: tuple[int, int, int, int]
    batch: int
    text: int
    dtype: torch.dtype
    rank: int
    layers: tuple[str, ...]
    roles: int
    checkpointing: bool
    expand_timesteps: bool
    whole: bool = False
    """all weights are trained, instead of adapters on a frozen base (--student_layers)"""

    @property
    def latent_values(self) -> int:
        """Numbers in the latents of one sample."""
        return math.prod(self.latents)

    @property
    def tokens(self) -> int:
        """Patches of one sample."""
        patch = dict(self.transformer)["patch_size"]
        return math.prod(size // p for size, p in zip(self.latents[1:], patch, strict=True))


@dataclass(frozen=True)
class Trace:
    """Cost of one update of `Shape`: bytes beyond what is always resident, and operations."""

    parameters: int
    matrices: int
    """of `parameters`, those in the blocks' linear layers: what quantisation shrinks"""
    base_bytes: int
    adapter: int
    """trainable parameters of one role"""
    activations: int
    """peak over forward and backward, gradients included"""
    graph: int
    """held between forward and backward"""
    evaluation: int
    """peak of a forward without gradient"""
    forward_flops: int
    update_flops: int

    def extended(self, other: Trace, more: int) -> Trace:
        """With `other` one block deeper than this: the trace of a model `more` blocks deeper."""
        return Trace(*(a + more * (b - a) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@functools.lru_cache(maxsize=64)
def trace(shape: Shape) -> Trace:
    """The cost of one forward and backward of the full-depth model, in about a second whatever its size."""
    depth = dict(shape.transformer)["num_layers"]
    if depth <= 3:
        return _trace(shape, depth)
    return _trace(shape, 2).extended(_trace(shape, 3), depth - 2)


def _trace(shape: Shape, depth: int) -> Trace:
    settings = dict(shape.transformer) | {"num_layers": depth}
    with torch.device("meta"):
        model = WanTransformer3DModel(**settings).requires_grad_(False)
    for role in range(0 if shape.whole else shape.roles):
        add_adapter(model, f"role{role}", rank=shape.rank, alpha=shape.rank, layers=shape.layers, seed=0)
    matrices = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, nn.Linear) and m.weight.ndim == 2)
    matrices -= shape.roles * sum(p.numel() for p in adapter_parameters(model, "role0").values())
    model.requires_grad_(True) if shape.whole else None
    if shape.roles > 1:
        model.set_adapter("role0")
    if shape.checkpointing:
        model.enable_gradient_checkpointing()
    with FakeTensorMode():
        _give_storage(model, torch.float32 if shape.whole else shape.dtype)
        base = [p for name, p in model.named_parameters() if ".lora_" not in name]
        learned = base if shape.whole else list(adapter_parameters(model, "role0").values())
        held = [*model.parameters(), *model.buffers()]
        x = torch.zeros(shape.batch, *shape.latents)
        time_shape = (shape.batch, shape.tokens) if shape.expand_timesteps else (shape.batch,)
        prompt = torch.zeros(shape.batch, shape.text, settings["text_dim"], dtype=shape.dtype)
        inputs = (x.to(model.dtype), torch.zeros(time_shape), prompt)
        autocast = functools.partial(torch.autocast, "cpu", shape.dtype, enabled=shape.dtype != torch.float32)
        with Ledger(held) as evaluation, torch.no_grad(), autocast():
            model(*inputs, return_dict=False)
        with Ledger(held) as update, autocast():
            velocity = model(*inputs, return_dict=False)[0].float()
            graph = update.live
            (velocity - x).square().mean().backward()
    return Trace(
        parameters=sum(p.numel() for p in base), matrices=matrices,
        base_bytes=sum(p.numel() * p.element_size() for p in base),
        adapter=sum(p.numel() for p in learned),
        activations=update.peak, graph=graph, evaluation=evaluation.peak, forward_flops=evaluation.flops,
        update_flops=update.flops)


def _give_storage(model: nn.Module, dtype: torch.dtype) -> None:
    """Moves a meta-device model to (fake) memory, in the dtypes that `from_pretrained` would give it."""
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if p is not None:
                parts = f"{path}.{name}".split(".")
                exact = "lora_A" in parts or "lora_B" in parts or set(parts) & set(model._keep_in_fp32_modules)
                module._parameters[name] = nn.Parameter(
                    torch.zeros(p.shape, dtype=torch.float32 if exact else dtype), requires_grad=p.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)


# ------------------------------------------------------------------------------------------------- a run's estimate


@dataclass(frozen=True)
class Estimate:
    """Predicted bytes by kind while one expert trains, and operations of one update."""

    trace: Trace
    base: float
    adapters: float
    optimizer: float
    average: float
    activations: float

    @property
    def peak(self) -> float:
        return self.base + self.adapters + self.optimizer + self.average + self.activations


    def by_kind(self) -> dict[str, float]:
        """Bytes by kind, in the order they are made."""
        kinds = {"base": self.base, "adapters": self.adapters, "optimizer": self.optimizer, "average": self.average,
                 "activations": self.activations}
        return {name: size for name, size in kinds.items() if size}


def arithmetic(config: Config, info, cost: Trace) -> tuple[float, dict[str, tuple[float, int]]]:
    """(operations to solve what is stored, role -> (operations of one update, updates an expert)).

    A `dmd` rollout leaves at a uniformly drawn one of the expert's n steps: (n + 1) / 2 evaluations on average, the
    last of them with gradient on the student's turn, where the guided teacher (or the score of its samples) and the
    critic then score it.
    """
    micro, updates = config.gradient_accumulation_steps, config.max_train_steps
    forward, update = cost.forward_flops * micro, cost.update_flops * micro
    guided = sum(2 if g != 1 else 1 for g in (config.guidance_scale, config.guidance_scale_2)) / 2
    solve = config.num_trajectories / config.train_batch_size * cost.forward_flops * config.teacher_steps * guided
    solve *= 1 - solved_before(config, info)
    if config.method == "trajectory":
        return solve, {"student": (update, updates)}
    if config.method == "consistency":  # the guided teacher's step, and the student's own end point
        return solve, {"student": (update + (guided + 1) * forward, updates)}
    steps = config.grid_steps / len(info.experts)
    diversity = config.diversity_weight > 0
    sampled = "real_score" in config.roles
    judged = (1 if sampled else guided) + 1
    student = update * (1 + diversity / len(info.experts)) + ((steps - 1) / 2 + judged) * forward
    score, times = update * config.score_draws, config.critic_warmup_steps + config.critic_updates * updates
    costs = {"student": (student, updates), "fake_score": (score + (steps + 1) / 2 * forward, times)}
    if sampled:
        return solve, costs | {"real_score": (score, times)}
    return solve * _anchor_share(config) * diversity, costs


def solved_before(config: Config, info) -> float:
    """The part of this run's trajectories that the one named by `--init_student_from` has, going by their size."""
    if config.init_student_from is None:
        return 0.0
    files = (Path(config.init_student_from) / "trajectories").glob("*/*.safetensors")
    found = sum(file.stat().st_size for file in files)
    return min(1.0, found / (FP32 * config.num_trajectories * config.grid_steps * math.prod(info.latent_shape(config))))


def _anchor_share(config: Config) -> float:
    """The part of the teacher's steps above the student's second sigma, where its anchors for diversity lie."""
    grid = sigma_grid(config.teacher_steps, config.teacher_shift)
    return sum(s > config.sigmas()[1] for s in grid) / config.teacher_steps


def shape_of(config: Config, info) -> Shape:
    """The Shape of this run's updates; `info` is a `TeacherInfo`."""
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in info.transformer.items() if not k.startswith("_")}
    known["num_layers"] = config.student_layers or known["num_layers"]
    return Shape(
        transformer=tuple(sorted(known.items())), latents=info.latent_shape(config), batch=config.train_batch_size,
        text=config.max_sequence_length, dtype=DTYPES[config.mixed_precision], rank=config.rank,
        layers=config.lora_layers, roles=len(config.roles),
        checkpointing=bool(config.gradient_checkpointing), expand_timesteps=info.expand_timesteps,
        whole=config.student_layers is not None)


def estimate(config: Config, info, base_precision: str = "bf16") -> Estimate:
    """Memory of training one expert with these settings."""
    cost = trace(shape_of(config, info))
    base, spread_out = 0 if config.student_layers else cost.base_bytes, 0
    if base_precision in BASE_BYTES or config.offload:
        full = DTYPES[config.mixed_precision].itemsize
        base -= cost.matrices * (full - (0 if config.offload else BASE_BYTES[base_precision]))
        widths = info.transformer["num_attention_heads"] * info.transformer["attention_head_dim"]
        spread_out = full * widths * info.transformer["ffn_dim"]  # one matrix at a time, for use
    roles = config.roles
    one = FP32 * cost.adapter
    activations = _activations(config, info, cost)
    if config.shard:
        base /= int(os.environ.get("WORLD_SIZE", 1))
    if config.context_parallel:
        activations /= int(os.environ.get("WORLD_SIZE", 1))
    moments = len(roles) * ADAM_MOMENTS * one / (FP32 if config.use_8bit_adam else 1)
    return Estimate(cost, base, len(roles) * one, moments, one if config.ema_decay > 0 else 0, activations + spread_out)


def _activations(config: Config, info, cost: Trace) -> int:
    """The largest of what the roles' updates need beyond what is always resident."""
    if config.method != "dmd":
        return cost.activations
    # Student: the guided teacher (two evaluations in one) or the score of its samples is asked while the graph is
    # held, and the diversity loss adds a second graph. Critic: several draws make one larger batch. (methods/dmd.py)
    asked = 1 if "real_score" in config.roles else 2
    second_graph = cost.graph if config.diversity_weight else 0
    draws = dataclasses.replace(config, train_batch_size=config.train_batch_size * config.score_draws)
    return max(cost.activations + second_graph, cost.graph + asked * cost.evaluation,
               trace(shape_of(draws, info)).activations)


@contextmanager
def explain_out_of_memory(config: Config, info, phase: str) -> Iterator[None]:
    """Turns CUDA's out-of-memory error into a UsageError: peak, phase, what was resident, what to try next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        need = estimate(config, info, config.base_precision)
        kinds = ", ".join(f"{name} {size / GB:.1f}" for name, size in need.by_kind().items())
        peak = f"{torch.cuda.max_memory_allocated() / GB:.1f} GB" if torch.cuda.is_available() else "unknown"
        tried = "; ".join(f"{flags} saves about {saved / GB:.1f} GB" for saved, flags in savings(config, info, need))
        raise UsageError(
            f"out of GPU memory while {phase} (peak {peak}; an update needs about {need.peak / GB:.1f} GB: {kinds}); "
            f"{tried or 'choose a smaller clip: --height, --width'}") from error


def savings(config: Config, info, need: Estimate) -> list[tuple[float, str]]:
    """(bytes saved, flags) of each single change that lowers the predicted peak, the largest saving first."""
    shorter = max(1, (config.num_frames - 1) // 8 * 4 + 1)
    changes = [dict(num_frames=shorter), dict(gradient_checkpointing=True), dict(train_batch_size=1),
               dict(use_8bit_adam=True)]
    if config.student_layers is None:
        changes += [dict(base_precision="fp8"), dict(base_precision="nf4"), dict(offload=True)]
    if config.method == "dmd":
        changes += [dict(score_draws=1), dict(diversity_weight=0.0), dict(real_score="guided")]
    found = []
    for change in changes:
        changed = dataclasses.replace(config, **change)
        saved = need.peak - estimate(changed, info, changed.base_precision).peak
        flags = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())
        found.append((saved, flags))
    return sorted((f for f in found if f[0] > 0.01 * need.peak), reverse=True)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of a large square matrix product on `device`: what the hardware gives at best."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    product, count = a @ a, 0
    float(product[0, 0])  # waits for the device
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        for _ in range(8):
            product = a @ a
        float(product[0, 0])
        count += 8
    return 2 * size**3 * count / elapsed
