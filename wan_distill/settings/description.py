"""What a teacher's folder says about it, read from its JSON files: no weights, no torch."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.maths.sigmas import Expert
from wan_distill.settings.assets import EMBEDDED, EMBEDDED_TEACHER, download, is_offline, short_name
from wan_distill.settings.config import WAN_NEGATIVE_PROMPT, Config
from wan_distill.settings.fingerprints import fingerprint_part
from wan_distill.settings.pipelines import (
    IMAGE_TO_VIDEO,
    boundary_ratio_of,
    check_channels,
    check_numbers,
    check_pipeline,
)
from wan_distill.settings.reading import AGAIN, FETCH_AGAIN, read_json
from wan_distill.settings.teacher_changes import TeacherChanges, expert_of_part, read_changes

# Wan's own sampling settings. A14B: Wan2.2 wan/configs/wan_t2v_A14B.py and wan_i2v_A14B.py; the
# others: Wan2.1 README, TI2V-5B config.
TWO_EXPERTS = dict(teacher_shift=12.0, guidance_scale=4.0, guidance_scale_2=3.0)
TWO_EXPERTS_IMAGE = dict(teacher_shift=5.0, guidance_scale=3.5, guidance_scale_2=3.5)
ONE_EXPERT = dict(teacher_shift=5.0, guidance_scale=5.0, guidance_scale_2=5.0)
TEACHER_PARTS = ("transformer", "transformer_2", "vae")
TEXT_PARTS = ("text_encoder", "tokenizer")
CLIP = dict(height=480, width=832, num_frames=81, max_sequence_length=512)  # Wan's smaller size
WAN_TEXT_WIDTH = 4096  # of UMT5-XXL, the encoder that Wan's negative prompt was written for
WORLD = "world.json"  # in the folders of tiny teachers: what their clips show
WORLD_TEXT_LENGTH = 16  # tokens of their captions
# Enough of a hub repository to describe it; weights are downloaded part by part, when needed.
SKELETON = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*", "*/*.index.json"]


@dataclass(frozen=True)
class TeacherInfo:
    """What the configuration files of a Wan pipeline say.

    Attributes:
        source: the hub id or folder that the user gave.
        folder: where the files are on this machine.
        name: the last part of `source`, for the names of output folders.
        embedded: whether this is a tiny teacher that comes with the package.
        boundary_ratio: sigma in (0, 1) at and above which the high expert works; None: one expert.
        expand_timesteps: whether each token has its own timestep (Wan2.2 TI2V-5B).
        transformer, vae: their `config.json`.
        variant: of the weight files, for parts that have files of it.
        changes: experts that are replaced, and LoRAs that are merged.
        takes_picture: whether clips begin with a picture that is given (image to video).
        world: what the clips of a tiny teacher show (`world.json`); None: of any other teacher.
    """

    source: str
    folder: Path
    name: str
    embedded: bool
    boundary_ratio: float | None
    expand_timesteps: bool
    transformer: dict[str, Any]
    vae: dict[str, Any]
    takes_picture: bool = False
    variant: str | None = None
    changes: TeacherChanges = field(default_factory=TeacherChanges)
    world: dict[str, Any] | None = None
    picture_source: TeacherInfo | None = None  # makes its pictures (--image_source)

    @property
    def title(self) -> str:
        """Its name for pages that others read: a hub id, or a folder without the path to it."""
        if self.embedded:
            kind = "image-to-video " if self.takes_picture else ""
            return f"the embedded tiny {kind}teacher"
        return self.name if self.is_local else self.source

    @property
    def is_local(self) -> bool:
        """Whether the user gave a folder; otherwise a hub id."""
        return os.path.isdir(self.source)

    @property
    def commit(self) -> str:
        """The commit of a hub teacher: the hub's cache names its folder by it."""
        return self.folder.name

    @property
    def sampling_defaults(self) -> dict[str, Any]:
        """How the teacher is sampled: shift, guidance and negative prompt as Wan does it, and the
        clip and the text length that it was trained with.
        """
        two = TWO_EXPERTS_IMAGE if self.takes_picture else TWO_EXPERTS
        values: dict[str, Any] = dict(ONE_EXPERT if self.boundary_ratio is None else two)
        wan_text = self.transformer["text_dim"] == WAN_TEXT_WIDTH
        values["negative_prompt"] = WAN_NEGATIVE_PROMPT if wan_text else ""
        if self.world is None:
            return values | CLIP
        sizes = dict(zip(("num_frames", "height", "width"), self.world_sizes, strict=True))
        return values | sizes | dict(max_sequence_length=WORLD_TEXT_LENGTH)

    @property
    def world_sizes(self) -> tuple[int, int, int]:
        """Frames, height and width of a tiny teacher's clips."""
        assert self.world is not None
        return self.world["frames"], self.world["height"], self.world["width"]

    @property
    def experts(self) -> tuple[Expert, ...]:
        """The teacher's experts in the order in which they sample."""
        return ("high",) if self.boundary_ratio is None else ("high", "low")

    @property
    def mask_channels(self) -> int:
        """Of an image-to-video transformer's input: frames per latent frame."""
        return int(self.vae.get("scale_factor_temporal", 4))

    @property
    def side_multiple(self) -> int:
        """Height and width in pixels must be multiples of this (A14B: 16, TI2V-5B: 32)."""
        # Pixels per latent times latents per patch.
        return self.vae.get("scale_factor_spatial", 8) * self.transformer["patch_size"][-1]

    def latent_shape(self, config: Config) -> tuple[int, int, int, int]:
        """[C, F, H, W] of one sample's latents. `config` must be resolved."""
        spatial = self.vae.get("scale_factor_spatial", 8)
        return (
            self.transformer["out_channels"],
            (config.num_frames - 1) // self.mask_channels + 1,
            config.height // spatial,
            config.width // spatial,
        )

    def fingerprint(self, parts: tuple[str, ...] = TEACHER_PARTS) -> str:
        """32 hexadecimal digits that change when what is loaded of `parts` (folder names) changes:
        `fingerprint_part` says what is hashed.

        A hub teacher's files may not be downloaded yet, so its commit and variant are hashed
        instead. Raises UsageError where files are missing or damaged.
        """
        content: dict[str, Any] = {}
        if "transformer" in parts:
            content["pipeline"] = [self.boundary_ratio, self.expand_timesteps]
        if not self.is_local:
            content |= dict(commit=self.commit, variant=self.variant, parts=parts)
            changed = self.changes.fingerprints()
            content |= {part: changed[part] for part in parts if part in changed}
        else:
            content |= self.part_fingerprints(parts)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def part_fingerprints(
        self, parts: tuple[str, ...] = TEACHER_PARTS + TEXT_PARTS
    ) -> dict[str, str]:
        """`fingerprint_part` of each of `parts` that this teacher has; of a hub teacher, of those
        whose files are on this machine. Raises UsageError where those of a folder are missing or
        damaged.
        """
        absent = {"transformer_2"} if self.boundary_ratio is None else set()
        found = {}
        for part in sorted(set(parts) - absent):
            try:
                replaced = expert_of_part(part) in self.changes.experts
                base = "" if replaced else fingerprint_part(self.folder / part, self.variant)
                found[part] = self.changes.fingerprint(part, base)
            except FileError as error:
                if self.is_local:
                    raise UsageError(f"--teacher_path {self.source}: {error}") from error
        return found


