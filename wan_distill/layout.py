"""Where everything lies below `--output_dir`: each path is named here, once."""

from __future__ import annotations

from pathlib import Path

from wan_distill.maths.sigmas import Expert

LORA_FILE: dict[str, str] = {
    "high": "high_noise_lora.safetensors",
    "low": "low_noise_lora.safetensors",
}
# With --student_layers: all weights of one expert, under diffusers' names.
WHOLE_FILE: dict[str, str] = {
    "high": "high_noise_student.safetensors",
    "low": "low_noise_student.safetensors",
}


def student_file(folder: str | Path, expert: Expert) -> Path:
    """What a run left of one expert's student: its LoRA, or all of its weights."""
    whole = Path(folder) / WHOLE_FILE[expert]
    return whole if whole.exists() else Path(folder) / LORA_FILE[expert]
