"""One student in the layouts of other programs, as these write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wan_distill.settings.lora_names import TRAINED, TRAINED_OUTSIDE

Stem = str
Products = dict[Stem, tuple[Tensor, Tensor, float]]
"""Our stem, `blocks.0.self_attn.q` -> (down, up, alpha)."""
DIFFUSERS = {original: name for name, original in (TRAINED | TRAINED_OUTSIDE).items()}
DOWN = ".lora_down.weight"


def products_of(file: Path) -> Products:
    lora = load_file(file)
    stems = sorted({name.removesuffix(DOWN) for name in lora if name.endswith(DOWN)})
    return {
        stem.removeprefix("diffusion_model."): (
            lora[f"{stem}{DOWN}"],
            lora[f"{stem}.lora_up.weight"],
            float(lora.get(f"{stem}.alpha", len(lora[f"{stem}{DOWN}"]))),
        )
        for stem in stems
    }


def diffusers_name(stem: Stem) -> str:
    if not stem.startswith("blocks."):
        return DIFFUSERS[stem]
    _, block, layer = stem.split(".", 2)
    return f"blocks.{block}.{DIFFUSERS[layer]}"


def lightning(products: Products) -> dict[str, Tensor]:
    lora = {}
    for stem, (a, b, alpha) in products.items():
        lora[f"diffusion_model.{stem}.lora_down.weight"] = a
        lora[f"diffusion_model.{stem}.lora_up.weight"] = b
        lora[f"diffusion_model.{stem}.alpha"] = torch.tensor(alpha)
    return lora


def with_extras(products: Products) -> dict[str, Tensor]:
    """LightX2V's further tensors: differences of biases, norms and the head."""
    stem, (_, up, _) = next(iter(products.items()))
    width = up.shape[0]
    return lightning(products) | {
        f"diffusion_model.{stem}.diff_b": torch.full((width,), 0.01),
        "diffusion_model.blocks.0.norm3.diff": torch.zeros(width),
        "diffusion_model.blocks.0.norm3.diff_b": torch.zeros(width),
    }


def kohya(products: Products) -> dict[str, Tensor]:
    lora = {}
    for stem, (a, b, alpha) in products.items():
        name = "lora_unet_" + stem.replace(".", "_")
        lora[f"{name}.lora_down.weight"] = a
        lora[f"{name}.lora_up.weight"] = b
        lora[f"{name}.alpha"] = torch.tensor(alpha)
    return lora


def diffsynth(products: Products) -> dict[str, Tensor]:
    lora = {}
    for stem, (a, b, alpha) in products.items():
        lora[f"{stem}.lora_A.default.weight"] = a
        lora[f"{stem}.lora_B.default.weight"] = b
        lora[f"{stem}.alpha"] = torch.tensor(alpha)
    return lora


def lora_a_under_original_names(products: Products) -> dict[str, Tensor]:
    """Without any alpha, as several trainers write it."""
    lora = {}
    for stem, (a, b, alpha) in products.items():
        lora[f"diffusion_model.{stem}.lora_A.weight"] = a
        lora[f"diffusion_model.{stem}.lora_B.weight"] = b * (alpha / len(a))
    return lora


def peft(products: Products, prefix: str = "transformer.", between: str = "") -> dict[str, Tensor]:
    """Without any alpha: it is 1 per rank, and the product is scaled accordingly."""
    lora = {}
    for stem, (a, b, alpha) in products.items():
        name = f"{prefix}{diffusers_name(stem)}"
        lora[f"{name}.lora_A.{between}weight"] = a
        lora[f"{name}.lora_B.{between}weight"] = b * (alpha / len(a))
    return lora


def unscaled_peft(products: Products) -> dict[str, Tensor]:
    lora = {}
    _, _, of_all = next(iter(products.values()))
    for stem, (a, b, alpha) in products.items():
        lora[f"transformer.{diffusers_name(stem)}.lora_A.weight"] = a
        lora[f"transformer.{diffusers_name(stem)}.lora_B.weight"] = b * (alpha / of_all)
    return lora


def peft_metadata(products: Products) -> dict[str, str]:
    """As diffusers writes it beside unscaled matrices."""
    a, _, alpha = next(iter(products.values()))
    config = {"transformer.r": len(a), "transformer.lora_alpha": alpha}
    return {"lora_adapter_metadata": json.dumps(config)}


LAYOUTS: dict[str, Callable[[Products], dict[str, Tensor]]] = {
    "lightning": lightning,
    "lightning with extras": with_extras,
    "lora_A under the original names": lora_a_under_original_names,
    "kohya": kohya,
    "diffusers": peft,
    "diffusers with metadata": unscaled_peft,
    "base_model": lambda p: peft(p, "base_model.model."),
    "base_model, adapter named": lambda p: peft(p, "base_model.model.", "default."),
    "diffsynth": diffsynth,
}


def write_in(layout: str, source: Path, target: Path) -> Path:
    """Writes the LoRA of `source` (ours) in another layout, without our metadata."""
    products = products_of(source)
    metadata = peft_metadata(products) if "metadata" in layout else None
    target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.clone().contiguous() for k, v in LAYOUTS[layout](products).items()}
    save_file(tensors, target, metadata)
    return target
