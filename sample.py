#!/usr/bin/env python
"""A prompt in, a video out, with a distilled student; its schedule is read from the student itself.

python sample.py --student outputs/tiny_wan22-trajectory-4steps --prompt "a red ball moves right"
python sample.py --student high_noise_lora.safetensors,low_noise_lora.safetensors --prompt "..."
--compare
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.system.console import speak_plainly

SAME_SCHEDULE = ("teacher", "sampling_steps", "flow_shift", "boundary_ratio", "max_sequence_length")
TEACHER_STEPS = 40  # Wan2.2's own


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 bad input (one line says what to change)",
    )
    add = parser.add_argument
    add(
        "--student",
        required=True,
        help="output folder of a run, or its LoRA files separated by commas",
    )
    add("--prompt", help="what to show")
    add(
        "--vbench_prompts",
        metavar="FILE",
        help="instead: every prompt of a file, --samples videos each, into the "
        "folder --out under the names VBench reads",
    )
    add(
        "--samples",
        type=int,
        default=5,
        help="videos a prompt with --vbench_prompts (default 5, as VBench wants)",
    )
    add(
        "--out",
        help="where the video goes (default video.mp4; with --vbench_prompts the folder vbench)",
    )
    add(
        "--teacher_path",
        help="hub id or folder of the teacher (default: the one the student was made from)",
    )
    add(
        "--steps",
        type=int,
        help="one of the step counts the student was trained for (default: the largest)",
    )
    add("--height", type=int, help="pixels (default: as trained)")
    add("--width", type=int, help="pixels (default: as trained)")
    add("--num_frames", type=int, help="frames, 4k+1 (default: as trained)")
    add("--seed", type=int, default=0, help="seed of the noise (default 0)")
    add("--fps", type=int, default=16, help="frames a second (default 16)")
    add(
        "--compare",
        action="store_true",
        help="also let the guided teacher sample, and put it on the left",
    )
    add("--offload", action="store_true", help="keep only the part at work on the GPU")
    add(
        "--allow_other_teacher",
        action="store_true",
        help="use the LoRAs on a teacher they were not made for",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    speak_plainly()
    try:
        return run(build_parser().parse_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Checks everything that can be refused without weights, then samples."""
    from wan_distill.settings.description import read_teacher

    videos = wanted(args)
    loras = find_loras(args.student)
    meta = check_schedules(loras)
    config = Config(teacher_path=args.teacher_path or meta["teacher"])
    info = read_teacher(config)
    check_teacher(info, meta, args.allow_other_teacher)
    steps = args.steps or max(meta["sampling_steps"])
    if steps not in meta["sampling_steps"]:
        trained = " or ".join(map(str, meta["sampling_steps"]))
        raise UsageError(
            f"--steps {steps}: this student was trained for {trained} steps; use one of those"
        )
    size = {key: getattr(args, key) or meta[key] for key in ("height", "width", "num_frames")}

    from wan_distill.system.pictures import write_video

    pipe = teacher = load(info, config, loras, args.offload)
    if args.compare and meta.get("student_layers"):  # there is no teacher beneath this student
        teacher = load(info, config, [], args.offload)
    call = dict(max_sequence_length=meta["max_sequence_length"], **size)
    student_call = dict(call, num_inference_steps=steps, guidance_scale=1.0)
    for prompt, seed, file in videos:
        if file.exists() and args.vbench_prompts:
            continue  # an interrupted series goes on
        frames, seconds = timed(pipe, seed, meta["flow_shift"], prompt=prompt, **student_call)
        print(f"student: {steps} steps, {seconds:.2f} s")
        if args.compare:
            frames = beside_teacher(teacher, info, frames, seconds, dict(call, prompt=prompt), seed)
        print(f"wrote {write_video(file, frames, args.fps)}")
    return 0


def wanted(args: argparse.Namespace) -> list[tuple[str, int, Path]]:
    """(prompt, seed, file) of every video to make. Raises UsageError."""
    if (args.prompt is None) == (args.vbench_prompts is None):
        raise UsageError("--prompt: give one, or --vbench_prompts FILE, and not both")
    if args.prompt is not None:
        return [(args.prompt, args.seed, Path(args.out or "video.mp4"))]
    from wan_distill.data.prompts import read_prompts

    folder = Path(args.out or "vbench")
    return [
        (prompt, args.seed + i, folder / f"{file_name(prompt)}-{i}.mp4")
        for prompt in read_prompts(args.vbench_prompts)
        for i in range(args.samples)
    ]


