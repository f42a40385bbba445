"""The settings of memory and speed, and of what is written and shown."""

from __future__ import annotations

from dataclasses import dataclass

from wan_distill.settings.flags import MEMORY, OUTPUT, flag, path, words

EXPORTS = ("diffusers", "comfyui", "comfyui-fp8")


@dataclass(frozen=True)
class OperationSettings:
    """How the run uses the machine, and what it leaves."""

    mixed_precision: str = flag(
        None,
        "dtype of the frozen base and its arithmetic (no = float32; fp16 is refused)",
        MEMORY,
        choices=("no", "bf16", "fp16"),
    )
    base_precision: str = flag(
        "bf16",
        "weights of the frozen base: bf16 = as --mixed_precision says, or quantised",
        MEMORY,
        choices=("bf16", "fp8", "int8", "nf4"),
    )
    shard: bool = flag(
        False,
        "spread the frozen base over all processes, for cards that cannot hold it",
        MEMORY,
        free=True,
    )
    context_parallel: bool = flag(
        False,
        "all processes work on the same clip, each on its part of the tokens",
        MEMORY,
        free=True,
    )
    offload: bool = flag(
        False,
        "keep the frozen base's matrices in host memory; each is copied to the GPU when it is used",
        MEMORY,
        free=True,
    )
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit moments (pip install bitsandbytes)", MEMORY)
    compile: bool = flag(
        False, "compile the transformer's blocks: a slow start, faster afterwards", MEMORY
    )
    gradient_checkpointing: bool = flag(
        None,
        "recompute activations in the backward pass: less memory, a third more time",
        MEMORY,
        free=True,
    )
    keep_attention: bool = flag(
        False,
        "with --gradient_checkpointing, store the output of self-attention instead of computing it "
        "again: a faster backward pass, more memory",
        MEMORY,
        free=True,
    )
    deterministic: bool = flag(
        False,
        "on a GPU too, the same bits in every run, resumed or not; slower (a CPU always does so)",
        MEMORY,
        free=True,
    )
    sample_batch_size: int = flag(
        None,
        "batch size for sampling without gradients (solving, previews, evaluation)",
        MEMORY,
        free=True,
    )

    samples_dir: str | None = flag(
        None,
        "where prompt embeddings and solved samples are kept, so that runs can share them "
        "(default: --output_dir)",
        OUTPUT,
        parse=path,
        free=True,
    )
    checkpointing_steps: int = flag(None, "student updates between checkpoints", OUTPUT, free=True)
    checkpoints_total_limit: int | None = flag(2, "checkpoints kept per expert", OUTPUT, free=True)
    resume_from_checkpoint: str = flag(
        "latest",
        "'latest' (a run without checkpoints starts from 0), or the folder of one checkpoint",
        OUTPUT,
        free=True,
        parse=path,
    )
    allow_config_change: bool = flag(
        False, "resume although settings that change the result differ", OUTPUT, free=True
    )
    on_nonfinite: str = flag(
        "stop",
        "what to do when a loss or gradient is NaN or infinite; its update is never made",
        OUTPUT,
        choices=("stop", "skip"),
        free=True,
    )
    nonfinite_limit: int = flag(
        10,
        "skipped updates that are allowed per expert; one more stops the run",
        OUTPUT,
        free=True,
    )
    logging_steps: int = flag(
        None, "student updates between lines of metrics.jsonl", OUTPUT, free=True
    )
    monitor_steps: int = flag(
        None,
        "student updates between checks of its samples (motion, exposure, diversity); 0 = never",
        OUTPUT,
    )
    monitor_samples: int = flag(
        None, "clips sampled at each check of the student (two seeds per prompt)", OUTPUT
    )
    lora_dtype: str = flag(
        None,
        "dtype of the LoRA files (default: bf16, which is half the size; float32 with "
        "--mixed_precision no)",
        OUTPUT,
        choices=("float32", "bf16"),
    )
    save_merged: bool = flag(
        None,
        "also write a complete pipeline, adapters merged in (default: tiny only)",
        OUTPUT,
        free=True,
    )
    export: tuple[str, ...] = flag(
        (),
        "also write, of: diffusers (the same as --save_merged); comfyui (one merged file per "
        "expert); comfyui-fp8 (the same in scaled fp8)",
        OUTPUT,
        parse=words,
        free=True,
    )
    evaluate: bool = flag(
        None,
        "measure the student against its teacher at the end (default: on)",
        OUTPUT,
        free=True,
    )
    evaluate_only: bool = flag(
        False, "measure the student in --output_dir; train nothing", OUTPUT, free=True
    )
    evaluation: str = flag(
        None,
        "sets = Frechet distance between sets of hundreds of samples; pairs = few clips, each "
        "beside its teacher's from the same noise (default: sets for tiny teachers)",
        OUTPUT,
        choices=("sets", "pairs"),
        free=True,
    )
    eval_samples: int = flag(
        None, "samples of student and of teacher in the evaluation", OUTPUT, free=True
    )
    eval_seed: int = flag(1, "seed of the evaluation's noise", OUTPUT, free=True)
    validation_steps: int = flag(
        None,
        "student updates between previews, teacher beside student; 0 = none",
        OUTPUT,
        free=True,
    )
    validation_prompt: str | None = flag(
        None,
        "prompts of the previews, separated by | (default: three that are not trained on)",
        OUTPUT,
        free=True,
    )
    serve: int | None = flag(
        None,
        "show the page at http://127.0.0.1:PORT while the run goes on (default port: 8765)",
        OUTPUT,
        optional=8765,
        free=True,
    )
    fps: int = flag(16, "frames per second of the videos (Wan: 16)", OUTPUT, free=True)
    report_to: str = flag(
        "none",
        "tracker that also gets the metrics",
        OUTPUT,
        choices=("tensorboard", "wandb", "trackio", "none"),
        free=True,
    )
    tracker_project_name: str = flag(
        "wan-distill", "name of the project in the tracker", OUTPUT, free=True
    )
    push_to_hub: bool = flag(
        False,
        "upload LoRAs, scheduler, model card, report and clips at the end, for all to see",
        OUTPUT,
        free=True,
    )
    hub_private_repo: bool = flag(
        False, "upload to a repository that others do not see", OUTPUT, free=True
    )
    hub_model_id: str | None = flag(
        None, "repository on the hub (default: the output folder's name)", OUTPUT, free=True
    )
    hub_token: str | None = flag(
        None, "token to upload with (default: the one of `hf auth login`)", OUTPUT, free=True
    )
    gpu_hour_price: float = flag(
        2.5,
        "dollars per GPU-hour, for the cost that is planned and shown (an H100 in November 2026)",
        OUTPUT,
        free=True,
    )
    plan_json: str | None = flag(
        None,
        "with --dry_run: also write the plan's numbers to this file",
        OUTPUT,
        free=True,
        parse=path,
    )
    clean: bool = flag(
        False,
        "delete the caches of the finished run in --output_dir (solved samples, embeddings) and "
        "exit; the student and its checkpoints stay",
        OUTPUT,
        free=True,
    )
    debug: bool = flag(False, "show tracebacks for bad input too", OUTPUT, free=True)
