#!/usr/bin/env python
"""A prompt in, a video out, with a distilled student; its schedule is read from the student itself.

python sample.py --student outputs/tiny_wan22-trajectory+dmd-4steps \\
    --prompt "a small red circle moving left"
python sample.py --student high_noise_lora.safetensors,low_noise_lora.safetensors --prompt "..."
"""

from __future__ import annotations

from wan_distill.interrupts import end_quietly

if __name__ == "__main__":
    end_quietly()  # Ctrl-C while the rest is imported

import argparse
import hashlib
import itertools
import os
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.layout import strip_of
from wan_distill.maths.sigmas import sigma_grid, steps_of
from wan_distill.settings.clip_sizes import check_clip, check_positions
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.flags import path, paths, text
from wan_distill.settings.one_line_parser import OneLineParser
from wan_distill.settings.other_names import SAMPLING, command_name
from wan_distill.settings.ranges import check_fps
from wan_distill.settings.schedulers import check_diffusers
from wan_distill.settings.series import check_all_replaced, check_series, settings_of
from wan_distill.settings.students import find_student, is_declared, student_schedule
from wan_distill.system.endings import ended
from wan_distill.system.notices import keep_notices

LONGEST_NAME = 242  # bytes: file systems allow 255, and a video that is written has 13 more
NAME_BYTES = 180  # of a video's name, in UTF-8: file systems allow 255 in all
# Flag -> folder, and videos per prompt: VBench's own number is 5.
SERIES = {"prompts": ("videos", 1), "vbench_prompts": ("vbench", 5)}
CHANGES = ("teacher_lora", "teacher_transformer", "teacher_transformer_2")
FLAGS: dict[str, dict[str, Any]] = {
    "--student": dict(
        type=paths,
        help="output folder of a run, or its files separated by commas; or LoRAs of another tool "
        "(HIGH,LOW, a folder, or on the hub), with --teacher_path, --flow_shift and --steps",
    ),
    "--prompt": dict(type=text, help="what to show"),
    "--image": dict(
        type=path, metavar="FILE", help="picture that clips of an image-to-video student begin with"
    ),
    "--prompts": dict(
        type=path,
        metavar="FILE",
        help="instead: a video of every prompt in a file, in the folder --out. Those that exist "
        "already are left out",
    ),
    "--vbench_prompts": dict(
        type=path, metavar="FILE", help="the same with VBench's number of videos per prompt, 5"
    ),
    "--samples": dict(
        type=int, help="videos per prompt, with seeds --seed, --seed + 1, ... (default 1; VBench 5)"
    ),
    "--out": dict(
        type=path,
        help="where the video of --prompt goes; further ones get -1, -2, ... before .mp4 (default: "
        "video.mp4, video-1.mp4, ... without those that exist). For a file of prompts: the folder "
        "(default: videos, vbench)",
    ),
    "--overwrite": dict(action="store_true", help="replace videos that exist"),
    "--teacher_path": dict(
        type=path,
        help="hub id or folder of the teacher (default: the one the student was made from)",
    ),
    "--revision": dict(type=text, help="the teacher's branch, tag or commit (default: as trained)"),
    "--variant": dict(
        type=text, help="variant of the teacher's weight files (default: as trained)"
    ),
    "--cache_dir": dict(type=path, help="folder for files from the hub"),
    "--allow_pickle": dict(
        action="store_true",
        help="also read .bin weights. Reading them can run code: only for files you trust",
    ),
    "--teacher_lora": dict(
        action="append", help="LoRA merged into the teacher, as in training (default: as trained)"
    ),
    "--teacher_transformer": dict(
        help="high expert in place of the pipeline's (default: as trained)"
    ),
    "--teacher_transformer_2": dict(help="the same for the low expert"),
    "--steps": dict(
        type=int, help="one of the step counts the student was trained for (default: the largest)"
    ),
    "--flow_shift": dict(
        type=float, help="shift of the student's sigmas, where its files do not say it"
    ),
    "--height": dict(type=int, help="pixels (default: as trained)"),
    "--width": dict(type=int, help="pixels (default: as trained)"),
    "--num_frames": dict(type=int, help="frames, 4k+1 (default: as trained)"),
    "--seed": dict(type=int, default=0, help="seed of the noise (default 0)"),
    "--fps": dict(type=int, default=16, help="frames per second (default 16)"),
    "--compare": dict(
        action="store_true",
        help="also sample with the guided teacher, and put it on the left; says how long both take",
    ),
    "--offload": dict(
        action="store_true", help="keep only the part of the pipeline that computes on the GPU"
    ),
    "--allow_other_teacher": dict(
        action="store_true", help="use the LoRAs on a teacher they were not made for"
    ),
}


