"""The merged pipeline: the teacher's folder with the student in place of its experts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from wan_distill.data.run import Run
from wan_distill.errors import ExportError, FileError, UsageError
from wan_distill.layout import RunFolder
from wan_distill.maths.sigmas import SUBFOLDER, Expert
from wan_distill.model.student_files import load_student, scheduler_for
from wan_distill.settings.config import Config
from wan_distill.settings.fingerprints import fingerprint_file
from wan_distill.settings.reading import read_json
from wan_distill.settings.weight_files import FORMATS, variant_or_none, weight_files
from wan_distill.system.files import (
    open_to_umask,
    remove_folder,
    sha256,
    system_errors,
    write_atomically,
)

OUR_README = re.compile(rb"# [^\n]+, distilled to [\d or]+ steps\r?\n\r?\nA student of ")
# A merged weight is rounded to the base's dtype: bf16 keeps 3 digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def check_output(config: Config) -> None:
    """Raises UsageError where the output folder holds files under names that this run writes, and
    that are somebody else's.
    """
    folder = RunFolder(Path(config.output_dir))
    if config.save_merged and not config.evaluate_only and not _is_ours(folder):
        raise UsageError(
            f"--output_dir {config.output_dir}: {folder.merged.name}/ there was changed since this "
            "tool wrote it, or is not its own; move it away, or give --no-save_merged"
        )
    if folder.readme.exists() and not OUR_README.match(folder.readme.read_bytes()):
        raise UsageError(
            f"--output_dir {config.output_dir}: holds a {folder.readme.name} that this tool did "
            "not write; choose another"
        )


def save_merged(run: Run) -> None:
    """A complete pipeline folder: adapters merged into the experts, everything else byte for byte
    the teacher's.

    The text encoder is copied, never saved anew: saving it under transformers 5.0-5.2 is how files
    get broken. The folder appears once it is whole, in place of an earlier one.
    """
    folder = run.folder.merged
    partial = folder.with_name(f".{folder.name}.partial")
    earlier = folder.with_name(f".{folder.name}.earlier")
    remove_folder(partial)
    try:
        _write_pipeline(run, partial)
    except OSError:  # a full disk: the next attempt needs the room
        shutil.rmtree(partial, ignore_errors=True)
        raise
    remove_folder(earlier)
    if not _is_ours(run.folder):
        raise ExportError(
            f"{folder}: was changed since this tool wrote it; move it away and run again"
        )
    if folder.exists():
        folder.replace(earlier)
    note = {name: [*_state(file), _content(file)] for name, file in _files(partial).items()}
    write_atomically(run.folder.merged_note, json.dumps(note).encode())
    partial.replace(folder)
    remove_folder(earlier)


def _is_ours(folder: RunFolder) -> bool:
    """Whether the merged pipeline is absent, or the one that was written, unchanged."""
    if not folder.merged.exists():
        return True
    try:
        note: dict[str, Any] = json.loads(folder.merged_note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    files = _files(folder.merged)
    return files.keys() == note.keys() and all(_is_as_noted(files[n], note[n]) for n in note)


def _is_as_noted(file: Path, noted: list[Any]) -> bool:
    """By size and time or, of a copy, whose times are others, by content."""
    state = _state(file)
    return state == noted[:2] or (state[0] == noted[0] and noted[2:] == [_content(file)])


def _files(folder: Path) -> dict[str, Path]:
    return {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file()}


def _state(file: Path) -> list[int]:
    return [file.stat().st_size, file.stat().st_mtime_ns]


def _content(file: Path) -> str:
    """What identifies it; "damaged" of weights that cannot be read."""
    try:
        return fingerprint_file(file) if file.suffix == ".safetensors" else sha256(file)
    except FileError:
        return "damaged"


def _write_pipeline(run: Run, folder: Path) -> None:
    """The whole pipeline. Raises ExportError where a part of the teacher has no weights to copy."""
    info = run.info
    index = read_json(info.folder / "model_index.json")
    own = {*SUBFOLDER.values(), "scheduler"}
    for part, names in index.items():
        if part not in own and isinstance(names, list) and names[0] is not None:
            source = run.teacher.fetch(part) / part  # of a hub teacher, it may not be here yet
            try:
                copy_part(source, folder / part, info.variant)
            except FileError as error:
                raise ExportError(f"--save_merged: {error}") from error
    for expert in info.experts:
        _save_merged_expert(run, expert, folder / SUBFOLDER[expert])
    scheduler_for(run.config).save_pretrained(folder / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMapEulerDiscreteScheduler"]
    index["dmd2_config"] = few_steps(run.config)
    text = json.dumps(index, indent=2) + "\n"
    (folder / "model_index.json").write_text(text, encoding="utf-8")


def few_steps(config: Config) -> dict[str, Any]:
    """The schedule as vLLM-Omni's few-step pipelines read it from model_index.json (its pull
    requests 2749 and 2974); diffusers ignores it.
    """
    return dict(
        num_inference_steps=config.grid_steps,
        denoising_timesteps=[round(1000 * sigma, 4) for sigma in config.sigmas()[:-1]],
        solver="ode",
        guidance_scale=1.0,
    )


def copy_part(source: Path, target: Path, variant: str | None) -> None:
    """Copies one part of a pipeline: of its weights those that load, under their plain names, so
    that they load without `variant`; of the rest every file but hidden ones. Permissions are not
    copied: a teacher may be read-only.

    Raises FileError where a part with a configuration of its own has no whole weight files.
    """
    target.mkdir(parents=True)
    variant = variant_or_none(source, variant)
    weights = weight_files(source, variant) if (source / "config.json").is_file() else []
    names = {file.name: _plain(file.name, variant) for file in weights}
    for name, plain in names.items():
        shutil.copyfile(source / name, target / plain)
    for file in sorted(source.iterdir()):
        if file.name.startswith(".") or not file.is_file() or file.suffix in FORMATS:
            continue
        if not re.search(r"\.index\.(.+\.)?json$", file.name):
            shutil.copyfile(file, target / file.name)
            continue
        content = read_json(file)
        shards = content.get("weight_map")
        if isinstance(shards, dict) and set(shards.values()) == set(names):
            copy = target / _plain(file.name, variant)
            shutil.copyfile(file, copy)
            if variant:
                content["weight_map"] = {tensor: names[shard] for tensor, shard in shards.items()}
                copy.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _plain(name: str, variant: str | None) -> str:
    """The name of a weight file without the variant in it."""
    return re.sub(rf"\.{re.escape(variant)}(?=[.-])", "", name) if variant else name


def _save_merged_expert(run: Run, expert: Expert, folder: Path) -> None:
    """One expert of the merged pipeline, loaded back and compared; a single copy is in memory at
    any time.
    """
    transformer = run.teacher.load_expert(expert, exact=True)
    student = run.folder.student(expert)
    if not student.exists():
        _save(transformer, folder)
        return
    load_student(transformer, student)
    trained = probe(transformer)
    dtype, device = transformer.dtype, transformer.device
    if not run.config.whole_student:
        transformer.fuse_lora()
        transformer.unload_lora()
    _save(transformer, folder)
    del transformer
    saved = WanTransformer3DModel.from_pretrained(folder, dtype=dtype).to(device)
    difference = float((probe(saved) - trained).norm() / trained.norm())
    if not difference < TOLERANCE[dtype]:
        raise ExportError(
            f"student/{folder.name}: the merged expert, loaded back, differs from {student.name} "
            f"by {difference:.2g}; do not use it"
        )
    print(f"student/{folder.name}: loaded back; differs from {student.name} by {difference:.1g}")


def _save(transformer: WanTransformer3DModel, folder: Path) -> None:
    with system_errors(folder):
        transformer.save_pretrained(folder)
    open_to_umask(folder)


@torch.no_grad()
def probe(transformer: WanTransformer3DModel) -> Tensor:
    """What the transformer makes of one small fixed input, one patch large: [1, C, f, h, w],
    float32 on the CPU.
    """
    config, rng = transformer.config, torch.Generator().manual_seed(0)
    device, dtype = transformer.device, transformer.dtype
    x = torch.randn(1, config.in_channels, *config.patch_size, generator=rng)
    text = torch.randn(1, 8, config.text_dim, generator=rng)
    timestep = torch.tensor([900.0], device=device)
    output: Tensor = transformer(
        x.to(device, dtype), timestep, text.to(device, dtype), return_dict=False
    )[0]
    return output.float().cpu()
