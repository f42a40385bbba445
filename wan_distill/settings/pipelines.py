"""Is this a Wan pipeline that can be distilled? By its JSON files alone."""

from __future__ import annotations

import json
import math
from typing import Any

from wan_distill.errors import UsageError

TRANSFORMER_NUMBERS = (
    "in_channels",
    "out_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "text_dim",
    "freq_dim",
)
# Part -> the library and class that model_index.json must name; None: any class of that library.
PARTS = {
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "transformer_2": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", None),
    "scheduler": ("diffusers", None),
}
TEXT_TO_VIDEO, IMAGE_TO_VIDEO = "WanPipeline", "WanImageToVideoPipeline"
PIPELINES = {TEXT_TO_VIDEO: "text to video", IMAGE_TO_VIDEO: "image to video"}
REQUIRED = ("transformer", "vae", "text_encoder", "tokenizer")
TEXT_NUMBERS = ("d_model", "num_heads", "d_kv", "d_ff", "num_layers", "vocab_size")
LARGEST, MOST_LAYERS = 10**6, 1000  # of Wan's models no number is anywhere near
COUNTS = ("num_layers", "num_decoder_layers", "num_res_blocks")
TOKENIZERS = ("T5TokenizerFast", "T5Tokenizer", "AutoTokenizer")
SCHEDULER = "UniPCMultistepScheduler"  # Wan's own, for remedies


def check_pipeline(source: str, index: dict[str, Any]) -> None:
    """Raises UsageError where `index`, the content of model_index.json, is not of a pipeline that
    stock diffusers loads as one of `PIPELINES`.
    """
    if index.get("_class_name") not in PIPELINES:
        known = " and ".join(f"{name} ({what})" for name, what in PIPELINES.items())
        raise UsageError(
            f"--teacher_path {source}: is a {index.get('_class_name')}; this tool distils {known}"
        )
    if not isinstance(index.get("expand_timesteps", False), bool):
        raise UsageError(
            f"--teacher_path {source}: model_index.json: expand_timesteps is "
            f"{json.dumps(index['expand_timesteps'])}; write true or false"
        )
    for part, (library, wanted) in PARTS.items():
        absent = part not in index and part not in REQUIRED
        if absent or (part == "transformer_2" and index[part] == [None, None]):
            continue
        where = f"--teacher_path {source}: model_index.json: {part}"
        named = index.get(part)
        if not isinstance(named, list) or len(named) != 2 or not all(map(_is_text, named)):
            none = ", or [null, null] if there is none" if part == "transformer_2" else ""
            usual = [library, wanted or (SCHEDULER if part == "scheduler" else "T5TokenizerFast")]
            raise UsageError(
                f"{where} is {json.dumps(named)}, which diffusers does not load; write "
                f"{json.dumps(usual)}{none}"
            )
        if named[0] != library:
            usual = [library, wanted or SCHEDULER]
            raise UsageError(
                f"{where} is {named[1]} of {named[0]}, which diffusers does not load; write "
                f"{json.dumps(usual)}"
            )
        if part == "tokenizer" and named[1] not in TOKENIZERS:
            raise UsageError(f"{where} is {named[1]}; UMT5's is {TOKENIZERS[0]}, write that")
        if wanted and named[1] != wanted:
            raise UsageError(
                f"{where} is {named[1]}; this tool distils pipelines whose {part} is {wanted}"
            )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def check_channels(
    source: str, index: dict[str, Any], transformer: dict[str, Any], vae: dict[str, Any]
) -> None:
    """Raises UsageError where the transformer does not take what its pipeline gives it.

    Text to video: noisy latents alone. Image to video as Wan2.2-A14B: beside them, as more
    channels, the mask of the frames that are given (one channel per frame of a latent frame) and
    the first frame's latents: 36 in, 16 out. Not those that also see the picture through an image
    encoder (Wan2.1), take a last frame too, or give each token a timestep (TI2V-5B with a picture):
    docs/methods.md says why.
    """
    wanted = PIPELINES[index["_class_name"]]
    channels_in, latent = transformer["in_channels"], transformer["out_channels"]
    expected = {
        PIPELINES[TEXT_TO_VIDEO]: latent,
        PIPELINES[IMAGE_TO_VIDEO]: 2 * latent + vae.get("scale_factor_temporal", 4),
    }
    encoder = index.get("image_encoder") not in (None, [None, None])
    if encoder or transformer.get("image_dim") is not None:
        raise UsageError(
            f"--teacher_path {source}: sees its picture through an image encoder (Wan2.1), which "
            "this tool does not train with; give Wan2.2-I2V-A14B or a text-to-video teacher"
        )
    if index["_class_name"] == IMAGE_TO_VIDEO and index.get("expand_timesteps"):
        raise UsageError(
            f"--teacher_path {source}: gives the picture's tokens a timestep of their own "
            "(TI2V-5B with a picture), which this tool does not train with; give the same model as "
            "a WanPipeline, or Wan2.2-I2V-A14B"
        )
    if channels_in != expected[wanted]:
        fits = [what for what, channels in expected.items() if channels == channels_in]
        kind = f"is for {fits[0]}" if fits else "is for neither"
        raise UsageError(
            f"--teacher_path {source}: model_index.json says {index['_class_name']} ({wanted}), "
            f"but its transformer with {channels_in} channels in and {latent} out {kind}; "
            "download it again"
        )