def build_parser() -> OneLineParser:
    parser = OneLineParser(
        prog=command_name("sample.py", "wan-distill-sample"),
        other_names=SAMPLING,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 bad input (one line says what to change)",
    )
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 130 stopped by Ctrl-C, 1 a disk that fails."""
    stopped = "Stopped; videos that are finished stay."
    return ended(lambda: run(build_parser().parse_args(argv)), stopped)


def run(args: argparse.Namespace) -> int:
    """Refuses what it can before weights load, then writes each video. Raises UsageError."""
    check_numbers(args)
    videos = wanted_videos(args)
    files = find_student(args.student, args.cache_dir)
    student = student_schedule(files, vars(args))
    check_diffusers(student)
    steps = chosen_steps(args, student)
    series = None if args.prompt else settings_of(args, files, steps)
    outdated: list[Path] = []
    if series:
        try:
            check_series(folder_of_series(args), series)
        except UsageError:
            if not args.overwrite:
                raise
            outdated = [file for _, _, file in videos]
            check_all_replaced(folder_of_series(args), outdated)
    if not videos:
        print("all videos are there")
        return 0

    with keep_notices():
        from wan_distill.results import sampling
        from wan_distill.results import student as made

    made.check_folders({file.parent for _, _, file in videos})
    names = ("teacher_path", "revision", "variant", "cache_dir", "allow_pickle", *CHANGES)
    chosen = {name: getattr(args, name) for name in names}
    chosen["teacher_lora"] = chosen["teacher_lora"] and tuple(chosen["teacher_lora"])
    info, config = made.find_teacher(student, chosen, args.allow_other_teacher)
    clip = clip_settings(args, student, info)
    made.check_prompts(info, clip["max_sequence_length"], [video[0] for video in videos])
    taught = info
    if is_declared(student):
        taught, student["experts"] = made.merged_into(info, args.student, config)
        files = []
    else:
        made.check_teacher(info, student, args.allow_other_teacher)
        made.check_fits(info, files)
    clip |= sampling.given_picture(args.image, info, clip)
    call = dict(num_inference_steps=steps, guidance_scale=1.0, **clip)
    if missing := experts_without_student(student, steps, info):
        print(
            f"--student {args.student}: half a student: nothing of the {' and '.join(missing)} "
            "expert, which is sampled as the teacher's; give both files, separated by a comma",
            file=sys.stderr,
        )
    print(what_it_will_do(args, videos, steps, clip, info), flush=True)

    pipe = sampling.load_pipeline(taught, config, files, args.offload)
    teacher = pipe if args.compare else None
    if args.compare and not made.has_teacher_beneath(student):
        teacher = sampling.load_pipeline(info, config, [], args.offload)
    for file in outdated:  # if this is interrupted, they must not pass as the new ones
        file.unlink(missing_ok=True)
        strip_of(file).unlink(missing_ok=True)
    if series:
        made.note_series(folder_of_series(args), series)
    place = free_name if args.prompt and not args.overwrite else Path
    shift = student["flow_shift"]
    sampling.make_videos(videos, args.fps, pipe, shift, call, info, teacher, place)
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError where there is no student, and for a number outside its range."""
    if args.student is None:
        raise UsageError("--student: give one: the output folder of a run, or LoRA files")
    for name in ("samples", "steps", "height", "width", "num_frames", "fps", "flow_shift"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise UsageError(f"--{name} {value}: must be greater than 0")
    check_fps(args.fps)
    if not 0 <= args.seed < 2**63:
        raise UsageError(f"--seed {args.seed}: must be at least 0 and below 2^63")


def wanted_videos(args: argparse.Namespace) -> list[tuple[str, int, Path]]:
    """(prompt, seed, file) of each video to make. Raises UsageError.

    Those of an interrupted series that exist already are left out.
    """
    sources = dict(prompt=args.prompt, prompts=args.prompts, vbench_prompts=args.vbench_prompts)
    (flag, source), *others = [each for each in sources.items() if each[1] is not None] or [
        ("", "")
    ]
    if others or not flag:
        raise UsageError("--prompt: give one, or --prompts FILE, or --vbench_prompts FILE")
    if flag == "prompt":
        files = files_of_prompt(args)
        return [(args.prompt, args.seed + i, file) for i, file in enumerate(files)]
    with keep_notices():
        from wan_distill.data.prompts import read_prompts

    folder, count = folder_of_series(args), SERIES[flag][1]
    if folder.suffix.lower() == ".mp4":
        raise UsageError(f"--out {args.out}: --{flag} makes several videos; give a folder")
    try:
        prompts = read_prompts(source, partial(print, file=sys.stderr))
    except UsageError as error:
        raise UsageError(str(error).replace("--prompts", f"--{flag}", 1)) from error
    series = [
        (prompt, args.seed + i, folder / f"{name}-{i}.mp4")
        for prompt, name in file_names(prompts).items()
        for i in range(args.samples or count)
    ]
    left = series if args.overwrite else [video for video in series if not exists(video[2])]
    if len(left) < len(series):
        print(f"{len(series) - len(left)} of {len(series)} videos are in {folder} already")
    return left


def folder_of_series(args: argparse.Namespace) -> Path:
    """Where the videos of a file of prompts go."""
    usual = next(folder for flag, (folder, _) in SERIES.items() if getattr(args, flag) is not None)
    return Path(args.out or usual)


def files_of_prompt(args: argparse.Namespace) -> list[Path]:
    """The files of --prompt's videos. Raises UsageError where --prompt or --out cannot be.

    Without --out they are names that nothing has yet.
    """
    if any("\ud800" <= character <= "\udfff" for character in args.prompt):
        raise UsageError(f"--prompt {args.prompt!a}: is no text of the terminal's encoding")
    count = args.samples or 1
    if args.out is None:
        videos = numbered(Path("video.mp4"))
        free = (file for file in videos if args.overwrite or not exists(file))
        return list(itertools.islice(free, count))
    if os.path.isdir(args.out):
        raise UsageError(f"--out {args.out}: is a folder; name a file in it, such as video.mp4")
    if Path(args.out).suffix.lower() != ".mp4":
        raise UsageError(f"--out {args.out}: videos are written as mp4; give a name with .mp4")
    files = list(itertools.islice(numbered(Path(args.out)), count))
    if len(os.fsencode(files[-1].name)) > LONGEST_NAME:
        raise UsageError(f"--out {args.out}: is too long a name; choose another")
    if not args.overwrite and (taken := next(filter(exists, files), None)):
        raise UsageError(f"--out {taken}: exists; choose another name, or --overwrite")
    return files


def exists(video: Path) -> bool:
    """Whether `video` was written, as a video or, where no encoder is installed, as a strip."""
    return video.exists() or strip_of(video).exists()


def free_name(video: Path) -> Path:
    """`video` or, where another program has made it meanwhile, the next name that nothing has."""
    return next(file for file in numbered(video) if not exists(file))


def numbered(video: Path) -> Iterator[Path]:
    """`video`, and then `video-1`, `video-2`, ... without an end."""
    yield video
    for number in itertools.count(1):
        yield video.with_stem(f"{video.stem}-{number}")


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


def what_it_will_do(
    args: argparse.Namespace,
    videos: list[tuple[str, int, Path]],
    steps: int,
    clip: dict[str, int],
    info: TeacherInfo,
) -> str:
    """One line, before minutes of loading."""
    (prompt, seed, file), many = videos[0], len(videos) > 1
    what = f"{len(videos)} videos" if many else f"a video of {prompt!r}"
    where = f"the folder {file.parent}" if many else f"{file}"
    size = f"{clip['num_frames']} frames of {clip['height']}x{clip['width']}"
    beside = ", beside its teacher's" if args.compare else ""
    return (
        f"Makes {what}{beside}: {size} in {steps} steps, from seed {seed}, to {where}; loads "
        f"{info.title} first"
    )


def experts_without_student(student: dict[str, Any], steps: int, info: TeacherInfo) -> list[str]:
    """The experts that work in `steps` steps and that no file of --student is for."""
    grid = sigma_grid(steps, student["flow_shift"])
    return [
        expert
        for expert in info.experts
        if expert not in student["experts"] and steps_of(expert, grid, info.boundary_ratio)
    ]


def chosen_steps(args: argparse.Namespace, student: dict[str, Any]) -> int:
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
) -> dict[str, Any]:
    """Size and text length, as the pipeline's arguments. Raises UsageError for impossible sizes."""
    made = info.sampling_defaults | student
    clip = {key: getattr(args, key) or made[key] for key in ("height", "width", "num_frames")}
    clip["max_sequence_length"] = made["max_sequence_length"]
    check_clip(Config(**clip), info.side_multiple)
    check_positions(Config(**clip), info)
    return clip


if __name__ == "__main__":
    sys.exit(main())
