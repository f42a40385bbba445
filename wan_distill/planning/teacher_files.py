"""Are the teacher's files whole, and do they hold what their configurations ask for? By their
headers alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from wan_distill.errors import FileError, UsageError, one_line
from wan_distill.maths.sigmas import SUBFOLDER
from wan_distill.planning.weight_names import ONE_CHECKPOINT, explain_names
from wan_distill.settings.assets import is_offline
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.reading import check_pickle, read_header
from wan_distill.settings.weight_files import (
    refuse_pickles,
    variant_or_none,
    weight_files,
)
from wan_distill.umt5.inspect import EMBED, SHARED, check_class, inspect_text_encoder
from wan_distill.umt5.text import tokenizer_of
from wan_distill.umt5.tokenizer import describe_prompts

Header = dict[str, dict[str, Any]]
"""Tensor name -> what a safetensors header says about it."""


def check_files(info: TeacherInfo, config: Config) -> str:
    """What the teacher's weight files hold, in words; offline also those in the hub's cache.

    Raises UsageError naming a damaged or missing one, and pickles that may not or cannot be read.
    """
    if not info.is_local and not is_offline():
        return "on the hub; downloaded when needed"
    try:
        folder = info.folder / "text_encoder"
        inspection = inspect_text_encoder(folder, variant_or_none(folder, config.variant))
        if not inspection.tables and (shown := explain_names(_headers(inspection.files), [SHARED])):
            raise FileError(f"{folder}: {shown[0]}", shown[1])
        check_class(inspection, "UMT5EncoderModel")
        files = {
            part: weight_files(info.folder / part, variant)
            for part, variant in part_variants(info, config.variant).items()
        }
        _check_pickles(info, config, files)
        parts = {part: _headers(files[part]) for part in files}
    except FileError as error:
        raise UsageError(_of_teacher(info, error)) from error
    for part, header in parts.items():
        if header:
            _check_shapes(info, part, header)
    dtypes = [
        f"{part} {'/'.join(sorted({t['dtype'] for t in header.values()}))}"
        for part, header in parts.items()
    ]
    return f"whole by their headers; {', '.join(dtypes)}"


def _of_teacher(info: TeacherInfo, error: FileError) -> str:
    """The line on a file of the teacher."""
    if info.is_local:
        return f"--teacher_path {info.source}: {error}"
    return (
        f"--teacher_path {info.source}: {error.reason}; the hub's cache is not whole, and "
        "HF_HUB_OFFLINE is set: unset it for one run, or copy the missing files there"
    )


def check_text(info: TeacherInfo, prompts: Sequence[str]) -> str:
    """What the teacher's tokenizer makes of `prompts`, in words.

    Raises UsageError where the tokenizer is not the text encoder's, and where it does not know what
    the prompts say; of the embedded teacher, whose vocabulary is small, that is said only.
    """
    try:
        tokenizer = tokenizer_of(info.folder)
        strict = not info.embedded
        found = describe_prompts(tokenizer, prompts, info.folder / "tokenizer", strict)
    except FileError as error:
        raise UsageError(f"--teacher_path {info.source}: {error}") from error
    return f"{found}; the tokenizer has {len(tokenizer)} entries"


def part_variants(info: TeacherInfo, variant: str | None) -> dict[str, str | None]:
    """The variant that each part is loaded with: `variant` where the part has files of it, else the
    plain files, as WanPipeline does.

    Raises UsageError where no part has any, and where one of two experts lacks them.
    """
    experts = [SUBFOLDER[expert] for expert in info.experts]
    variants = {
        part: variant_or_none(info.folder / part, variant)
        for part in ("text_encoder", "vae", *experts)
    }
    if variant and not any(variants.values()):
        raise UsageError(
            f"--variant {variant}: no part of {info.source} has files of it; leave it out"
        )
    lacking = [part for part in experts if variants[part] is None]
    if variant and len(lacking) == 1 and len(experts) == 2:
        raise UsageError(
            f"--variant {variant}: of two experts only one has files of it, {lacking[0]} has none; "
            "download them, or leave it out"
        )
    return variants


def download_left(info: TeacherInfo) -> float:
    """Bytes of a hub teacher's weights that are not in the hub's cache yet, as its indices say."""
    if Path(info.source).is_dir():
        return 0.0
    total = 0.0
    for file in info.folder.glob("*/*.index.json"):
        metadata = json.loads(file.read_text(encoding="utf-8")).get("metadata", {})
        here = sum(weights.stat().st_size for weights in file.parent.glob("*.safetensors"))
        total += max(0.0, metadata.get("total_size", 0) - here)
    return total


def _check_pickles(info: TeacherInfo, config: Config, files: dict[str, list[Path]]) -> None:
    if not config.allow_pickle:
        refuse_pickles(file for part in files.values() for file in part)
    if config.base_precision == "bf16" and not config.offload:
        return
    flag = "--offload" if config.offload else f"--base_precision {config.base_precision}"
    for expert in info.experts:
        part = SUBFOLDER[expert]
        if files[part][0].suffix == ".bin":
            raise UsageError(
                f"{flag}: reads safetensors only, and {part} has .bin weights; convert them, or "
                "leave it out"
            )


def _headers(files: Iterable[Path]) -> Header:
    """All tensors of a part; empty for pickles, which have no header."""
    tensors: Header = {}
    for file in files:
        if file.suffix == ".bin":
            check_pickle(file)
            continue
        header, _ = read_header(file)
        tensors |= {name: t for name, t in header.items() if name != "__metadata__"}
    return tensors


def _check_shapes(info: TeacherInfo, part: str, header: Header) -> None:
    """Raises UsageError where a part's files lack or misshape a tensor that its configuration asks
    for.
    """
    try:
        with torch.device("meta"):
            model = _build(info.folder / part)
    except Exception as error:  # a wrong value makes constructors fail in any way
        raise UsageError(
            f"--teacher_path {info.source}: {part}/config.json describes no model that can be "
            f"built ({one_line(error)}); {ONE_CHECKPOINT}"
        ) from error
    wanted = {name: list(t.shape) for name, t in model.state_dict().items()}
    stored = {name: t["shape"] for name, t in header.items()}
    if part == "text_encoder":  # its table has two names: umt5/ looks into that
        wanted = {name: shape for name, shape in wanted.items() if name not in (SHARED, EMBED)}
    if shown := explain_names(stored, wanted):
        raise UsageError(f"--teacher_path {info.source}: {part} {'; '.join(shown)}")
    if part == "text_encoder":
        stored = {name: shape for name, shape in stored.items() if name in wanted}
    for name in sorted(wanted.keys() | stored.keys()):
        if wanted.get(name) != stored.get(name):
            raise UsageError(
                f"--teacher_path {info.source}: {part} stores {name} as "
                f"{stored.get(name, 'nothing')}, its configuration asks for "
                f"{wanted.get(name, 'nothing')}; {ONE_CHECKPOINT}"
            )


def _build(folder: Path) -> torch.nn.Module:
    """The model that a part's config.json describes."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if folder.name == "text_encoder":
        return UMT5EncoderModel(UMT5Config.from_dict(settings))
    kind = AutoencoderKLWan if folder.name == "vae" else WanTransformer3DModel
    return kind(**{name: value for name, value in settings.items() if not name.startswith("_")})
