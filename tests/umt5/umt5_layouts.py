"""Every way a UMT5 text encoder's table can lie in its files, as folders of a tiny encoder.

Needs no test framework, so that the version matrix can build the same folders under any
transformers.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
LAYOUTS = (
    "shared only",
    "embed only",
    "both equal",
    "poisoned embed",
    "poisoned shared",
    "both healthy but different",
    "neither",
    "sharded",
    ".bin",
    ".bin both",
)
REFUSED = ("both healthy but different", "neither")  # nobody can tell which table is right
CONFIG = dict(
    vocab_size=96,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
)


def true_weights() -> dict[str, torch.Tensor]:
    """Seeded float32 weights of a UMT5 encoder as its file names them, the true table as
    `shared.weight`.
    """
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.2) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=rng)

    c, inner = CONFIG, CONFIG["d_kv"] * CONFIG["num_heads"]
    weights = {SHARED: normal(c["vocab_size"], c["d_model"], scale=1.0)}
    for i in range(c["num_layers"]):
        attention, dense = (
            f"encoder.block.{i}.layer.0.SelfAttention",
            f"encoder.block.{i}.layer.1.DenseReluDense",
        )
        for name in "qkv":
            weights[f"{attention}.{name}.weight"] = normal(inner, c["d_model"])
        weights[f"{attention}.o.weight"] = normal(c["d_model"], inner)
        weights[f"{attention}.relative_attention_bias.weight"] = normal(32, c["num_heads"])
        weights[f"{dense}.wi_0.weight"] = normal(c["d_ff"], c["d_model"])
        weights[f"{dense}.wi_1.weight"] = normal(c["d_ff"], c["d_model"])
        weights[f"{dense}.wo.weight"] = normal(c["d_model"], c["d_ff"])
        for layer in (0, 1):
            weights[f"encoder.block.{i}.layer.{layer}.layer_norm.weight"] = torch.ones(c["d_model"])
    weights["encoder.final_layer_norm.weight"] = torch.ones(c["d_model"])
    return weights


def garbage() -> torch.Tensor:
    """What uninitialised memory looks like: huge, tiny and NaN values."""
    rng = torch.Generator().manual_seed(1)
    table = torch.randn(CONFIG["vocab_size"], CONFIG["d_model"], generator=rng) * 1e-30
    table[::7] = 1e37
    table[5] = float("nan")
    return table


def write_layout(
    layout: str,
    folder: Path,
    *,
    tie: bool | None = False,
    variant: str | None = None,
    scale: float = 1.0,
) -> Path:
    """Writes the text encoder folder of one layout; a second call with another `variant` adds that.

    `tie`: tie_word_embeddings in config.json, None leaves it out. `scale` multiplies the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: scale * values for name, values in true_weights().items()}
    table = weights[SHARED]
    match layout:
        case "embed only":
            weights[EMBED] = weights.pop(SHARED)
        case "both equal" | ".bin both":
            weights[EMBED] = table.clone()
        case "poisoned embed":
            weights[EMBED] = garbage()
        case "poisoned shared":
            weights[EMBED], weights[SHARED] = table, garbage()
        case "both healthy but different":
            weights[EMBED] = table.flip(0).contiguous()
        case "neither":
            del weights[SHARED]
    middle = f".{variant}" if variant else ""
    if layout.startswith(".bin"):
        torch.save(weights, folder / f"pytorch_model{middle}.bin")
    elif layout == "sharded":
        write_shards(weights, folder, middle)
    else:
        save_file(weights, folder / f"model{middle}.safetensors", {"format": "pt"})
    config = dict(
        CONFIG,
        model_type="umt5",
        architectures=["UMT5EncoderModel"],
        is_encoder_decoder=True,
        use_cache=True,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        torch_dtype="float32",  # as Wan's own config.json has it
    )
    if tie is not None:
        config["tie_word_embeddings"] = tie
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(weights: dict[str, torch.Tensor], folder: Path, middle: str = "") -> None:
    """Writes three shards and their index; `middle` is a variant's part of the names."""
    names = sorted(weights, reverse=True)
    shards = {f"model{middle}-{i + 1:05d}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in shards.items():
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"model.safetensors.index{middle}.json").write_text(json.dumps(index))
