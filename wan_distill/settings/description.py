"""What a teacher's folder says about it, read from its JSON files: no weights, no torch."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from wan_distill.errors import UsageError
from wan_distill.maths.sigmas import Expert
from wan_distill.settings.assets import EMBEDDED_TEACHER
from wan_distill.settings.config import Config

# Wan's own sampling settings. A14B: Wan2.2 wan/configs/wan_t2v_A14B.py; the others: Wan2.1 README,
# TI2V-5B config.
TWO_EXPERTS = dict(teacher_shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0)
ONE_EXPERT = dict(teacher_shift=5.0, guidance_scale=5.0, guidance_scale_2=5.0)
SKELETON = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "*/*.index.json"]


@dataclass(frozen=True)
class TeacherInfo:
    """What the configuration files of a Wan pipeline say."""

    source: str
    folder: Path
    name: str
    embedded: bool
    boundary_ratio: float | None
    expand_timesteps: bool
    transformer: dict
    vae: dict

    @property
    def commit(self) -> str:
        """Of a hub teacher: the snapshot's, by which its folder in the cache is named."""
        return self.folder.name

    @property
    def sampling_defaults(self) -> dict:
        return ONE_EXPERT if self.boundary_ratio is None else TWO_EXPERTS

    @property
    def experts(self) -> tuple[Expert, ...]:
        return ("high",) if self.boundary_ratio is None else ("high", "low")

    @property
    def side_multiple(self) -> int:
        """Height and width in pixels are multiples of this: pixels a latent times latents a patch
        (TI2V-5B: 32).
        """
        return self.vae.get("scale_factor_spatial", 8) * self.transformer["patch_size"][-1]

    def latent_shape(self, config: Config) -> tuple[int, int, int, int]:
        """[C, F, H, W] of one sample's latents."""
        temporal, spatial = (
            self.vae.get("scale_factor_temporal", 4),
            self.vae.get("scale_factor_spatial", 8),
        )
        frames = (config.num_frames - 1) // temporal + 1
        return (
            self.transformer["in_channels"],
            frames,
            config.height // spatial,
            config.width // spatial,
        )

    def fingerprint(self, parts: tuple[str, ...] = ("transformer", "transformer_2", "vae")) -> str:
        """Changes when any file of `parts` does: sizes, headers and samples of the bytes are
        hashed.

        Files of a hub teacher arrive when they are needed; what they will be is told by the commit.
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
                    for start in (0, size // 2, max(0, size - (1 << 16))):
                        data.seek(start)
                        digest.update(data.read(1 << 16))
        return digest.hexdigest()[:32]


def read_teacher(config: Config) -> TeacherInfo:
    """Finds the teacher and reads its configuration. Raises UsageError where it is not a Wan
    text-to-video one.
    """
    source = config.teacher_path or str(EMBEDDED_TEACHER)
    folder = Path(source)
    if not folder.is_dir():
        folder = download(source, config.revision, config.cache_dir, SKELETON)
    index = _json(folder / "model_index.json", source)
    if index.get("_class_name") != "WanPipeline":
        raise UsageError(
            f"--teacher_path {source}: is a {index.get('_class_name')}; this tool distils "
            "WanPipeline (text to video)"
        )
    transformer = _json(folder / "transformer" / "config.json", source)
    if transformer.get("image_dim") is not None or transformer.get(
        "in_channels"
    ) != transformer.get("out_channels"):
        raise UsageError(
            f"--teacher_path {source}: an image-to-video transformer; give a text-to-video teacher"
        )
    vae = _json(folder / "vae" / "config.json", source)
    check_numbers(source, transformer, vae)
    second = index.get("transformer_2")
    two = isinstance(second, list) and second[:1] != [None]
    boundary = index.get("boundary_ratio") if two else None
    if two and not (isinstance(boundary, float) and 0 < boundary < 1):
        raise UsageError(
            f"--teacher_path {source}: has two transformers but boundary_ratio {boundary} in "
            "model_index.json; "
            "set it there (Wan2.2-T2V-A14B: 0.875)"
        )
    return TeacherInfo(
        source=source,
        folder=folder,
        name=source.rstrip("/\\").replace("\\", "/").split("/")[-1],
        embedded=folder.resolve() == EMBEDDED_TEACHER.resolve(),
        boundary_ratio=boundary,
        expand_timesteps=bool(index.get("expand_timesteps")),
        transformer=transformer,
        vae=vae,
    )


WHOLE = (
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "text_dim",
    "freq_dim",
)


def check_numbers(source: str, transformer: dict, vae: dict) -> None:
    """The numbers that are used before any model is built are numbers. Raises UsageError."""

    def positive(value) -> bool:
        return type(value) is int and value > 0

    patch, channels = transformer.get("patch_size"), vae.get("z_dim")
    wrong = [
        f"transformer/config.json: {k} {transformer.get(k)}"
        for k in WHOLE
        if not positive(transformer.get(k))
    ]
    if not (isinstance(patch, list) and len(patch) == 3 and all(map(positive, patch))):
        wrong.append(f"transformer/config.json: patch_size {patch}")
    wrong += [
        f"vae/config.json: {k} {vae.get(k)}"
        for k in ("scale_factor_temporal", "scale_factor_spatial")
        if k in vae and not positive(vae[k])
    ]
    for key in ("latents_mean", "latents_std"):
        values = vae.get(key)
        if not (
            isinstance(values, list)
            and len(values) == channels == transformer.get("in_channels")
            and all(type(v) in (int, float) and math.isfinite(v) for v in values)
        ):
            wrong.append(f"vae/config.json: {key} is not {transformer.get('in_channels')} numbers")
    if wrong:
        raise UsageError(
            f"--teacher_path {source}: {wrong[0]}; that is no Wan model, download it again"
        )


def download(source: str, revision: str | None, cache_dir: str | None, patterns: list[str]) -> Path:
    """Fetches files of a hub repository into the cache. Raises UsageError when there is no such
    repository.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source, revision=revision, cache_dir=cache_dir, allow_patterns=patterns
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"--teacher_path {source}: neither a folder here nor reachable on the hub ({reason}); "
            "check the spelling, the network and, for gated models, `hf auth login`"
        ) from error


def _json(file: Path, source: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(
            f"--teacher_path {source}: {file.parent.name}/{file.name} is missing; give the folder "
            "of a "
            "diffusers WanPipeline"
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
