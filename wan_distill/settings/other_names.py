"""The names that other programs give to what this tool's flags set."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Collection, Mapping

# What diffusers' examples, kohya's scripts, musubi-tuner, ai-toolkit and Wan's own call it.
TRAINING = {
    "alpha": "--lora_alpha",
    "batch_size": "--train_batch_size",
    "bf16": "--mixed_precision bf16",
    "blocks_to_swap": "--offload",
    "cfg": "--guidance_scale (of the teacher; students need none)",
    "cfg_scale": "--guidance_scale (of the teacher; students need none)",
    "cpu_offload": "--offload",
    "dataset": "--prompts (no videos are needed)",
    "dataset_config": "--prompts (no videos are needed)",
    "discrete_flow_shift": "--flow_shift",
    "dit": "--teacher_path",
    "dtype": "--mixed_precision",
    "epochs": "--max_train_steps (training is counted in updates)",
    "fp8": "--base_precision fp8",
    "fp8_base": "--base_precision fp8",
    "fp8_scaled": "--base_precision fp8",
    "frame_num": "--num_frames",
    "frames": "--num_frames",
    "fsdp": "--shard",
    "gradient_accumulation": "--gradient_accumulation_steps",
    "guidance": "--guidance_scale (of the teacher; students need none)",
    "load_in_4bit": "--base_precision nf4",
    "log_with": "--report_to",
    "lora_path": "--init_student_from",
    "lora_r": "--rank",
    "lr": "--learning_rate",
    "max_train_epochs": "--max_train_steps (training is counted in updates)",
    "model": "--teacher_path",
    "model_id": "--teacher_path",
    "model_path": "--teacher_path",
    "network_alpha": "--lora_alpha",
    "network_dim": "--rank",
    "network_weights": "--init_student_from",
    "num_inference_steps": "--sampling_steps",
    "num_steps": "--sampling_steps (of a clip) or --max_train_steps (of training)",
    "num_train_epochs": "--max_train_steps (training is counted in updates)",
    "optimizer_type": "--optimizer",
    "output": "--output_dir",
    "pretrained_model_name_or_path": "--teacher_path",
    "prompt": "--prompts FILE",
    "resolution": "--height and --width",
    "resume": "--resume_from_checkpoint (the same command goes on by itself)",
    "sample_shift": "--flow_shift",
    "sample_steps": "--sampling_steps",
    "save_every_n_steps": "--checkpointing_steps",
    "save_steps": "--checkpointing_steps",
    "shift": "--flow_shift (of the student) or --teacher_shift",
    "size": "--height and --width",
    "steps": "--sampling_steps (of a clip) or --max_train_steps (of training)",
    "train_data_dir": "--prompts (no videos are needed)",
    "train_steps": "--max_train_steps",
    "unet_lr": "--learning_rate",
    "wandb": "--report_to wandb",
}
_GUIDANCE = "none: students sample without guidance; --compare guides the teacher"
SAMPLING = {
    "cfg": _GUIDANCE,
    "cfg_scale": _GUIDANCE,
    "cpu_offload": "--offload",
    "frame_num": "--num_frames",
    "frames": "--num_frames",
    "guidance_scale": _GUIDANCE,
    "lora": "--student",
    "lora_path": "--student",
    "lora_weight": "--student",
    "model": "--teacher_path",
    "model_path": "--teacher_path",
    "negative_prompt": _GUIDANCE,
    "num_inference_steps": "--steps",
    "num_steps": "--steps",
    "num_videos": "--samples",
    "output": "--out",
    "output_dir": "--out",
    "prompt_file": "--prompts",
    "sample_steps": "--steps",
    "sampling_steps": "--steps",
    "save_file": "--out",
    "save_path": "--out",
    "size": "--height and --width",
}


def unknown_flag(given: str, flags: Collection[str], other_names: Mapping[str, str]) -> str:
    """The line about an argument that no flag takes.

    Args:
        given: the argument, a flag or a stray word.
        flags: those that exist.
        other_names: other programs' names -> what to write here.
    """
    if not given.startswith("-"):
        words = given if given.isprintable() and given.strip() else ascii(given)
        return f"{words}: belongs to no flag; put quotation marks around a value with spaces"
    name = given.split("=")[0]
    typed = re.sub("^no_", "", name.lstrip("-").replace("-", "_"))
    usual = other_names.get(typed)
    close = difflib.get_close_matches("--" + name.lstrip("-").replace("-", "_"), flags, n=1)
    hint = f"did you mean {usual or close[0]}?" if usual or close else "see --help"
    return f"{name}: there is no such flag; {hint}"


def command_name(script: str, command: str) -> str:
    """How the user calls a program: `command` where pip has installed it under that name, otherwise
    `script`, a file of this repository.
    """
    called = os.path.basename(sys.argv[0]).removesuffix(".exe").removesuffix("-script.py")
    return command if called == command else script
