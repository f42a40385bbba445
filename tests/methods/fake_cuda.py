"""Updates of A14B's width on fake CUDA tensors: no GPU, no memory, CUDA's own rules for dtypes.

    python tests/methods/fake_cuda.py CASES     a JSON list of cases; prints one result per line

A case is a name, settings, and optionally a fault that is put in; its result is null, or what went
wrong. It runs in a process of its own, since it makes torch believe in a GPU.

What is not torch's own: emulated_card.py. What cannot be had: `--shard`, whose FSDP2 needs more of
streams, and kernels, so `--compile` and 8-bit Adam.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent), str(HERE.parent / "planning")]


import emulated_card

emulated_card.load_library()

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from wan_shapes import A14B, A14B_I2V, config_of, teacher_of

import train_distillation
from wan_distill.data.run import Run
from wan_distill.maths import flow
from wan_distill.maths.sigmas import Expert
from wan_distill.methods import make_method
from wan_distill.model import loading
from wan_distill.model.adapters import adapter_parameters, make_roles
from wan_distill.model.checkpointing import recompute_blocks
from wan_distill.model.loading import Teacher
from wan_distill.model.offload import BlockFetcher
from wan_distill.model.quantise import StoredLinear, store_matrices
from wan_distill.planning.memory import shape_of
from wan_distill.settings.config import Config
from wan_distill.system.runtime import Runtime
from wan_distill.training.learner import make_learners
from wan_distill.training.rehearsal import first_step, random_inputs

CUDA = torch.device("cuda", 0)
OURS = str(HERE.parent.parent)


class Card(TorchDispatchMode):
    """Tensors on the CPU are real, those on the card are fake; `strict`, the host never waits.

    It waits where values come back, and where a copy to the card does not say `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.strict = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        to = kwargs.get("device")
        on_card = to is not None and torch.device(to).type == "cuda"
        if not on_card and not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        with self.fake:
            result = func(*args, **kwargs)
        if self.strict:
            self._check(func, args, kwargs, tensors, result)
        return result

    def _check(
        self, func: Any, args: tuple[Any, ...], kwargs: Any, tensors: list[Tensor], result: Any
    ) -> None:
        places = {t.device.type for t in tensors}
        gives = {t.device.type for t in tree_leaves(result) if isinstance(t, Tensor)}
        if "cuda" in places and "cpu" in gives:
            raise AssertionError(f"{func}: the host waits for values of the card")
        if func._overloadpacket.__name__ in ("_to_copy", "copy_") and len(places | gives) > 1:
            told = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            assert told, f"{func}: the host waits for a copy to the card"


class Embeddings:
    """Stands in for encoded prompts."""

    def __init__(self, config: Config, width: int):
        self.shape = (config.max_sequence_length, width)
        self.dtype = torch.float32

    def batch(self, prompts: Sequence[str]) -> Tensor:
        return torch.empty(len(prompts), *self.shape, device=CUDA)


class Pictures:
    """Stands in for the latents of first frames, behind their mask."""

    def __init__(self, *shape: int):
        self.shape = shape

    def batch(self, prompts: Sequence[Any]) -> Tensor:
        return torch.empty(len(prompts), *self.shape, device=CUDA)


def expert(config: Config, run: Run, name: Expert) -> WanTransformer3DModel:
    """A transformer on the card with its adapters, as `Teacher.load_expert` and `make_roles` give
    it, without reading files.
    """
    dtype = run.runtime.dtype
    with torch.device("meta"):
        model = WanTransformer3DModel(**dict(shape_of(config, run.info).transformer))
    model.requires_grad_(False).eval()
    layers: list[list[StoredLinear]] = []
    if config.base_precision != "bf16" or config.offload:
        layers = store_matrices(model, config.base_precision, dtype, config.offload)
    make_roles(model, make_method(config, name).roles, config, name)
    in_float32 = {"lora_A", "lora_B", *model._keep_in_fp32_modules}
    for path, module in model.named_modules():
        for leaf, p in module._parameters.items():
            if isinstance(module, StoredLinear) and leaf == "weight":
                shape = (module.out_features, module.in_features)
                module.fill(torch.empty(shape, dtype=dtype, device=CUDA))
            elif p is not None:
                exact = in_float32 & {*path.split("."), leaf}
                value = torch.empty(p.shape, dtype=torch.float32 if exact else dtype, device=CUDA)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=p.requires_grad)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[leaf] = torch.empty(buffer.shape, dtype=buffer.dtype, device=CUDA)
    if config.offload and config.gradient_checkpointing:
        BlockFetcher(model.blocks, layers, CUDA)
    loading.keep_dtype_in_norms(model)
    return model


class NoProgress:
    """Takes an update's metrics; raises where an update fails."""

    class metrics:
        @staticmethod
        def add(**values: Any) -> None: ...

    @staticmethod
    def skip_or_stop(*given: Any) -> None:
        raise given[-1]


def run_case(settings: dict[str, Any], fault: str | None, folder: Path) -> None:
    """One update of each role of each expert."""
    blocks = settings.pop("blocks", 2)
    picture = settings.pop("picture", False)
    shapes = A14B_I2V if picture else A14B
    # As for the whole A14B; defaults for models of so few blocks are other ones.
    whole: dict[str, Any] = dict(mixed_precision="bf16", gradient_checkpointing=True)
    settings = whole | dict(train_batch_size=1, gradient_accumulation_steps=1) | settings
    info = teacher_of(shapes | dict(num_layers=blocks), folder, takes_picture=picture)
    config = config_of(info, output_dir=str(folder / "out"), **settings)
    runtime = Runtime(config)
    runtime.device = CUDA
    embeddings: Any = Embeddings(config, info.transformer["text_dim"])
    teacher = Teacher(info, config, runtime)
    channels, *sizes = info.latent_shape(config)
    given = info.transformer["in_channels"] - channels
    pictures: Any = Pictures(given, *sizes) if given else None
    run = Run(config, teacher, embeddings, ("a prompt",), runtime, pictures)
    card = Card()
    with card, faulty(fault):
        for name in config.experts:
            transformer = expert(config, run, name)
            recompute_blocks(transformer, config)
            method = make_method(config, name)
            parameters = {role: adapter_parameters(transformer, role) for role in method.roles}
            learners = make_learners(method, parameters, config)
            denoiser, inputs = run.denoiser(name, transformer), random_inputs(run, name)
            progress: Any = NoProgress()
            for step, role in sorted((first_step(method, r), r) for r in method.roles):
                with values_read() as counted:
                    card.strict = True
                    train_distillation.update(
                        run, step, method, inputs, denoiser, learners[role], progress
                    )
                    card.strict = False
                assert counted == [1], f"the host waits {len(counted)} times in an update"


@contextmanager
def values_read() -> Any:
    """The one wait of an update, that for loss and gradient, gives numbers; the list that comes
    back counts it. All others raise.
    """
    counted: list[int] = []
    original = FakeTensor.tolist

    def tolist(self: FakeTensor) -> Any:
        counted.append(1)
        return [1.0] * self.numel()

    FakeTensor.tolist = tolist  # type: ignore[method-assign]
    try:
        yield counted
    finally:
        FakeTensor.tolist = original  # type: ignore[method-assign]


def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> Tensor:
    """torch's, which under autocast would hide inputs of different dtypes."""
    for tensor in (query, key, value):
        assert tensor.device.type == "cuda", "attention gets a tensor of the host"
        assert tensor.dtype == torch.bfloat16, f"attention gets {tensor.dtype}"
    return plain_attention(query, key, value, *rest, **named)


plain_attention = functional.scaled_dot_product_attention


@contextmanager
def faulty(fault: str | None) -> Any:
    """Puts a fault in, to see that it is found."""
    kept, kept_norms = flow.x0_from_velocity, loading.keep_dtype_in_norms
    if fault == "item":
        flow.x0_from_velocity = lambda x, v, s: kept(x, v * v.sum().item(), s)
    elif fault == "cpu":
        flow.x0_from_velocity = lambda x, v, s: kept(x, v + v.mean().cpu(), s)
    elif fault == "copy":
        flow.x0_from_velocity = lambda x, v, s: kept(x, v + torch.ones(1).to(x.device), s)
    elif fault == "device":
        flow.x0_from_velocity = lambda x, v, s: kept(x, v + torch.ones(v.shape), s)
    elif fault == "norms":
        loading.keep_dtype_in_norms = lambda model: None
    else:
        assert fault is None, fault
    try:
        yield
    finally:
        flow.x0_from_velocity, loading.keep_dtype_in_norms = kept, kept_norms


def main() -> None:
    emulated_card.be_a_card()
    Tensor.record_stream = lambda self, stream: None
    functional.scaled_dot_product_attention = attention
    warnings.simplefilter("ignore")
    for name, settings, fault in json.loads(sys.argv[1]):
        wrong = None
        with tempfile.TemporaryDirectory() as folder:
            try:
                run_case(settings, fault, Path(folder))
            except Exception as error:
                frames = traceback.extract_tb(error.__traceback__)
                ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if OURS in f.filename]
                wrong = f"{type(error).__name__}: {error} ({' > '.join(ours)})"
        print(json.dumps([name, wrong]), flush=True)


if __name__ == "__main__":
    main()
