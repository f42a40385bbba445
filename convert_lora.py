#!/usr/bin/env python
"""LoRAs for Wan from one program's layout into another's, and out of fine-tuned experts.

python convert_lora.py high_noise_lora.safetensors for_musubi.safetensors --to kohya
python convert_lora.py style.safetensors --extract wan2.2_high.safetensors my_high.safetensors
"""

from __future__ import annotations

from wan_distill.interrupts import end_quietly

if __name__ == "__main__":
    end_quietly()  # Ctrl-C while the rest is imported

import argparse
import os
import sys
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.settings.flags import path
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_names import LAYOUTS
from wan_distill.settings.lora_sources import expert_of_file
from wan_distill.settings.one_line_parser import OneLineParser
from wan_distill.settings.other_names import command_name
from wan_distill.system.endings import ended
from wan_distill.system.notices import keep_notices


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=command_name("convert_lora.py", "wan-distill-convert"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 bad input (one line says what to change)",
    )
    parser.add_argument(
        "files", nargs="*", type=path, metavar="FILE", help="IN and OUT; with --extract OUT alone"
    )
    parser.add_argument(
        "--to",
        choices=LAYOUTS,
        default="comfyui",
        help="comfyui (default; also read by WanVideoWrapper, LightX2V, DiffSynth and diffusers), "
        "diffusers (peft's names, alpha multiplied in), kohya (musubi-tuner)",
    )
    parser.add_argument(
        "--expert",
        choices=("high", "low"),
        help="whose LoRA to take out of a file that holds both",
    )
    parser.add_argument(
        "--extract",
        nargs=2,
        type=path,
        metavar=("BASE", "TUNED"),
        help="instead: the difference of two experts (.safetensors of any layout, or a "
        "transformer's folder)",
    )
    parser.add_argument("--rank", type=int, help="rank with --extract (default 64)")
    parser.add_argument(
        "--dtype", choices=("bf16", "float32"), help="with --extract (default bf16)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 130 stopped by Ctrl-C, 1 a disk that fails."""
    return ended(lambda: run(build_parser().parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    """Writes one file and says what it holds. Raises UsageError."""
    wanted = 1 if args.extract else 2
    if len(args.files) != wanted:
        given = " ".join(args.files) or "FILE"
        raise UsageError(f"{given}: give {'OUT alone' if args.extract else 'IN and OUT'}")
    out = Path(args.files[-1])
    if out.exists():
        raise UsageError(f"{out}: exists already; choose another name, or move it away")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UsageError(f"{out}: give a name that ends in .safetensors, in a folder that exists")
    if not os.access(out.parent, os.W_OK):
        raise UsageError(f"{out}: this user may not write into {out.parent}; choose another folder")
    useless = ("expert",) if args.extract else ("rank", "dtype")
    for name in useless:
        if (value := getattr(args, name)) is not None:
            where = "with" if args.extract else "without"
            raise UsageError(f"--{name} {value}: does nothing {where} --extract; leave it out")
    rank = 64 if args.rank is None else args.rank
    if rank < 1:
        raise UsageError(f"--rank {rank}: must be greater than 0")

    with keep_notices():
        from wan_distill.model import lora_conversion  # torch is imported once the flags are right

    if args.extract:
        base, tuned = map(Path, args.extract)
        print(lora_conversion.extract_lora(base, tuned, out, rank, args.to, args.dtype or "bf16"))
        return 0
    source = Path(args.files[0])
    if not source.is_file():
        raise UsageError(f"{source}: there is no such file; check the spelling")
    part = SUBFOLDER[args.expert] if args.expert else None
    header = LoraHeader(source, "IN", part)
    if args.expert is None and len(header.transformers) > 1:
        raise UsageError(f"{source}: holds LoRAs of both experts; give --expert high or low")
    said = expert_of_file(header)
    if args.expert and len(header.transformers) < 2 and said not in (None, args.expert):
        raise UsageError(f"--expert {args.expert}: {source} says that it is for the {said} one")
    print(lora_conversion.convert(header, out, args.to))
    return 0


if __name__ == "__main__":
    sys.exit(main())
