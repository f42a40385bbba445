"""The files that each part of a teacher is loaded from: which they are, and whether they hold what
the part's configuration asks for, by their headers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from wan_distill.errors import FileError, UsageError, one_line
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.settings.config import Config
from wan_distill.settings.description import TeacherInfo
from wan_distill.settings.reading import (
    AGAIN,
    FETCH_AGAIN,
    check_pickle,
    read_header,
    read_json,
)
from wan_distill.settings.teacher_changes import EXPERT_FLAG, is_original
from wan_distill.settings.weight_files import refuse_pickles, variant_or_none, weight_files
from wan_distill.settings.weight_names import ONE_CHECKPOINT, explain_codes, explain_names
from wan_distill.umt5.inspect import check_class, inspect_text_encoder
from wan_distill.umt5.tables import EMBED, SHARED

Header = dict[str, dict[str, Any]]
"""Tensor name -> what a safetensors header says about it."""


def parts_of(info: TeacherInfo) -> list[str]:
    """The parts of a teacher that have weights and are loaded from its folder."""
    own = [SUBFOLDER[expert] for expert in info.experts if expert not in info.changes.experts]
    return ["text_encoder", "vae", *own]


def files_of(info: TeacherInfo, config: Config, part: str) -> list[Path]:
    """The weight files of a part. Raises UsageError where there are none, or pickles without
    --allow_pickle.
    """
    try:
        return _files_in(info.folder / part, config)
    except FileError as error:
        raise UsageError(of_teacher(info, error)) from error


def expert_files(info: TeacherInfo, config: Config, expert: Expert) -> tuple[Path, list[Path]]:
    """(the folder of its config.json, its weight files) of an expert, which may be replaced.
    Raises UsageError as `files_of` does.
    """
    part, replaced = SUBFOLDER[expert], info.changes.experts.get(expert)
    if replaced is None:
        return info.folder / part, files_of(info, config, part)
    if replaced.is_file():
        return info.folder / part, [replaced]
    try:
        described = info.folder / part if is_original(replaced) else replaced
        return described, _files_in(replaced, config)
    except FileError as error:
        raise UsageError(f"{EXPERT_FLAG[expert]} {error}") from error


def _files_in(folder: Path, config: Config) -> list[Path]:
    files = weight_files(folder, variant_or_none(folder, config.variant))
    if not config.allow_pickle:
        refuse_pickles(files)
    return files


def loader_options(info: TeacherInfo, config: Config, part: str) -> dict[str, Any]:
    """The arguments of `from_pretrained` that make it read `files_of(info, config, part)`."""
    files = files_of(info, config, part)
    return {
        "pretrained_model_name_or_path": info.folder,
        "subfolder": part,
        "variant": variant_or_none(info.folder / part, config.variant),
        "use_safetensors": files[0].suffix == ".safetensors",
    }


def check_part(info: TeacherInfo, config: Config, part: str) -> Header:
    """What the headers of a part's files say; empty for pickles.

    Raises UsageError where a file is damaged, and where the files do not hold the tensors that the
    configuration asks for.
    """
    files = files_of(info, config, part)
    try:
        header = _headers(files)
        if part == "text_encoder":
            variant = variant_or_none(info.folder / part, config.variant)
            inspection = inspect_text_encoder(info.folder / part, variant)
            check_class(inspection, "UMT5EncoderModel")
    except FileError as error:
        raise UsageError(of_teacher(info, error)) from error
    if files[0].suffix == ".safetensors":
        _check_shapes(info, part, header)
    return header


def of_teacher(info: TeacherInfo, error: FileError) -> str:
    """The line on a file of the teacher."""
    if info.is_local or AGAIN not in error.remedy:
        return f"--teacher_path {info.source}: {error}"
    return f"--teacher_path {info.source}: {error.reason}; {FETCH_AGAIN}"


def _headers(files: Iterable[Path]) -> Header:
    """All tensors of a part; empty for pickles, which have no header."""
    tensors: Header = {}
    for file in files:
        if file.suffix == ".bin":
            check_pickle(file)
            continue
        header, _ = read_header(file)
        header.pop("__metadata__", None)
        if twice := sorted(tensors.keys() & header):
            reason = f"{file}: holds {twice[0]}, which another shard beside it holds too"
            raise FileError(reason, AGAIN)
        tensors |= header
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
    settings = read_json(info.folder / part / "config.json")
    if shown := explain_names(stored, wanted) or explain_codes(settings, header):
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
    settings = read_json(folder / "config.json")
    if folder.name == "text_encoder":
        return UMT5EncoderModel(UMT5Config.from_dict(settings))
    kind = AutoencoderKLWan if folder.name == "vae" else WanTransformer3DModel
    return kind.from_config(settings)  # which leaves out what it does not know, as loading does
