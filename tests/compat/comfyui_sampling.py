"""Runs a workflow file by ComfyUI's own nodes, and compares the latents with this tool's sampler.

    python tests/compat/comfyui_sampling.py COMFYUI

COMFYUI is a checkout, as for comfyui_tables.py. Both experts are random Wans of two blocks, with a
random student each; text encoder and VAE are left out: the conditioning is random, the result stays
latent.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from comfyui_tables import start_comfyui
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor
from wan_shapes import config_of, teacher_of

from wan_distill.maths import flow
from wan_distill.maths.sigmas import Expert
from wan_distill.model.adapters import adapter_parameters, add_adapter
from wan_distill.model.condition import Condition
from wan_distill.model.denoiser import Denoiser
from wan_distill.model.student_files import to_original_names
from wan_distill.results.workflow_nodes import base_file
from wan_distill.results.workflows import comfyui_workflow
from wan_distill.settings.lora_names import original_tensor

# Heads of 128 and 256 frequencies are what ComfyUI takes for granted.
SMALL = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=2,
    attention_head_dim=128,
    in_channels=16,
    out_channels=16,
    text_dim=4096,
    freq_dim=256,
    ffn_dim=512,
    num_layers=2,
)
RANK, ALPHA = 8, 4.0
CLIP = dict(height=64, width=64, num_frames=9, mixed_precision="no", rank=RANK, lora_alpha=ALPHA)
LEFT_OUT = ("CLIPLoader", "CLIPTextEncode", "VAELoader", "VAEDecode", "CreateVideo", "SaveVideo")


def write_expert(seed: int, base: Path, lora: Path) -> WanTransformer3DModel:
    """A random expert with a random student: written as two files, and as this tool has it."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**SMALL).eval()
    torch.nn.init.normal_(model.proj_out.weight, std=0.1)
    tensors = {original_tensor(name): t.contiguous() for name, t in model.state_dict().items()}
    save_file(tensors, base)
    layers = config_of(teacher_of(SMALL, Path("nowhere")), **CLIP).lora_layers
    add_adapter(model, "student", rank=RANK, alpha=ALPHA, layers=layers, seed=seed)
    adapter = adapter_parameters(model, "student")
    with torch.no_grad():
        for parameter in adapter.values():
            parameter.normal_(std=0.2)
    weights = {name: p.detach().contiguous() for name, p in adapter.items()}
    save_file(to_original_names(weights, ALPHA), lora)
    return model


def run_workflow(workflow: dict[str, Any], text: Tensor, folder: Path) -> tuple[Tensor, Tensor]:
    """(noise, latents) of the last sampler, normalised, by ComfyUI's nodes."""
    import comfy.sample
    import folder_paths
    import nodes

    folder_paths.get_full_path_or_raise = lambda kind, name: str(folder / name)
    results: dict[str, Any] = {}
    for number, node in workflow.items():
        if node["class_type"] in LEFT_OUT:
            results[number] = ([[text, {}]],)
            continue
        inputs = {
            name: results[value[0]][value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        kind = nodes.NODE_CLASS_MAPPINGS[node["class_type"]]
        results[number] = getattr(kind(), kind.FUNCTION)(**inputs)
        if node["class_type"] == "EmptyHunyuanLatentVideo":
            noise = comfy.sample.prepare_noise(results[number][0]["samples"], 0)
        if node["class_type"] == "KSamplerAdvanced":
            model, latents = inputs["model"], results[number][0]["samples"]
    return noise, model.model.latent_format.process_in(latents)


def main() -> None:
    start_comfyui(sys.argv[1])
    info = teacher_of(SMALL, Path("nowhere"))
    config = config_of(info, **CLIP)
    workflow = comfyui_workflow(config, info, info.experts)
    text = torch.randn(1, 512, SMALL["text_dim"], generator=torch.Generator().manual_seed(0))
    with TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        experts: dict[Expert, WanTransformer3DModel] = {}
        for seed, expert in enumerate(info.experts):
            lora = folder / f"{expert}_noise_lora.safetensors"
            experts[expert] = write_expert(seed, folder / base_file(info, expert), lora)
        noise, theirs = run_workflow(workflow, text, folder)
        denoiser = Denoiser(experts, config.boundary_ratio)
        for role in ("student", "teacher"):
            ours = flow.sample(
                lambda x, sigma, role=role: denoiser.velocity(x, sigma, Condition(text), role=role),
                noise,
                config.sigmas(),
            )
            print(f"{role}: relative difference {float((theirs - ours).norm() / ours.norm()):.2g}")


if __name__ == "__main__":
    main()
