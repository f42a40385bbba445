"""The names of Wan's layers in LoRA files: diffusers', the original ones, and kohya's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, NamedTuple

Part = Literal["down", "up", "alpha", "weight", "bias", "lora_bias"]
"""`down` [rank, in] and `up` [out, rank] are a product; `weight` and `bias` are added as they are;
`lora_bias` is scaled as the product is."""
Layout = Literal["comfyui", "diffusers", "kohya"]
LAYOUTS: tuple[Layout, ...] = ("comfyui", "diffusers", "kohya")

# diffusers -> the original Wan names, of the layers that this tool trains: those of a block, those
# that tell all blocks the noise level (a student works at so few that each can have a change of its
# own), and the last one.
TRAINED = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
OF_A_BLOCK = TRAINED | {
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
}
TRAINED_OUTSIDE = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
}
OUTSIDE = TRAINED_OUTSIDE | {
    "patch_embedding": "patch_embedding",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}

_PREFIX = re.compile(
    r"(?:base_model\.model\.|model\.diffusion_model\.|diffusion_model\.|pipe\.dit\.|dit\."
    r"|(?P<part>transformer(?:_2)?)\.)+"
)
_KOHYA_PREFIX = re.compile(r"lora_(?:unet|transformer)_")
_BLOCK = re.compile(r"blocks[._](\d+)[._](?=.)")
_ENDING = re.compile(
    # The adapter's name may stand before the last word.
    r"\.(?:lora_(?P<half>A|B|down|up)(?:\.[^.]+)??\.(?P<what>weight|bias)"
    r"|lora\.(?P<old>down|up)\.weight|(?P<single>alpha|diff|diff_b))$"
)
_HALVES: dict[str, Part] = {"A": "down", "down": "down", "B": "up", "up": "up"}
_SINGLES: dict[str, Part] = {"alpha": "alpha", "diff": "weight", "diff_b": "bias"}


class Name(NamedTuple):
    """What the name of a tensor in a LoRA file says.

    Attributes:
        module: diffusers' name of the layer, such as `blocks.0.attn1.to_q`.
        part: what of the layer it is.
        stem: the layer's name in the file, without prefix.
        transformer: `transformer` or `transformer_2` where the file says so.
        layout: in which of the layouts the name is written.
    """

    module: str
    part: Part
    stem: str
    transformer: str | None
    layout: Layout


def read_name(name: str) -> Name | None:
    """What `name` says, in whichever layout it is; None where it names no layer of Wan."""
    ending = _ENDING.search(name)
    if ending is None or (ending["what"] == "bias" and ending["half"] not in ("B", "up")):
        return None
    stem, transformer = name[: ending.start()], None
    if prefix := _KOHYA_PREFIX.match(stem):
        stem, known = stem[prefix.end() :], _kohya_names()
    else:
        known = _dotted_names()
        if prefix := _PREFIX.match(stem):
            stem, transformer = stem[prefix.end() :], prefix["part"]
    block = _BLOCK.match(stem)
    layer = stem[block.end() :] if block else stem
    if layer not in known:
        return None
    module, layout = known[layer]
    if (module in OF_A_BLOCK) != bool(block):
        return None
    module = f"blocks.{block[1]}.{module}" if block else module
    return Name(module, _part(ending), stem, transformer, layout)


def _part(ending: re.Match[str]) -> Part:
    if ending["single"]:
        return _SINGLES[ending["single"]]
    return "lora_bias" if ending["what"] == "bias" else _HALVES[ending["half"] or ending["old"]]


@cache
def _dotted_names() -> dict[str, tuple[str, Layout]]:
    """A layer's name in its block, or outside of them -> (diffusers' name, layout)."""
    layers = OF_A_BLOCK | OUTSIDE
    known: dict[str, tuple[str, Layout]] = {name: (name, "diffusers") for name in layers}
    return known | {original: (name, "comfyui") for name, original in layers.items()}


@cache
def _kohya_names() -> dict[str, tuple[str, Layout]]:
    return {name.replace(".", "_"): (ours, "kohya") for name, (ours, _) in _dotted_names().items()}


def original_name(module: str) -> str:
    """`blocks.0.attn1.to_q` -> `blocks.0.self_attn.q`. Raises KeyError for what is not Wan's."""
    if module.startswith("blocks."):
        _, block, layer = module.split(".", 2)
        return f"blocks.{block}.{OF_A_BLOCK[layer]}"
    return OUTSIDE[module]


def original_tensor(name: str) -> str:
    """The original Wan's name of a transformer's tensor, such as `blocks.0.self_attn.q.weight`.
    Raises KeyError for what is not Wan's.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "scale_shift_table":
        return f"{module}.modulation" if module else "head.modulation"
    return f"{original_name(module)}.{leaf}"


def is_in_block(module: str) -> bool:
    """Whether the layer is one of a block, and not one of the whole transformer."""
    return module.startswith("blocks.")


def is_trained(module: str) -> bool:
    """Whether this tool can train the layer: a linear one of a block, one that tells the noise
    level, or the last one.
    """
    if is_in_block(module):
        return module.split(".", 2)[2] in TRAINED
    return module in TRAINED_OUTSIDE


def matrix_shape(module: str, transformer: Mapping[str, Any]) -> tuple[int, int]:
    """(out, in) of a layer that this tool trains.

    Args:
        transformer: the content of transformer/config.json.
    """
    width: int = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    patch = math.prod(transformer.get("patch_size", (1, 2, 2)))
    sizes: dict[str, tuple[int, int]] = {
        "ffn.net.0.proj": (transformer["ffn_dim"], width),
        "ffn.net.2": (width, transformer["ffn_dim"]),
        "condition_embedder.time_embedder.linear_1": (width, transformer.get("freq_dim", 256)),
        "condition_embedder.time_proj": (6 * width, width),  # a block's shifts, scales and gates
        "proj_out": (transformer.get("out_channels", 16) * patch, width),
    }
    return sizes.get(module.split(".", 2)[2] if is_in_block(module) else module, (width, width))
