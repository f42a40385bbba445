#!/usr/bin/env python
"""A prompt in, a video out, with a distilled student; its schedule is read from the student itself.

python sample.py --student outputs/tiny_wan22-trajectory-4steps --prompt "a red ball moves right"
python sample.py --student high_noise_lora.safetensors,low_noise_lora.safetensors --prompt "..."
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy

from wan_distill.errors import UsageError
from wan_distill.settings.checks import check_clip
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo, read_teacher
from wan_distill.system.console import escape_unencodable

NAME_BYTES = 180  # of a video's name, in UTF-8: file systems allow 255 in all
FLAGS: dict[str, dict[str, Any]] = {
    "--student": dict(
        required=True, help="output folder of a run, or its files separated by commas"
    ),
    "--prompt": dict(help="what to show"),
    "--vbench_prompts": dict(
        metavar="FILE",
        help="instead: --samples videos of every prompt in a file, in the folder --out, under the "
        "names that VBench reads",
    ),
    "--samples": dict(
        type=int, default=5, help="videos per prompt with --vbench_prompts (VBench's own: 5)"
    ),
    "--out": dict(
        help="where the video goes (default: video.mp4, or video-1.mp4, ... where that exists; "
        "with --vbench_prompts the folder vbench)"
    ),
    "--teacher_path": dict(
        help="hub id or folder of the teacher (default: the one the student was made from)"
    ),
    "--revision": dict(help="the teacher's branch, tag or commit (default: as trained)"),
    "--variant": dict(help="variant of the teacher's weight files (default: as trained)"),
    "--cache_dir": dict(help="folder for files from the hub"),
    "--allow_pickle": dict(
        action="store_true",
        help="also read .bin weights. Reading them can run code: only for files you trust",
    ),
    "--steps": dict(
        type=int, help="one of the step counts the student was trained for (default: the largest)"
    ),
    "--height": dict(type=int, help="pixels (default: as trained)"),
    "--width": dict(type=int, help="pixels (default: as trained)"),
    "--num_frames": dict(type=int, help="frames, 4k+1 (default: as trained)"),
    "--seed": dict(type=int, default=0, help="seed of the noise (default 0)"),
    "--fps": dict(type=int, default=16, help="frames per second (default 16)"),
    "--compare": dict(
        action="store_true", help="also sample with the guided teacher, and put it on the left"
    ),
    "--offload": dict(
        action="store_true", help="keep only the part of the pipeline that computes on the GPU"
    ),
    "--allow_other_teacher": dict(
        action="store_true", help="use the LoRAs on a teacher they were not made for"
    ),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sample.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 bad input (one line says what to change)",
    )
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input."""
    escape_unencodable()
    try:
        return run(build_parser().parse_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    """Refuses what it can before weights load, then writes each video. Raises UsageError."""
    check_numbers(args)
    videos = wanted_videos(args)

    from wan_distill.results.sampling import (
        TEACHER_STEPS,
        check_teacher,
        find_student,
        has_teacher_beneath,
        load_pipeline,
        read_schedule,
        sample_clip,
        sample_teacher,
        teacher_config,
    )
    from wan_distill.system.pictures import write_video

    files = find_student(args.student)
    student = read_schedule(files)
    names = ("teacher_path", "revision", "variant", "cache_dir", "allow_pickle")
    config = teacher_config(student, {name: getattr(args, name) for name in names})
    info = read_teacher(config)
    check_teacher(info, student, args.allow_other_teacher)
    clip = clip_settings(args, student, info)
    call = dict(num_inference_steps=steps_of(args, student), guidance_scale=1.0, **clip)

    pipe = load_pipeline(info, config, files, args.offload)
    teacher = pipe
    if args.compare and not has_teacher_beneath(student):
        teacher = load_pipeline(info, config, [], args.offload)
    for prompt, seed, file in videos:
        frames, seconds = sample_clip(pipe, prompt, seed, student["flow_shift"], call)
        print(f"student: {call['num_inference_steps']} steps, {seconds:.2f} s")
        if args.compare:
            reference, slow = sample_teacher(teacher, prompt, seed, info, clip)
            ratio = f"{slow / seconds:.1f}x"
            print(f"teacher: {TEACHER_STEPS} guided steps, {slow:.2f} s; speed-up {ratio}")
            frames = numpy.concatenate([reference, frames], axis=2)  # along the width
        print(f"wrote {write_video(file, frames, args.fps)}")
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError for a count or a size that is not positive."""
    for name in ("samples", "steps", "height", "width", "num_frames", "fps"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be greater than 0")


def wanted_videos(args: argparse.Namespace) -> list[tuple[str, int, Path]]:
    """(prompt, seed, file) of each video to make. Raises UsageError.

    Those of an interrupted series for VBench that exist already are left out.
    """
    if (args.prompt is None) == (args.vbench_prompts is None):
        raise UsageError("--prompt: give one, or --vbench_prompts FILE, and not both")
    if args.prompt is not None:
        file = Path(args.out) if args.out else unused_name(Path("video.mp4"))
        return [(args.prompt, args.seed, file)]
    from wan_distill.data.prompts import read_prompts

    folder = Path(args.out or "vbench")
    names = file_names(read_prompts(args.vbench_prompts, partial(print, file=sys.stderr)))
    series = [
        (prompt, args.seed + i, folder / f"{name}-{i}.mp4")
        for prompt, name in names.items()
        for i in range(args.samples)
    ]
    return [video for video in series if not exists(video[2])]


def exists(video: Path) -> bool:
    """Whether `video` was written, as a video or, where no encoder is installed, as a strip."""
    return video.exists() or video.with_suffix(".png").exists()


def unused_name(video: Path) -> Path:
    """`video` or, where it exists, the first of `video-1`, `video-2`, ... that does not."""
    numbered = (video.with_stem(f"{video.stem}-{number}") for number in itertools.count(1))
    return next(file for file in itertools.chain([video], numbered) if not exists(file))


def file_names(prompts: list[str]) -> dict[str, str]:
    """Each prompt as part of a file's name on every system; VBench's own prompts stay as they are.

    Those that are too long, and those that would have the name of an earlier one, also where large
    and small letters are the same, end in a hash.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for prompt in prompts:
        name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", prompt).strip(" .") or "_"
        if len(name.encode()) > NAME_BYTES or name.casefold() in taken:
            digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
            name = f"{name.encode()[:NAME_BYTES].decode(errors='ignore').strip(' .')}-{digest}"
        taken.add(name.casefold())
        names[prompt] = name
    return names


def steps_of(args: argparse.Namespace, student: dict[str, Any]) -> int:
    """The number of steps to sample in. Raises UsageError where it was not trained for."""
    trained: list[int] = student["sampling_steps"]
    steps = args.steps or max(trained)
    if steps not in trained:
        raise UsageError(
            f"--steps {steps}: this student was trained for {' or '.join(map(str, trained))} "
            "steps; use one of those"
        )
    return steps


def clip_settings(
    args: argparse.Namespace, student: dict[str, Any], info: TeacherInfo
) -> dict[str, int]:
    """Size and text length, as the pipeline's arguments. Raises UsageError for impossible sizes."""
    clip = {key: getattr(args, key) or student[key] for key in ("height", "width", "num_frames")}
    clip["max_sequence_length"] = student["max_sequence_length"]
    check_clip(Config(**clip), info.side_multiple)
    return clip


if __name__ == "__main__":
    sys.exit(main())
