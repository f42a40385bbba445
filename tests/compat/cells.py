"""All cells of the matrix under the installed transformers; prints one JSON object. Run by
run_matrix.py.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent.parent), str(HERE.parent / "umt5")]

import torch
import transformers
from transformers import UMT5EncoderModel
from umt5_layouts import LAYOUTS, SHARED, true_weights, write_layout

from wan_distill import errors
from wan_distill.settings import weight_files
from wan_distill.umt5 import evidence, inspect, repair, verify

if TYPE_CHECKING:
    from diffusers import WanPipeline

IDS = torch.tensor([[5, 17, 60, 44, 1], [9, 9, 44, 2, 1]])
PATHS = (
    "plain",
    "bf16",
    "device_map",
    "low_cpu_mem off",
    "meta + assign",
    "pipeline load",
    "pipeline save, reload",
    "group offload",
    "torch.compile",
    "int8 weight-only",
)


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": torch.bfloat16},
    "device_map": {"device_map": "cpu"},
    "low_cpu_mem off": {"low_cpu_mem_usage": False},
}


def reference(folder: Path, dtype: torch.dtype = torch.float32) -> UMT5EncoderModel:
    """An encoder whose table was put in by hand, so it is right with every version. Other layers
    are loaded, as versions differ in which of them stay in float32.
    """
    model = UMT5EncoderModel.from_pretrained(folder, dtype=dtype).eval()
    for module in (model.shared, model.encoder.embed_tokens):
        module.weight = torch.nn.Parameter(true_weights()[SHARED].to(dtype))
    return model


def states(encoder: UMT5EncoderModel) -> torch.Tensor:
    with torch.no_grad():
        return encoder(IDS).last_hidden_state.float()


def on_meta(folder: Path) -> UMT5EncoderModel:
    """The hand-written way: built on the meta device, filled by `load_state_dict(assign=True)`."""
    from safetensors.torch import load_file

    with torch.device("meta"):
        encoder = UMT5EncoderModel(UMT5EncoderModel.config_class.from_pretrained(folder))
    weights = {}
    for file in weight_files.weight_files(folder):
        weights |= (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, weights_only=True)
        )
    encoder.load_state_dict(weights, strict=False, assign=True)
    return encoder.eval()


def pipeline(folder: Path) -> WanPipeline:
    """The text encoder of `folder`, loaded as a pipeline's only part."""
    from diffusers import WanPipeline

    root = folder.parent / f"{folder.name}-pipeline"
    if not root.exists():
        root.mkdir()
        (root / "text_encoder").symlink_to(folder, target_is_directory=True)
        (root / "model_index.json").write_text(
            json.dumps(
                {
                    "_class_name": "WanPipeline",
                    "_diffusers_version": "0.36.0",
                    "boundary_ratio": 0.875,
                    "text_encoder": ["transformers", "UMT5EncoderModel"],
                }
            )
        )
    return WanPipeline.from_pretrained(
        root,
        tokenizer=None,
        vae=None,
        scheduler=None,
        transformer=None,
        transformer_2=None,
        use_safetensors=None,
    )


def as_stock(path: str, folder: Path) -> UMT5EncoderModel:
    """What a user of this version gets by this path, without our help."""
    options = OPTIONS.get(path, {})
    if path == "meta + assign":
        return on_meta(folder)
    if path.startswith("pipeline"):
        pipe = pipeline(folder)
        if path == "pipeline save, reload":
            saved = Path(tempfile.mkdtemp())
            pipe.text_encoder.save_pretrained(saved)
            return UMT5EncoderModel.from_pretrained(saved).eval()
        return pipe.text_encoder.eval()
    encoder = UMT5EncoderModel.from_pretrained(folder, **options).eval()
    return afterwards(path, encoder)


def as_ours(path: str, folder: Path) -> tuple[UMT5EncoderModel, verify.Verdict]:
    """The same path with our verification: inside our loader, or on an encoder that the user's own
    code has loaded.
    """
    options = OPTIONS.get(path, {})
    if path == "meta + assign":
        encoder = on_meta(folder)
        return encoder, repair.verify_or_repair(encoder, inspect.inspect_text_encoder(folder))
    if path.startswith("pipeline"):
        pipe = pipeline(folder)
        verdict = repair.verify_or_repair(pipe.text_encoder, inspect.inspect_text_encoder(folder))
        if path == "pipeline save, reload":
            saved = Path(tempfile.mkdtemp())
            pipe.text_encoder.save_pretrained(saved)
            return repair.load_text_encoder(saved)[0], verdict
        return pipe.text_encoder.eval(), verdict
    encoder, verdict = repair.load_text_encoder(folder, allow_pickle=True, **options)
    encoder = afterwards(path, encoder)
    if path != "torch.compile":  # a compiled module is the same module underneath
        key = evidence.trusted_key(inspect.inspect_text_encoder(folder))
        assert verify.verify(encoder, folder, key).matches
    return encoder, verdict


def afterwards(path: str, encoder: UMT5EncoderModel) -> UMT5EncoderModel:
    """What users do to a loaded encoder. Verification comes before that."""
    if path == "group offload":
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(
            encoder,
            onload_device=torch.device("cpu"),
            offload_device=torch.device("cpu"),
            offload_type="leaf_level",
        )
    elif path == "torch.compile":
        return torch.compile(encoder, backend="eager")
    elif path == "int8 weight-only":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(encoder, Int8WeightOnlyConfig())
    return encoder


def stock_cell(path: str, folder: Path, expected: torch.Tensor, tolerance: float) -> str:
    """ok, BROKEN (wrong embeddings, no error), or the error's name."""
    try:
        close = torch.allclose(states(as_stock(path, folder)), expected, rtol=0, atol=tolerance)
    except Exception as error:  # every error is this cell's result
        return type(error).__name__
    return "ok" if close else "BROKEN"


def our_cell(path: str, folder: Path, expected: torch.Tensor) -> dict[str, Any]:
    """Our verdict, and how far the embeddings are from the right ones; or why we refused."""
    try:
        encoder, verdict = as_ours(path, folder)
    except errors.FileError as error:
        return dict(verdict="BROKEN", why=str(error).split(": ", 1)[1])
    return dict(verdict=verdict.verdict, error=float((states(encoder) - expected).abs().max()))


def offload_works() -> bool:
    """The older diffusers that transformers 4.57 needs does it on an accelerator only."""
    import diffusers

    return int(diffusers.__version__.split(".")[1]) >= 42 or torch.accelerator.is_available()


def main() -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.logging.disable_progress_bar()
    root = Path(tempfile.mkdtemp())
    clean = write_layout("both equal", root / "reference")
    exact, half = states(reference(clean)), states(reference(clean, torch.bfloat16))
    int8 = states(afterwards("int8 weight-only", reference(clean)))
    cells = {}
    for layout in LAYOUTS:
        folder = write_layout(layout, root / layout.replace(" ", "_").replace(".", ""))
        for path in PATHS:
            if path == "group offload" and not offload_works():
                cells[f"{layout}|{path}"] = dict(stock="n/a", verdict="n/a")
                continue
            expected = {"bf16": half, "int8 weight-only": int8}.get(path, exact)
            cells[f"{layout}|{path}"] = dict(
                stock=stock_cell(path, folder, expected, 1e-6), **our_cell(path, folder, expected)
            )
    import diffusers

    print(
        json.dumps(
            dict(
                transformers=transformers.__version__, diffusers=diffusers.__version__, cells=cells
            )
        )
    )


if __name__ == "__main__":
    main()
