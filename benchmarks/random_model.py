"""Wan models of true shape with random weights and random inputs; used by step.py."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from wan_distill.data.embeddings import PromptEmbeddings
from wan_distill.data.run import Run
from wan_distill.data.samples import Inputs, SampleStore
from wan_distill.errors import NonFiniteError
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.loading import Teacher, make_ready
from wan_distill.model.offload import BlockFetcher, HostPool
from wan_distill.model.quantise import StoredLinear, store_matrices
from wan_distill.planning.memory import shape_of
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.recipes import Role, recipe_of
from wan_distill.settings.sample_specs import SampleSpec
from wan_distill.system.runtime import Runtime
from wan_distill.training.metrics import Metrics
from wan_distill.training.resume import Progress


def wan(heads: int, width: int, ffn: int, layers: int, text: int, frequencies: int) -> dict:
    """The `config.json` of a Wan transformer; `width` is that of one attention head."""
    return dict(
        in_channels=16,
        out_channels=16,
        patch_size=[1, 2, 2],
        num_attention_heads=heads,
        attention_head_dim=width,
        ffn_dim=ffn,
        num_layers=layers,
        text_dim=text,
        freq_dim=frequencies,
    )


MODELS: dict[str, dict[str, Any]] = {
    "tiny": wan(heads=4, width=32, ffn=256, layers=3, text=64, frequencies=64),
    "middle": wan(heads=6, width=64, ffn=1536, layers=6, text=128, frequencies=256),
    "1.3b": wan(heads=12, width=128, ffn=8960, layers=30, text=4096, frequencies=256),
    "a14b": wan(heads=40, width=128, ffn=13824, layers=40, text=4096, frequencies=256),
}
SMALL_CLIP = dict(height=64, width=64, num_frames=17, max_sequence_length=16)
# The middle model's rank is to its width about what 64 is to A14B's 5120.
CLIP: dict[str, dict[str, Any]] = {
    "tiny": SMALL_CLIP | dict(train_batch_size=8),
    "middle": SMALL_CLIP | dict(train_batch_size=10, rank=8),
}


def random_info(model: str, folder: Path) -> TeacherInfo:
    """A two-expert teacher without files, of one of MODELS."""
    return TeacherInfo(
        source="random",
        folder=folder,
        name="random",
        embedded=False,
        boundary_ratio=0.875,
        expand_timesteps=False,
        transformer=MODELS[model],
        vae={},
    )


def random_expert(config: Config, info: TeacherInfo, runtime: Runtime) -> WanTransformer3DModel:
    """A frozen transformer with random weights, made on the device as `Teacher.load_expert` loads
    one.
    """
    with init_empty_weights(include_buffers=False):
        model = WanTransformer3DModel(**dict(shape_of(config, info).transformer))
    stored: list[list[StoredLinear]] = []
    if config.base_precision != "bf16" or config.offload:
        stored = store_matrices(model, config.base_precision, runtime.dtype, config.offload)
    pool = HostPool(sum(layer.size for layers in stored for layer in layers))
    exact = set(model._keep_in_fp32_modules)
    for path, module in model.named_modules():
        for name, p in module._parameters.items():
            if isinstance(module, StoredLinear) and name == "weight":
                shape = (module.out_features, module.in_features)
                module.fill(_random(shape, runtime.dtype, runtime), pool)
            elif p is not None:
                whole = exact & {*path.split("."), name}
                dtype = torch.float32 if whole else runtime.dtype
                value = _random(tuple(p.shape), dtype, runtime)
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(runtime.device))
    if config.offload and config.gradient_checkpointing:
        BlockFetcher(model.blocks, stored, runtime.device)
    make_ready(model, config, runtime)
    return model.requires_grad_(False).eval()


def _random(shape: tuple[int, ...], dtype: torch.dtype, runtime: Runtime) -> Tensor:
    return 0.02 * torch.randn(shape, dtype=dtype, device=runtime.device)


class RandomEmbeddings(PromptEmbeddings):
    """Stands in for encoded prompts: random tensors of the right shape, on the device."""

    def __init__(self, config: Config, info: TeacherInfo, device: torch.device):
        super().__init__(Path(config.output_dir), {}, config.max_sequence_length, device)
        self.width = info.transformer["text_dim"]

    def batch(self, prompts: Sequence[str]) -> Tensor:
        return torch.randn(len(prompts), self.length, self.width, device=self.device)


class RandomStore(SampleStore):
    """Stands in for stored samples: random tensors of the right shape, on the device."""

    def __init__(self, run: Run, spec: SampleSpec):
        self.run = run
        self.spec = spec
        self.prompts = run.prompts

    def at(self, rows: Sequence[int], sigmas: Sequence[float]) -> Tensor:
        shape = (len(rows), *self.run.latent_shape)
        return torch.randn(shape, device=self.run.runtime.device)

    def condition(self, rows: Iterable[int]) -> Condition:
        return self.run.condition(self.prompts_of(rows))


def random_inputs(config: Config, info: TeacherInfo, runtime: Runtime) -> Inputs:
    """What the high expert's method reads."""
    embeddings = RandomEmbeddings(config, info, runtime.device)
    run = Run(config, Teacher(info, config, runtime), embeddings, ("a prompt",), runtime)
    specs = recipe_of(config).samples(config, "high", distilled=False)
    return Inputs(run, {purpose: RandomStore(run, spec) for purpose, spec in specs.items()})


class NoCheckpoints(Progress):
    """Takes an update's metrics; stores nothing, and raises where an update fails."""

    def __init__(self, metrics: Metrics):
        self.metrics = metrics

    def skip_or_stop(
        self, step: int, role: Role, denoiser: Denoiser, error: NonFiniteError
    ) -> None:
        raise error
