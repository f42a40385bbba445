"""Clips as pictures."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor


def contact_sheet(
    file: Path, clips: dict[str, Tensor], prompts: list[str], frames: int = 6
) -> None:
    """One block a prompt; in it one row a sampler, its clip's frames from left to right.

    Args:
        clips: sampler name -> [prompts, F, H, W, 3] in [0, 1].
    """
    height, width = next(iter(clips.values())).shape[2:4]
    scale = max(1, 96 // height)
    tall, wide, label = height * scale, width * scale, 190
    block = len(clips) * (tall + 2) + 26
    sheet = Image.new("RGB", (label + frames * (wide + 2), block * len(prompts)), "white")
    draw = ImageDraw.Draw(sheet)
    for p, prompt in enumerate(prompts):
        draw.text((6, p * block + 7), prompt[:110], fill="black")
        for r, (name, clip) in enumerate(clips.items()):
            top = p * block + 24 + r * (tall + 2)
            draw.text((6, top + tall // 2 - 6), name, fill="black")
            chosen = torch.linspace(0, clip.shape[1] - 1, min(frames, clip.shape[1])).round().long()
            for c, frame in enumerate(clip[p, chosen]):
                picture = Image.fromarray((frame * 255).round().byte().numpy())
                sheet.paste(
                    picture.resize((wide, tall), Image.Resampling.NEAREST),
                    (label + c * (wide + 2), top),
                )
    temporary = file.with_name(f".{file.name}")
    sheet.save(temporary, format="PNG")
    temporary.replace(file)


def write_video(file: Path, frames: numpy.ndarray, fps: int) -> Path:
    """Writes [F, H, W, 3] frames in [0, 1] as mp4; where no encoder is installed, as a PNG strip
    beside it.

    Returns the file that was written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        strip = file.with_suffix(".png")
        picture = numpy.concatenate(list(frames), axis=1)
        Image.fromarray((picture * 255).round().astype("uint8")).save(strip)
        return strip
    from diffusers.utils import export_to_video

    temporary = file.with_name(f".{file.stem}.partial.mp4")
    export_to_video(list(frames), str(temporary), fps=fps, macro_block_size=2)
    temporary.replace(file)
    return file
