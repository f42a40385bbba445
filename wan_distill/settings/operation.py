"""The settings of memory and speed, and of what is written and shown."""

from __future__ import annotations

from dataclasses import dataclass

from wan_distill.settings.flags import MEMORY, OUTPUT, flag


@dataclass(frozen=True)
class OperationSettings:
    """How the run uses the machine, and what it leaves."""

    mixed_precision: str = flag(
        None,
        "dtype of the frozen base and of its arithmetic",
        MEMORY,
        choices=("no", "bf16", "fp16"),
    )
    base_precision: str = flag(
        "bf16",
        "the frozen base: bf16 = as --mixed_precision says, or quantised",
        MEMORY,
        choices=("bf16", "fp8", "int8", "nf4"),
    )
    shard: bool = flag(
        False,
        "spread the frozen base over all processes, where one card cannot hold it",
        MEMORY,
        free=True,
    )
    context_parallel: bool = flag(
        False,
        "all processes work on each clip together, each on its part of the tokens",
        MEMORY,
        free=True,
    )
    offload: bool = flag(
        False,
        "keep the frozen base's matrices in host memory; each travels when it is used",
        MEMORY,
        free=True,
    )
    use_8bit_adam: bool = flag(False, "AdamW with 8-bit moments (pip install bitsandbytes)", MEMORY)
    compile: bool = flag(
        False, "compile the transformer's blocks: slow to begin, faster afterwards", MEMORY
    )
    gradient_checkpointing: bool = flag(
        None, "recompute activations in the backward pass", MEMORY, free=True
    )
    sample_batch_size: int = flag(
        None, "samples at a time when nothing is trained", MEMORY, free=True
    )

    checkpointing_steps: int = flag(None, "updates between checkpoints", OUTPUT, free=True)
    checkpoints_total_limit: int | None = flag(2, "checkpoints kept per expert", OUTPUT, free=True)
    resume_from_checkpoint: str = flag(
        "latest",
        "'latest' (a run without checkpoints begins anew), or the folder of one checkpoint",
        OUTPUT,
        free=True,
    )
    allow_config_change: bool = flag(
        False, "resume although settings that matter differ", OUTPUT, free=True
    )
    on_nonfinite: str = flag(
        "stop",
        "when a loss or gradient is NaN or infinite; the update is never made",
        OUTPUT,
        choices=("stop", "skip"),
        free=True,
    )
    nonfinite_limit: int = flag(
        10, "skipped updates per expert after which the run stops all the same", OUTPUT, free=True
    )
    logging_steps: int = flag(10, "updates between lines of metrics.jsonl", OUTPUT, free=True)
    monitor_steps: int = flag(
        None,
        "student updates between looks at its samples (motion, exposure, diversity); 0 = never",
        OUTPUT,
    )
    monitor_samples: int = flag(None, "clips a look, two seeds a prompt", OUTPUT)
    save_merged: bool = flag(
        None,
        "also write a complete pipeline, adapters merged in (default: tiny only)",
        OUTPUT,
        free=True,
    )
    evaluate: bool = flag(
        None,
        "measure the student against its teacher at the end (default: tiny only)",
        OUTPUT,
        free=True,
    )
    evaluate_only: bool = flag(
        False, "measure what --output_dir already holds, train nothing", OUTPUT, free=True
    )
    eval_samples: int = flag(512, "samples a side in the evaluation", OUTPUT, free=True)
    eval_seed: int = flag(1, "seed of the evaluation's noise", OUTPUT, free=True)
    validation_steps: int = flag(
        None, "updates between previews, teacher beside student; 0 = none", OUTPUT, free=True
    )
    validation_prompt: str | None = flag(
        None,
        "prompt of the previews, several separated by | (default: three that are not trained on)",
        OUTPUT,
        free=True,
    )
    fps: int = flag(16, "frames a second of the videos written (Wan: 16)", OUTPUT, free=True)
    report_to: str = flag(
        "none",
        "tracker that gets the metrics too",
        OUTPUT,
        choices=("tensorboard", "wandb", "trackio", "none"),
        free=True,
    )
    tracker_project_name: str = flag("wan-distill", "project in the tracker", OUTPUT, free=True)
    push_to_hub: bool = flag(
        False, "upload LoRAs, scheduler, model card and previews at the end", OUTPUT, free=True
    )
    hub_model_id: str | None = flag(
        None, "repository on the hub (default: the output folder's name)", OUTPUT, free=True
    )
    hub_token: str | None = flag(
        None, "token to upload with (default: the one of `hf auth login`)", OUTPUT, free=True
    )
    debug: bool = flag(False, "show tracebacks of bad input too", OUTPUT, free=True)
