"""Why a checkpoint's tensors have other names or dtypes than the model's, and what helps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
QUANTISED = "give the bf16 weights; --base_precision quantises them here"
BACK = "save the model without it, or take it off the names"
ONE_CHECKPOINT = "give the weights and the config.json of one checkpoint"


class Kind(NamedTuple):
    """What names show (a pattern searched for in each), and what helps."""

    pattern: str
    reason: str
    remedy: str


# The first that fits is told, so what explains most comes first.
KINDS = (
    Kind(
        r"\.scale_weight$|\.scale_input$|\.weight_scale$|\.input_scale$|(^|\.)scaled_fp8$",
        "scaled fp8 weights, as ComfyUI has them",
        "give the bf16 weights; --base_precision fp8 quantises them here",
    ),
    Kind(
        r"\.absmax$|\.quant_map$|\.quant_state\.|\.SCB$|\.qweight$|\.qzeros$",
        "weights that are quantised already",
        QUANTISED,
    ),
    Kind(
        r"(^|\.)self_attn\.[qkvo]\.|(^|\.)cross_attn\.[qkvo]\.",
        "Wan's original names, as ComfyUI has them too",
        "give the repository whose name ends in -Diffusers, or convert the weights to its layout",
    ),
    Kind(
        r"\.base_layer\.|\.lora_(A|B|down|up)\.",
        "LoRA adapters that are not merged",
        "merge them (fuse_lora, unload_lora) and save the model again",
    ),
    Kind(r"(^|\.)_orig_mod\.", "names of a compiled model (_orig_mod.)", BACK),
    Kind(
        r"(^|\.)_fsdp_wrapped_module\.|(^|\.)_checkpoint_wrapped_module\.",
        "names of a wrapped model (FSDP or checkpointing)",
        BACK,
    ),
)


def explain_codes(
    config: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str] | None:
    """(what shows that weights are quantised, what helps); None where nothing does.

    Args:
        config: the config.json beside them.
        header: that of a safetensors file. Loaders turn integers into floats without their scales.
    """
    whole = next((name for name in sorted(header) if header[name]["dtype"] not in FLOATS), None)
    if whole is not None:
        return f"stores {whole} as {header[whole]['dtype']}, which is no float", QUANTISED
    if config.get("quantization_config"):
        return "was quantised (quantization_config in its config.json)", QUANTISED
    return None


def explain_names(stored: Iterable[str], wanted: Iterable[str]) -> tuple[str, str] | None:
    """(what the names show, what helps) where tensors `wanted` are not among those `stored`; None
    where the names show nothing.
    """
    stored, wanted = set(stored), set(wanted)
    if wanted <= stored:
        return None
    for kind in KINDS:
        name = next((n for n in sorted(stored - wanted) if re.search(kind.pattern, n)), None)
        if name is not None:
            return f"holds {kind.reason}, {name} first", kind.remedy
    some = min(wanted - stored)
    for name in sorted(stored):
        if name.endswith(f".{some}"):
            prefix = name.removesuffix(some)
            return f"holds names that begin with {prefix} (of a wrapped model)", BACK
    return None
