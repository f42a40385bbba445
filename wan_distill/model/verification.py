"""Whether a LoRA that was written gives the same student in diffusers and in ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanPipeline, WanTransformer3DModel
from peft.tuners.lora import Linear
from safetensors.torch import load_file
from torch import Tensor, nn

from wan_distill.errors import ExportError, one_line
from wan_distill.settings.lora_names import read_name

ADAPTER = "check"
# diffusers multiplies alpha / rank into a matrix in the file's dtype: bf16 keeps 3 digits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 4e-3}


@torch.no_grad()
def verify_lora(transformer_config: Mapping[str, Any], file: Path) -> float:
    """Loads `file` as diffusers does and as ComfyUI does, and compares what each would add to the
    teacher's matrices.

    No expert is loaded: what a LoRA adds does not depend on the weights beneath it. All arithmetic
    is in float32, since a sum that is rounded to bf16 is 0.003 off.

    Args:
        transformer_config: the content of transformer/config.json.
        file: its matrices may differ by `TOLERANCE` of their norm.

    Returns:
        The largest relative difference of any matrix.

    Raises:
        ExportError: a difference is larger, or a layer of the file is loaded nowhere.
    """
    lora = load_file(file)
    transformer = transformer_without_weights(transformer_config)
    try:
        loaded = WanPipeline.lora_state_dict(str(file.parent), weight_name=file.name)
        transformer.load_lora_adapter(loaded, adapter_name=ADAPTER)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ExportError(
            f"{file}: diffusers cannot load it back ({one_line(error)}); do not use it"
        ) from error
    stems = sorted({name.split(".lora_")[0].removesuffix(".alpha") for name in lora})
    worst = 0.0
    for stem in stems:
        expected = _comfyui_matrix(lora, stem)
        difference = float((_diffusers_matrix(transformer, stem, file) - expected).norm())
        difference /= float(expected.norm().clamp_min(1e-12))
        if not difference <= TOLERANCE[lora[f"{stem}.lora_down.weight"].dtype]:  # also refuses NaN
            raise ExportError(
                f"{file}: loaded back, {stem} differs by {difference:.2g}; do not use it"
            )
        worst = max(worst, difference)
    return worst


def transformer_without_weights(config: Mapping[str, Any]) -> WanTransformer3DModel:
    """A transformer of that shape, in float32, that takes no memory: each weight is a single zero.

    Unlike one on the meta device, it takes adapters that have weights.
    """
    with init_empty_weights(include_buffers=False):
        transformer = WanTransformer3DModel.from_config(dict(config))
    for module in transformer.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            zeros = torch.zeros(()).expand(weight.shape)
            setattr(module, name, nn.Parameter(zeros, requires_grad=False))
    return transformer


def _comfyui_matrix(lora: dict[str, Tensor], stem: str) -> Tensor:
    """alpha / rank * up @ down [out, in]: what is added to the matrix called `stem`. Without an
    alpha ComfyUI multiplies by 1.
    """
    down = lora[f"{stem}.lora_down.weight"].float()
    up = lora[f"{stem}.lora_up.weight"].float()
    alpha = lora.get(f"{stem}.alpha")
    return up @ down * (1.0 if alpha is None else float(alpha) / down.shape[0])


def _diffusers_matrix(transformer: WanTransformer3DModel, stem: str, file: Path) -> Tensor:
    """What the loaded adapter adds to the matrix called `stem`. Raises ExportError if nothing."""
    try:
        name = read_name(f"{stem}.alpha")
        module = None if name is None else transformer.get_submodule(name.module)
    except AttributeError:  # not in this teacher
        module = None
    if not isinstance(module, Linear) or ADAPTER not in module.lora_A:
        raise ExportError(f"{file}: loaded back, {stem} is nowhere; do not use it")
    return module.get_delta_weight(ADAPTER).float()
