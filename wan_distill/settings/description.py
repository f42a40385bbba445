"""What a teacher's folder says about it, read from its JSON files: no weights, no torch."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import Expert
from wan_distill.settings.assets import EMBEDDED_TEACHER, download
from wan_distill.settings.config import Config

# Wan's own sampling settings. A14B: Wan2.2 wan/configs/wan_t2v_A14B.py; the others: Wan2.1 README,
# TI2V-5B config.
TWO_EXPERTS = dict(teacher_shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0)
ONE_EXPERT = dict(teacher_shift=5.0, guidance_scale=5.0, guidance_scale_2=5.0)
# Enough of a hub repository to describe it; weights are downloaded part by part, when needed.
SKELETON = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "*/*.index.json"]
SAMPLE_BYTES = 1 << 16  # read at the start, the middle and the end of each file for a fingerprint
TRANSFORMER_NUMBERS = (
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "text_dim",
    "freq_dim",
)


@dataclass(frozen=True)
class TeacherInfo:
    """What the configuration files of a Wan pipeline say.

    Attributes:
        source: the hub id or folder that the user gave.
        folder: where the files are on this machine.
        name: the last part of `source`, for the names of output folders.
        embedded: whether this is the tiny teacher that comes with the package.
        boundary_ratio: sigma in (0, 1) at and above which the high expert works; None: one expert.
        expand_timesteps: whether each token has its own timestep (Wan2.2 TI2V-5B).
        transformer, vae: their `config.json`.
    """

    source: str
    folder: Path
    name: str
    embedded: bool
    boundary_ratio: float | None
    expand_timesteps: bool
    transformer: dict[str, Any]
    vae: dict[str, Any]

    @property
    def commit(self) -> str:
        """The commit of a hub teacher: the hub's cache names its folder by it."""
        return self.folder.name

    @property
    def sampling_defaults(self) -> dict[str, float]:
        """`teacher_shift`, `guidance_scale` and `guidance_scale_2` as Wan itself samples."""
        return dict(ONE_EXPERT if self.boundary_ratio is None else TWO_EXPERTS)

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The teacher's experts in the order in which they sample."""
        return ("high",) if self.boundary_ratio is None else ("high", "low")

    @property
    def side_multiple(self) -> int:
        """Height and width in pixels must be multiples of this (A14B: 16, TI2V-5B: 32)."""
        # Pixels per latent times latents per patch.
        return self.vae.get("scale_factor_spatial", 8) * self.transformer["patch_size"][-1]

    def latent_shape(self, config: Config) -> tuple[int, int, int, int]:
        """[C, F, H, W] of one sample's latents. `config` must be resolved."""
        temporal = self.vae.get("scale_factor_temporal", 4)
        spatial = self.vae.get("scale_factor_spatial", 8)
        return (
            self.transformer["in_channels"],
            (config.num_frames - 1) // temporal + 1,
            config.height // spatial,
            config.width // spatial,
        )

    def fingerprint(self, parts: tuple[str, ...] = ("transformer", "transformer_2", "vae")) -> str:
        """32 hexadecimal digits that change when any file of `parts` (folder names) changes.

        Hashed are names, sizes, and 64 KiB at the start, the middle and the end of each file:
        whole files of 28 GB would take minutes. A hub teacher's files may not be downloaded yet,
        so its commit is hashed instead.
        """
        digest = hashlib.sha256((self.folder / "model_index.json").read_bytes())
        if not Path(self.source).is_dir():
            digest.update(self.commit.encode())
            return digest.hexdigest()[:32]
        for part in parts:
            for file in sorted((self.folder / part).glob("*")):
                size = file.stat().st_size
                digest.update(f"{part}/{file.name}:{size}".encode())
                with file.open("rb") as data:
                    for start in (0, size // 2, max(0, size - SAMPLE_BYTES)):
                        data.seek(start)
                        digest.update(data.read(SAMPLE_BYTES))
        return digest.hexdigest()[:32]


def read_teacher(config: Config) -> TeacherInfo:
    """Reads the configuration of the teacher that `--teacher_path` names, downloading it if needed.

    Raises UsageError where there is none, where it is not a Wan text-to-video pipeline, and where
    its files are missing or damaged.
    """
    source = config.teacher_path or str(EMBEDDED_TEACHER)
    folder = Path(source)
    local = folder.is_dir()
    if not local:
        folder = download(source, config.revision, config.cache_dir, SKELETON)
    index = _read_json(folder / "model_index.json", source)
    if index.get("_class_name") != "WanPipeline":
        raise UsageError(
            f"--teacher_path {source}: is a {index.get('_class_name')}; this tool distils "
            "WanPipeline (text to video)"
        )
    transformer = _read_json(folder / "transformer" / "config.json", source)
    check_text_to_video(source, transformer)
    vae = _read_json(folder / "vae" / "config.json", source)
    check_numbers(source, transformer, vae)
    return TeacherInfo(
        source=source,
        folder=folder,
        name=Path(os.path.abspath(source)).name if local else source.rstrip("/").split("/")[-1],
        embedded=folder.resolve() == EMBEDDED_TEACHER.resolve(),
        boundary_ratio=_boundary_ratio(source, index),
        expand_timesteps=bool(index.get("expand_timesteps")),
        transformer=transformer,
        vae=vae,
    )


def check_text_to_video(source: str, transformer: dict[str, Any]) -> None:
    """Raises UsageError for a transformer that also needs an image.

    Image-to-video transformers have an image encoder's width (Wan2.1), or take the image's latents
    and a mask as additional channels: 36 in, 16 out.
    """
    channels_in = transformer.get("in_channels")
    channels_out = transformer.get("out_channels")
    if transformer.get("image_dim") is not None or channels_in != channels_out:
        raise UsageError(
            f"--teacher_path {source}: an image-to-video transformer; give a text-to-video teacher"
        )


def _boundary_ratio(source: str, index: dict[str, Any]) -> float | None:
    """The boundary in `model_index.json`; None for a single transformer. Raises UsageError."""
    second = index.get("transformer_2")
    if not isinstance(second, list) or second[:1] == [None]:
        return None
    boundary = index.get("boundary_ratio")
    if not (isinstance(boundary, float) and 0 < boundary < 1):
        raise UsageError(
            f"--teacher_path {source}: has two transformers but boundary_ratio {boundary} in "
            "model_index.json; set it there (Wan2.2-T2V-A14B: 0.875)"
        )
    return boundary


def check_numbers(source: str, transformer: dict[str, Any], vae: dict[str, Any]) -> None:
    """Raises UsageError where a number that this tool calculates with is not one."""
    channels = transformer.get("in_channels")
    wrong = [
        f"transformer/config.json: {key} {transformer.get(key)}"
        for key in TRANSFORMER_NUMBERS
        if not _is_positive(transformer.get(key))
    ]
    patch = transformer.get("patch_size")
    if not (isinstance(patch, list) and len(patch) == 3 and all(map(_is_positive, patch))):
        wrong.append(f"transformer/config.json: patch_size {patch}")
    wrong += [
        f"vae/config.json: {key} {vae[key]}"
        for key in ("scale_factor_temporal", "scale_factor_spatial")
        if key in vae and not _is_positive(vae[key])
    ]
    wrong += [
        f"vae/config.json: {key} is not {channels} numbers"
        for key in ("latents_mean", "latents_std")
        if vae.get("z_dim") != channels or not _are_numbers(vae.get(key), channels)
    ]
    if wrong:
        raise UsageError(
            f"--teacher_path {source}: {wrong[0]}; that is no Wan model, download it again"
        )


def _is_positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_numbers(values: Any, count: int | None) -> bool:
    """Whether `values` is a list of `count` finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _read_json(file: Path, source: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"--teacher_path {source}: {file.parent.name}/{file.name} is missing; give the folder "
            "of a diffusers WanPipeline"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--teacher_path {source}: {file.name} cannot be read ({error}); download it again"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(
            f"--teacher_path {source}: {file.name} is not a JSON object; download it again"
        )
    return content