def file_name(prompt: str) -> str:
    """`prompt` as part of a file's name on every system; VBench's own prompts stay as they are."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", prompt)[:180].strip(" .") or "_"


def beside_teacher(pipe, info, student, seconds: float, call: dict, seed: int):
    """The guided teacher's clip from the same seed, with the student's to its right."""
    import numpy

    defaults = info.sampling_defaults
    guidance = dict(guidance_scale=defaults["guidance_scale"])
    if len(info.experts) == 2:
        guidance["guidance_scale_2"] = defaults["guidance_scale_2"]
    adapters = any(pipe.get_list_adapters().values())
    if adapters:
        pipe.disable_lora()
    teacher, slow = timed(
        pipe,
        seed,
        defaults["teacher_shift"],
        num_inference_steps=TEACHER_STEPS,
        **guidance,
        **call,
        negative_prompt="" if info.embedded else WAN_NEGATIVE_PROMPT,
    )
    if adapters:
        pipe.enable_lora()
    print(f"teacher: {TEACHER_STEPS} guided steps, {slow:.2f} s; speed-up {slow / seconds:.1f}x")
    return numpy.concatenate([teacher, student], axis=2)  # along the width


def find_loras(student: str) -> list[Path]:
    """The files of the experts meant by --student. Raises UsageError where there is none."""
    from wan_distill.layout import LORA_FILE, student_file

    if Path(student).is_dir():
        files = [file for expert in LORA_FILE if (file := student_file(student, expert)).exists()]
        if not files:
            raise UsageError(
                f"--student {student}: holds none of {', '.join(LORA_FILE.values())}; train first"
            )
        return files
    files = [Path(name) for name in student.split(",")]
    for file in files:
        if not file.is_file():
            raise UsageError(f"--student {file}: there is no such file or folder")
    return files


def check_schedules(loras: list[Path]) -> dict:
    """The metadata all `loras` share. Raises UsageError where they belong to different students."""
    from wan_distill.model.student_files import read_metadata

    metas = [read_metadata(file) for file in loras]
    for file, meta in zip(loras[1:], metas[1:], strict=True):
        differing = [
            f"{k} {meta[k]} against {metas[0][k]}" for k in SAME_SCHEDULE if meta[k] != metas[0][k]
        ]
        if meta["expert"] == metas[0]["expert"]:
            differing.append(f"both are for the {meta['expert']} expert")
        if differing:
            raise UsageError(
                f"--student {file}: belongs to another student than {loras[0]} "
                f"({'; '.join(differing)}); "
                "give the two files of one run"
            )
    return metas[0]


def check_teacher(info, meta: dict, allow_other: bool) -> None:
    """Raises UsageError where the LoRAs were made for another teacher than the one at hand."""
    same_hub_id = info.source == meta["teacher"] and not Path(info.source).is_dir()
    if allow_other or same_hub_id or info.fingerprint() == meta["teacher_fingerprint"]:
        return
    raise UsageError(
        f"--teacher_path {info.source}: this student was made from {meta['teacher']}, and these "
        "files are "
        "not known to be the same; give that one, or --allow_other_teacher to try it anyway"
    )


def load(info, config: Config, loras: list[Path], offload: bool):
    """The teacher's pipeline with a verified text encoder and the student's LoRAs."""
    import torch
    from diffusers import WanPipeline

    from wan_distill.errors import TextEncoderError
    from wan_distill.model.student_files import load_student, read_metadata
    from wan_distill.settings.description import download
    from wan_distill.umt5.repair import load_text_encoder
    from wan_distill.umt5.silence import silence_tied_weight_report

    dtype = torch.float32 if info.embedded or not torch.cuda.is_available() else torch.bfloat16
    parts = ["text_encoder/*", "vae/*", "transformer*/*"]
    folder = (
        info.folder
        if Path(info.source).is_dir()
        else download(info.source, info.commit, config.cache_dir, parts)
    )
    try:
        with silence_tied_weight_report(False):
            encoder, _ = load_text_encoder(folder, torch_dtype=dtype)
            pipe = WanPipeline.from_pretrained(folder, text_encoder=encoder, torch_dtype=dtype)
    except TextEncoderError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    pipe.vae.to(torch.float32)  # as in training: bf16 shows as banding
    for file in loras:
        meta = read_metadata(file)
        if meta.get("student_layers"):
            load_student(getattr(pipe, meta["subfolder"]), file)
        else:
            pipe.load_lora_weights(
                str(file.parent),
                weight_name=file.name,
                adapter_name=meta["expert"],
                load_into_transformer_2=meta["expert"] == "low",
            )
    if offload and torch.cuda.is_available():
        pipe.enable_model_cpu_offload()
    else:
        pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return pipe


def timed(pipe, seed: int, shift: float, **call):
    """Frames [F, H, W, 3] in [0, 1] of one clip from `seed`, and the seconds they took, decoding
    included.
    """
    import torch
    from diffusers import FlowMapEulerDiscreteScheduler

    pipe.scheduler = FlowMapEulerDiscreteScheduler(shift=shift)
    started = time.perf_counter()
    frames = pipe(generator=torch.Generator().manual_seed(seed), output_type="np", **call).frames[0]
    return frames, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