def read_teacher(config: Config) -> TeacherInfo:
    """Reads the configuration of the teacher that `--teacher_path` names, downloading it if needed.

    Raises UsageError where there is none, where it is not a Wan pipeline of a known kind, and where
    its files are missing or damaged.
    """
    source = config.teacher_path or str(EMBEDDED_TEACHER)
    if not os.path.isdir(source):
        source = str(EMBEDDED.get(source, source))
    folder = Path(source)
    local = os.path.isdir(folder)  # False, not an error, where the name is too long
    if not local:
        folder = download(source, config.revision, config.cache_dir, SKELETON)
    index = _read_json(folder / "model_index.json", source)
    check_pipeline(source, index)
    transformer = _read_json(folder / "transformer" / "config.json", source)
    vae = _read_json(folder / "vae" / "config.json", source)
    encoder = folder / "text_encoder" / "config.json"
    check_numbers(source, transformer, vae, _read_json(encoder, source) if encoder.exists() else {})
    check_channels(source, index, transformer, vae)
    boundary = boundary_ratio_of(source, index)
    return TeacherInfo(
        source=source,
        folder=folder,
        name=Path(os.path.abspath(source)).name if local else source.rstrip("/").split("/")[-1],
        embedded=short_name(folder) is not None,
        boundary_ratio=boundary,
        expand_timesteps=bool(index.get("expand_timesteps")),
        transformer=transformer,
        vae=vae,
        takes_picture=index["_class_name"] == IMAGE_TO_VIDEO,
        variant=config.variant,
        changes=read_changes(config, ("high", "low") if boundary else ("high",), transformer),
        world=_read_json(folder / WORLD, source) if (folder / WORLD).is_file() else None,
    )


def _read_json(file: Path, source: str) -> dict[str, Any]:
    """The object in a JSON file. Raises UsageError."""
    if not (file.exists() or file.is_symlink()):
        name = f"{file.parent.name}/{file.name}" if file.name == "config.json" else file.name
        if os.path.isdir(source):
            where, remedy = "missing", "give the folder of a diffusers WanPipeline"
        elif is_offline():
            where = "not in the hub's cache, and HF_HUB_OFFLINE is set"
            remedy = "run once with the network and without it"
        else:
            where, remedy = "not in that repository", "give the one whose name ends in -Diffusers"
        raise UsageError(f"--teacher_path {source}: {name} is {where}; {remedy}")
    try:
        return read_json(file)
    except FileError as error:
        if AGAIN in error.remedy and not os.path.isdir(source):
            raise UsageError(f"--teacher_path {source}: {error.reason}; {FETCH_AGAIN}") from error
        raise UsageError(f"--teacher_path {source}: {error}") from error
