"""Clips in the trackers that show moving pictures."""

from __future__ import annotations

import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import imageio.v3 as imageio
from PIL import Image

FPS = 16
LONGEST_SIDE = 320  # pixels, of the GIF that TensorBoard shows


def log_videos(tracker: Any, clips: Mapping[str, Path], step: int) -> None:
    """Shows `clips`, name -> mp4, in one of accelerate's trackers.

    W&B and Trackio take the files. TensorBoard shows animated GIFs as pictures. Others get nothing.
    """
    if not clips:
        return
    if tracker.name in ("wandb", "trackio"):
        video = importlib.import_module(tracker.name).Video
        tracker.log({name: video(str(file)) for name, file in clips.items()}, step=step)
    elif tracker.name == "tensorboard":
        from torch.utils.tensorboard.summary import Summary

        for name, file in clips.items():
            image = Summary.Image(encoded_image_string=animated(file))
            summary = Summary(value=[Summary.Value(tag=name, image=image)])
            tracker.tracker.file_writer.add_summary(summary, step)


def animated(file: Path) -> bytes:
    """A video as an endless GIF, made smaller where it is large."""
    frames = [Image.fromarray(frame) for frame in imageio.imiter(file)]
    for frame in frames:
        frame.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    out = io.BytesIO()
    first, *others = frames
    first.save(out, "GIF", save_all=True, append_images=others, duration=round(1000 / FPS), loop=0)
    return out.getvalue()