def boundary_ratio_of(source: str, index: dict[str, Any]) -> float | None:
    """The boundary in `index`, the content of model_index.json; None for a single transformer.

    Raises UsageError where it is no number between 0 and 1.
    """
    boundary = index.get("boundary_ratio")
    if index.get("transformer_2") in (None, [None, None]):
        if boundary is not None:
            raise UsageError(
                f"--teacher_path {source}: model_index.json has boundary_ratio {boundary} but no "
                f"transformer_2; write {json.dumps(list(PARTS['transformer_2']))} for that, or "
                "null for boundary_ratio"
            )
        return None
    if isinstance(boundary, str):
        raise UsageError(
            f'--teacher_path {source}: boundary_ratio "{boundary}" in model_index.json is text; '
            "write the number without quotes"
        )
    if not (isinstance(boundary, float) and 0 < boundary < 1):
        raise UsageError(
            f"--teacher_path {source}: has two transformers but boundary_ratio {boundary} in "
            "model_index.json; set it there (Wan2.2-T2V-A14B: 0.875, I2V-A14B: 0.9)"
        )
    return boundary


def check_numbers(
    source: str, transformer: dict[str, Any], vae: dict[str, Any], text: dict[str, Any]
) -> None:
    """Raises UsageError where a number that this tool calculates with is not one.

    Args:
        transformer, vae, text: the config.json of each part; of the text encoder it may be empty.
    """
    channels = transformer.get("out_channels")
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text}
    wrong = [
        f"{part}/config.json: {key} {value}"
        for part, config in parts.items()
        for key, value in config.items()
        if type(value) in (int, float)
        and not abs(value) <= (MOST_LAYERS if key in COUNTS else LARGEST)
    ]
    wrong += [
        f"transformer/config.json: {key} {transformer.get(key)}"
        for key in TRANSFORMER_NUMBERS
        if not _is_positive(transformer.get(key))
    ]
    if not _is_positive(transformer.get("rope_max_seq_len", 1)):
        wrong.append(f"transformer/config.json: rope_max_seq_len {transformer['rope_max_seq_len']}")
    patch = transformer.get("patch_size")
    if not (isinstance(patch, list) and len(patch) == 3 and all(map(_is_positive, patch))):
        wrong.append(f"transformer/config.json: patch_size {patch}")
    wrong += [
        f"text_encoder/config.json: {key} {text[key]!r}"
        for key in TEXT_NUMBERS
        if key in text and not _is_positive(text[key])
    ]
    wrong += [
        f"vae/config.json: {key} {vae[key]}"
        for key in ("scale_factor_temporal", "scale_factor_spatial")
        if key in vae and not _is_positive(vae[key])
    ]
    wrong += [
        f"vae/config.json: {key} is not {channels} numbers"
        for key in ("latents_mean", "latents_std")
        if vae.get("z_dim") != channels or not _are_numbers(vae.get(key), channels)
    ]
    if not wrong and min(vae["latents_std"]) <= 0:
        wrong.append("vae/config.json: latents_std holds a number that is not positive")
    if wrong:
        raise UsageError(
            f"--teacher_path {source}: {wrong[0]}; that is no Wan model, download it again"
        )


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_numbers(values: Any, count: int | None) -> bool:
    """Whether `values` is a list of `count` finite numbers."""
    numbers = values if isinstance(values, list) and len(values) == count else [math.nan]
    return all(type(value) in (int, float) and math.isfinite(value) for value in numbers)
