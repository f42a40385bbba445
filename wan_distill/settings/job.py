"""The settings that say what is distilled: where to start, the student, the teacher."""

from __future__ import annotations

from dataclasses import dataclass

from wan_distill.settings.flags import (
    START,
    STUDENT,
    TEACHER,
    flag,
    path,
    paths,
    step_counts,
    words,
)

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"),
    *("time_embedder.linear_1", "time_embedder.linear_2", "time_proj", "proj_out"),
)

TWO_STAGES = "trajectory+dmd"
STAGES: dict[str, tuple[str, ...]] = {TWO_STAGES: ("trajectory", "dmd")}
"""--method -> the methods of its stages; each begins with the student of the one before"""
SECOND_STAGE_FLAGS = {"max_train_steps": "refine_steps", "learning_rate": "refine_learning_rate"}
"""setting -> what the second stage has it from"""
REFINED = "low"  # the expert that the second stage refines, where none is named


@dataclass(frozen=True)
class JobSettings:
    """What is distilled into what."""

    teacher_path: str | None = flag(
        None,
        "hub id or folder of a Wan pipeline, from text or from text and a picture; tiny-t2v, "
        "tiny-i2v and tiny-pairs are embedded (default: tiny-t2v)",
        START,
        alias=("--pretrained_teacher_model",),
        free=True,
        parse=path,
    )
    prompts: str | None = flag(
        None,
        ".txt (one per line), .json, .jsonl, .csv, .tsv, a folder of .txt, or a `datasets` id "
        "(default: built in)",
        START,
        free=True,
        parse=path,
    )
    images: str | None = flag(
        None,
        "pictures that clips of an image-to-video teacher begin with, and their captions: a folder "
        "with NAME.txt beside each NAME.png, a folder with metadata.jsonl or .csv, or a `datasets` "
        "id (default: a few rendered ones, to try with)",
        START,
        free=True,
        parse=path,
    )
    output_dir: str = flag(
        None,
        "where everything goes (default: outputs/<teacher>-<method>-<steps>-<other settings>)",
        START,
        free=True,
        parse=path,
    )
    method: str = flag(
        None,
        "objective the student is trained with; trajectory+dmd = a regression, then its refinement "
        "(default: that; dmd where --init_student_from is given)",
        START,
    )
    sampling_steps: tuple[int, ...] = flag(
        None,
        "sampling steps of the student: 4, or 2,4,8 for one student that can do each (default 4)",
        START,
        parse=step_counts,
    )
    max_train_steps: int = flag(
        None,
        "optimizer updates of the student, per expert (trajectory+dmd: of the first stage)",
        START,
        free=True,
    )
    height: int = flag(None, "pixels, divisible by 16", START)
    width: int = flag(None, "pixels, divisible by 16", START)
    num_frames: int = flag(None, "frames, 4k+1", START)
    seed: int = flag(0, "seed of every random draw", START)
    gpu: str | None = flag(
        None,
        "with --dry_run: plan for this GPU instead of this machine, e.g. h100, h100:8, a100-80, "
        "rtx-4090",
        START,
        free=True,
    )
    budget: float | None = flag(
        None,
        "hours that the job may take: the plan chooses the number of samples and updates (default: "
        "the usual ones)",
        START,
        free=True,
    )
    dry_run: bool = flag(False, "print the resolved plan and exit", START, free=True)

    expert: str = flag(
        "both",
        "which expert to distil; both = high noise first, then low",
        STUDENT,
        choices=("both", "high", "low"),
        free=True,
    )
    flow_shift: float = flag(
        5.0, "shift of the student's sigmas (not the teacher's: --teacher_shift)", STUDENT
    )
    boundary_ratio: float | None = flag(
        None,
        "sigma at and above which the high expert works (default: as the teacher folder says)",
        STUDENT,
    )
    max_sequence_length: int = flag(
        None, "text tokens that the transformers see, padding included", STUDENT
    )
    rank: int = flag(64, "rank of the LoRA adapters", STUDENT, alias=("--lora_rank",))
    lora_alpha: float = flag(None, "the student's adapter is scaled by alpha / rank", STUDENT)
    lora_layers: tuple[str, ...] = flag(
        LORA_TARGETS,
        "endings of the names of the modules that get an adapter",
        STUDENT,
        alias=("--lora_target_modules",),
        parse=words,
    )
    student_layers: int | None = flag(
        None,
        "a shallower student: this many of the teacher's blocks, all of their weights trained "
        "(--method trajectory)",
        STUDENT,
    )
    init_student_from: str | None = flag(
        None,
        "LoRA that training begins with, in any layout and rank: output folder of an earlier run, "
        "HIGH.safetensors,LOW.safetensors, or a hub id, with a folder in it or without",
        STUDENT,
        parse=paths,
    )

    teacher_lora: tuple[str, ...] = flag(
        (),
        "LoRA that is merged into the teacher, as HIGH.safetensors,LOW.safetensors:STRENGTH, a "
        "folder or a hub id; may be given several times",
        TEACHER,
        parse=paths,
        repeated=True,
        free=True,
    )
    teacher_transformer: str | None = flag(
        None,
        "high expert (or the only one) in place of the pipeline's: a fine-tuned transformer's "
        "folder (of diffusers or the original Wan), or a .safetensors file, also scaled fp8",
        TEACHER,
        parse=path,
        free=True,
    )
    teacher_transformer_2: str | None = flag(
        None, "the same for the low expert", TEACHER, parse=path, free=True
    )
    teacher_steps: int = flag(
        40, "Euler steps of the guided teacher that students are judged by (Wan2.2: 40)", TEACHER
    )
    teacher_solver: str = flag(
        "ab2",
        "how the teacher's samples to learn from are solved: ab2 = Adams-Bashforth of order 2, in "
        "--solver_steps; euler = as the samples that students are judged by",
        TEACHER,
        choices=("ab2", "euler"),
    )
    solver_steps: int = flag(
        16, "--teacher_solver ab2: steps, at the student's --flow_shift", TEACHER
    )
    teacher_shift: float = flag(
        None, "shift of the teacher's sigmas (Wan2.2 T2V-A14B: 12, I2V: 5)", TEACHER
    )
    guidance_scale: float = flag(
        None, "guidance of the high expert; 1 = off (Wan2.2 T2V: 4, I2V: 3.5)", TEACHER
    )
    guidance_scale_2: float = flag(
        None, "guidance of the low expert; 1 = off (Wan2.2 T2V: 3, I2V: 3.5)", TEACHER
    )
    negative_prompt: str = flag(
        None, "negative prompt of the teacher's guidance (default: Wan's own)", TEACHER
    )
    image_source: str | None = flag(
        None,
        "in place of --images: a text-to-video Wan pipeline (hub id or folder; tiny-t2v is "
        "embedded) that makes a clip of each of --prompts, whose first frames are the pictures",
        TEACHER,
        free=True,
        parse=path,
    )
    revision: str | None = flag(
        None, "branch, tag or commit on the hub", TEACHER, alias=("--teacher_revision",)
    )
    variant: str | None = flag(None, "weight file variant, e.g. fp16", TEACHER)
    cache_dir: str | None = flag(
        None, "folder for files from the hub", TEACHER, free=True, parse=path
    )
    verbose_loading: bool = flag(
        False, "show every message of the libraries that load the teacher", TEACHER, free=True
    )
    allow_pickle: bool = flag(
        False,
        "also read .bin weights. Reading them can run code: only for files you trust",
        TEACHER,
        free=True,
    )
