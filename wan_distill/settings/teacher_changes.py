"""What is changed of a teacher's pipeline: experts that are replaced, LoRAs that are merged; no
torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wan_distill.errors import FileError, UsageError
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings.config import Config
from wan_distill.settings.fingerprints import fingerprint_file, fingerprint_part
from wan_distill.settings.lora_headers import LoraHeader
from wan_distill.settings.lora_sources import find_loras
from wan_distill.settings.reading import read_json
from wan_distill.settings.weight_files import ORIGINAL_CLASS

LORA_FLAG = "--teacher_lora"
EXPERT_FLAG: dict[Expert, str] = {"high": "--teacher_transformer", "low": "--teacher_transformer_2"}
# Of a transformer's config.json: what a replaced one must have in common with the pipeline's.
SAME = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
)

# The same in the config.json of Wan's own code, as far as it is there.
ORIGINAL_NAMES = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
}


@dataclass(frozen=True)
class TeacherLora:
    """A LoRA that is merged into one expert.

    Attributes:
        strength: what its effect is multiplied by.
    """

    expert: Expert
    header: LoraHeader
    strength: float

    def __str__(self) -> str:
        return f"{self.header.path.name} x {self.strength:g} ({self.expert})"


@dataclass(frozen=True)
class TeacherChanges:
    """Attributes:
    experts: the folder or single file that an expert is loaded from instead.
    loras: merged in this order.
    """

    experts: dict[Expert, Path] = field(default_factory=dict)
    loras: tuple[TeacherLora, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.experts or self.loras)

    def of(self, expert: Expert) -> tuple[TeacherLora, ...]:
        """The LoRAs of one expert."""
        return tuple(lora for lora in self.loras if lora.expert == expert)

    def touches(self, expert: Expert) -> bool:
        return expert in self.experts or bool(self.of(expert))

    def fingerprint(self, part: str, base: str) -> str:
        """The fingerprint of a part whose own files have the fingerprint `base`."""
        expert = expert_of_part(part)
        if expert is None or not self.touches(expert):
            return base
        path = self.experts.get(expert)
        if path is not None:
            base = fingerprint_part(path) if path.is_dir() else fingerprint_file(path)
        digest = hashlib.sha256(base.encode())
        for lora in self.of(expert):
            content = fingerprint_file(lora.header.path)
            digest.update(f" {content} {lora.header.transformer} {lora.strength:g}".encode())
        return digest.hexdigest() if self.of(expert) else base

    def fingerprints(self) -> dict[str, str]:
        """Of the changes of each changed part alone."""
        return {
            part: self.fingerprint(part, "") for e, part in SUBFOLDER.items() if self.touches(e)
        }

    def words(self) -> list[str]:
        """One phrase for each change, for readers who have no file of this machine too."""
        replaced = [f"{SUBFOLDER[e]} from {_last_names(path)}" for e, path in self.experts.items()]
        return [*replaced, *map(str, self.loras)]


def _last_names(path: Path) -> str:
    """`tuned/transformer`, `tuned.safetensors`: what tells it from others, and no more."""
    return path.name if path.is_file() else "/".join(path.resolve().parts[-2:])


def expert_of_part(part: str) -> Expert | None:
    return next((expert for expert in SUBFOLDER if SUBFOLDER[expert] == part), None)


def read_changes(
    config: Config, experts: Sequence[Expert], transformer: dict[str, Any]
) -> TeacherChanges:
    """What `--teacher_transformer`, `--teacher_transformer_2` and `--teacher_lora` ask for.

    Args:
        experts: those of the teacher.
        transformer: the pipeline's transformer/config.json.

    Raises UsageError where a file is missing, does not fit, or belongs to no expert.
    """
    given = {"high": config.teacher_transformer, "low": config.teacher_transformer_2}
    replaced: dict[Expert, Path] = {}
    for expert, flag in EXPERT_FLAG.items():
        source = given[expert]
        if source is None:
            continue
        if expert not in experts:
            raise UsageError(
                f"{flag} {source}: this teacher has a single transformer; leave it out"
            )
        replaced[expert] = _expert_files(Path(source).expanduser(), flag, transformer)
    loras = [
        TeacherLora(expert, header, strength)
        for spec in config.teacher_lora
        for source, strength in [parse_lora(spec)]
        for expert, header in find_loras(source, LORA_FLAG, experts, config.cache_dir).items()
    ]
    return TeacherChanges(replaced, tuple(loras))


def parse_lora(spec: str) -> tuple[str, float]:
    """`FILE[,LOW][:STRENGTH]` -> (files, strength). Raises UsageError for nan and infinity."""
    source, colon, number = spec.rpartition(":")
    try:
        strength = float(number) if colon else 1.0
    except ValueError:  # a colon in a path
        return spec, 1.0
    if not math.isfinite(strength):
        raise UsageError(f"{LORA_FLAG} {spec}: the strength must be a finite number")
    return (source, strength) if colon else (spec, 1.0)


def _expert_files(path: Path, flag: str, transformer: dict[str, Any]) -> Path:
    """`path`, or the transformer's folder in it. Raises UsageError where it does not fit."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UsageError(
                f"{flag} {path}: not a .safetensors file; convert it, or give a transformer's "
                "folder in diffusers' layout"
            )
        return path
    if not path.exists():
        raise UsageError(f"{flag} {path}: there is no such file or folder; check the spelling")
    part = next((SUBFOLDER[e] for e, own in EXPERT_FLAG.items() if own == flag), "")
    folder = path / part if (path / part / "config.json").is_file() else path
    try:
        config = read_json(folder / "config.json")
    except FileError as error:
        raise UsageError(
            f"{flag} {path}: {error}; give a transformer's folder in diffusers' layout, or a "
            ".safetensors file"
        ) from error
    names = {name: name for name in SAME}
    if is_original(folder):
        names = ORIGINAL_NAMES
        kind = "t2v" if transformer["in_channels"] == transformer["out_channels"] else "i2v"
        if config.get("model_type") != kind:
            raise UsageError(
                f"{flag} {path}: its model_type is {config.get('model_type')}; give a {kind} model"
            )
    for theirs, ours in names.items():
        if config.get(theirs) != transformer.get(ours):
            raise UsageError(
                f"{flag} {path}: its {theirs} is {config.get(theirs)}, the pipeline's is "
                f"{transformer.get(ours)}; give a fine-tuned transformer of this teacher"
            )
    return folder


def is_original(folder: Path) -> bool:
    """Whether an expert's folder is one of Wan's own code, whose config.json has other names.

    Raises FileError where it has none.
    """
    return read_json(folder / "config.json").get("_class_name") == ORIGINAL_CLASS
