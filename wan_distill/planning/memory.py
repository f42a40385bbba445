"""Predicted memory of training one expert, by kind."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from wan_distill.errors import UsageError, one_line
from wan_distill.planning.decoding import decoding_bytes
from wan_distill.planning.trace import Shape, Trace, trace
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import recipe_of
from wan_distill.settings.scale import processes, processes_here
from wan_distill.system.runtime import DTYPES

FP32 = 4
SHOWN = 200  # characters of a library's message
ADAM_MOMENTS = 2
# Bytes per weight of the blocks' matrices. nf4: 4 bits and one fp32 scale per 64 weights (QLoRA,
# arXiv 2305.14314).
BASE_BYTES = {"fp8": 1.0, "int8": 1.0, "nf4": 0.5 + FP32 / 64}


@dataclass(frozen=True)
class Estimate:
    """Predicted bytes by kind while one expert trains."""

    trace: Trace
    base: float
    adapters: float
    optimizer: float
    average: float
    activations: float

    @property
    def peak(self) -> float:
        return sum(self.by_kind().values())

    def by_kind(self) -> dict[str, float]:
        """Bytes by kind, in the order in which they are allocated."""
        kinds = {
            "base": self.base,
            "adapters": self.adapters,
            "optimizer": self.optimizer,
            "average": self.average,
            "activations": self.activations,
        }
        return {name: size for name, size in kinds.items() if size}


def shape_of(config: Config, info: TeacherInfo) -> Shape:
    """The Shape of this run's updates."""
    sizes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in info.transformer.items()
        if not name.startswith("_") and not isinstance(value, dict)
    }
    sizes["num_layers"] = config.student_layers or sizes["num_layers"]
    return Shape(
        transformer=tuple(sorted(sizes.items())),
        latents=info.latent_shape(config),
        batch=config.train_batch_size,
        text=config.max_sequence_length,
        dtype=DTYPES[config.mixed_precision],
        rank=config.rank,
        layers=config.lora_layers,
        checkpointing=config.gradient_checkpointing,
        keep_attention=config.gradient_checkpointing and config.keep_attention,
        expand_timesteps=info.expand_timesteps,
        whole=config.whole_student,
    )


def teacher_trace(config: Config, info: TeacherInfo) -> Trace:
    """The cost of the teacher itself: a student of `--student_layers` has fewer blocks."""
    return trace(shape_of(dataclasses.replace(config, student_layers=None), info))


def estimate(config: Config, info: TeacherInfo) -> Estimate:
    """Memory of training one expert with these settings. Raises UsageError where the teacher's
    configuration describes networks that cannot compute such clips.
    """
    try:
        cost = trace(shape_of(config, info))
        decoding = decoding_bytes(config, info)
    except Exception as error:  # wrong values make networks fail in any way
        raise UsageError(
            f"--teacher_path {info.source}: the config.json of its transformer or VAE describes "
            f"none that computes such clips ({one_line(error)[:SHOWN]}); download it again"
        ) from error
    count = processes(config)
    base, unpacked = _base(config, info, cost)
    if config.shard:
        base /= count
    activations: float = _activations(config, info, cost)
    if config.context_parallel:
        activations /= count
    activations += unpacked
    if config.monitor_steps or config.validation_steps:  # between updates, beside the expert
        activations = max(activations, decoding)
    roles = len(recipe_of(config).roles(config))
    adapter = FP32 * cost.adapter
    moments = roles * moments_of(config) * adapter
    return Estimate(
        trace=cost,
        base=base,
        adapters=roles * adapter,
        optimizer=moments,
        average=adapter if config.ema_decay > 0 else 0,
        activations=activations,
    )


def moments_of(config: Config) -> float:
    """Bytes of the optimizer's moments for each byte of a float32 adapter."""
    if config.use_8bit_adam:
        return ADAM_MOMENTS / FP32
    return 1 if config.optimizer == "muon" else ADAM_MOMENTS


def _base(config: Config, info: TeacherInfo, cost: Trace) -> tuple[float, float]:
    """Bytes of the frozen base on the device, and of what comes there for use: a matrix that is
    unpacked and, with --offload, two blocks.
    """
    if config.whole_student:
        return 0, 0
    if config.base_precision not in BASE_BYTES and not config.offload:
        return cost.base_bytes, 0
    full = DTYPES[config.mixed_precision].itemsize
    item = BASE_BYTES.get(config.base_precision, full)
    stored = 0 if config.offload else item
    width = info.transformer["num_attention_heads"] * info.transformer["attention_head_dim"]
    unpacked = full * width * info.transformer["ffn_dim"]
    if config.offload and config.gradient_checkpointing:
        blocks = info.transformer["num_layers"]
        unpacked += min(2, blocks) * item * cost.matrices / blocks
    return cost.base_bytes - cost.matrices * (full - stored), unpacked


def _activations(config: Config, info: TeacherInfo, cost: Trace) -> int:
    """The largest of what the roles' updates need beyond what is always resident.

    One graph at a time (`Method.losses`): while it is held, a role may ask others for evaluations.
    """
    costs = (recipe_of(config).costs(config, expert) for expert in config.experts)
    batched = max(role.batched for roles in costs for role in roles.values())
    return max(cost.activations, cost.graph + batched * cost.evaluation)


def host_needs(config: Config, info: TeacherInfo, cost: Trace) -> dict[str, float]:
    """Bytes of one machine's own memory, by what takes them, where another device computes. Files
    are mapped, and shards pass through one by one.
    """
    needs = {"while the text encoder loads": _encoder_bytes(config, info)}
    if config.offload:
        item = BASE_BYTES.get(config.base_precision, DTYPES[config.mixed_precision].itemsize)
        needs["while an expert trains"] = processes_here(config) * item * cost.matrices
    return {what: size for what, size in needs.items() if size}


def _encoder_bytes(config: Config, info: TeacherInfo) -> float:
    """Of the text encoder in the run's dtype, by its configuration; 0 without one."""
    file = info.folder / "text_encoder" / "config.json"
    if not file.exists():
        return 0.0
    settings = json.loads(file.read_text(encoding="utf-8"))
    width, heads = settings.get("d_model", 0), settings.get("num_heads", 0)
    block = 4 * width * heads * settings.get("d_kv", 0) + 3 * width * settings.get("d_ff", 0)
    weights = settings.get("vocab_size", 0) * width + settings.get("num_layers", 0) * block
    return float(DTYPES[config.mixed_precision].itemsize * weights)
