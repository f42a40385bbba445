"""Loads a text encoder and makes sure that it uses the file's table, or writes a clean copy."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import UMT5EncoderModel

from wan_distill.errors import FileError, TextEncoderError, one_line
from wan_distill.settings.weight_files import refuse_pickles, variant_or_none
from wan_distill.settings.weight_names import ONE_CHECKPOINT
from wan_distill.system.files import write_tensors
from wan_distill.umt5.evidence import ORIGINAL, compare_pickled, trusted_key
from wan_distill.umt5.inspect import (
    Inspection,
    check_class,
    inspect_text_encoder,
    locate,
)
from wan_distill.umt5.silence import silence_tied_weight_report
from wan_distill.umt5.tables import EMBED, SHARED
from wan_distill.umt5.verify import Verdict, read_rows, table_in_use, verify
from wan_distill.umt5.weights import fingerprint, why_not_the_files


def repair(
    encoder: UMT5EncoderModel, source: str | Path | Inspection, key: str | None = None
) -> None:
    """Puts the file's table into use under both names, as one parameter, in the encoder's dtype and
    on its device.

    `key` names the stored table; by default the trusted one. Call this before anything is
    quantised, offloaded, sharded or compiled. Raises TextEncoderError where no table is healthy.
    """
    inspection = source if isinstance(source, Inspection) else inspect_text_encoder(source)
    stored = inspection.tables[key or trusted_key(inspection, encoder)]
    old = encoder.encoder.embed_tokens.weight
    place = next((p.device for p in encoder.parameters() if not p.is_meta), torch.device("cpu"))
    values = read_rows(stored).to(place, old.dtype)
    table = torch.nn.Parameter(values, requires_grad=old.requires_grad)
    encoder.shared.weight = table
    encoder.encoder.embed_tokens.weight = table


def verify_or_repair(encoder: UMT5EncoderModel, inspection: Inspection) -> Verdict:
    """Verifies a loaded encoder and repairs it in memory where that is needed.

    Returns a verdict of PASS or REPAIRED. Raises TextEncoderError where the encoder is of another
    class, cannot be verified, or is beyond repair.
    """
    check_class(inspection, type(encoder).__name__)
    inspection = compare_pickled(inspection)
    key = trusted_key(inspection, encoder)
    done = []
    remedy = ""
    if len(inspection.tables) == 2 and not inspection.tables_equal:
        remedy = "Write a clean copy: python test_umt5_weights.py --teacher_path ... --repair OUT"
        done.append(f"the file holds two different tables, of which {key} is healthy")
    done += _repair_where_needed(encoder, inspection, key)
    after = verify(encoder, inspection, key)
    if not after.matches:
        raise TextEncoderError(f"{inspection.folder}: {after.reason}, also after repair", ORIGINAL)
    fault = why_not_the_files(encoder, inspection)
    if fault:
        raise TextEncoderError(f"{inspection.folder}: {fault}", ORIGINAL)
    return Verdict(
        verdict="REPAIRED" if done else "PASS",
        reason="; ".join(done) or "the table in use is the file's",
        remedy=remedy,
        keys_in_file=inspection.keys_in_file,
        rows_compared=after.rows_compared,
        rows_total=after.rows_total,
        transformers=inspection.transformers,
        fingerprint=fingerprint(encoder),
        loads_right_on=inspection.loads_right_on,
    )


def _repair_where_needed(encoder: UMT5EncoderModel, inspection: Inspection, key: str) -> list[str]:
    """Repairs unless the table in use is the file's and both names share it; what was done."""
    checked = verify(encoder, inspection, key)
    if checked.matches is None and not table_in_use(encoder).is_meta:
        raise TextEncoderError(
            f"{inspection.folder}: cannot be verified, {checked.reason}",
            "load it unquantised first",
        )
    if checked.matches and checked.shares:
        return []
    repair(encoder, inspection, key)
    if checked.matches:
        return ["the two names had equal but separate tables; they share one now"]
    return [f"{checked.reason}; the file's was put in its place"]


def load_text_encoder(
    source: str | Path,
    *,
    subfolder: str = "text_encoder",
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
    verbose: bool = False,
    allow_pickle: bool = False,
    **options: Any,
) -> tuple[UMT5EncoderModel, Verdict]:
    """Loads a UMT5 text encoder without the report of its tied table, and makes sure that its table
    is the file's.

    Args:
        source: hub id, pipeline folder, or text encoder folder.
        dtype: of the loaded weights; None: as transformers chooses.
        variant: of the weight files; the plain ones are read where the encoder has none of it, as
            `WanPipeline.from_pretrained` does.
        verbose: show the report.
        allow_pickle: also read .bin files.
        options: passed on to `UMT5EncoderModel.from_pretrained`.

    Returns the encoder in evaluation mode and the verdict. Raises TextEncoderError where it is
    beyond repair, is not UMT5, or has pickles only and `allow_pickle` is not set.
    """
    folder = locate(source, subfolder, revision, cache_dir)
    if (folder / subfolder).is_dir():
        folder = folder / subfolder
    inspection = inspect_text_encoder(folder, variant_or_none(folder, variant))
    check_class(inspection, "UMT5EncoderModel")
    if not allow_pickle:
        refuse_pickles(inspection.files)
    try:
        with silence_tied_weight_report(verbose):
            encoder = UMT5EncoderModel.from_pretrained(
                inspection.folder, dtype=dtype, variant=inspection.variant, **options
            )
    except OSError:
        raise
    except Exception as error:  # a wrong value makes loaders fail in any way
        reason = f"its weights do not fit its config.json ({one_line(error)[:150]})"
        raise TextEncoderError(f"{inspection.folder}: {reason}", ONE_CHECKPOINT) from error
    return encoder.eval(), verify_or_repair(encoder, inspection)


def repair_on_disk(
    source: str | Path, out: str | Path, variant: str | None = None, allow_pickle: bool = False
) -> Verdict:
    """Writes a clean copy of a text encoder to the new folder `out`, and loads it to verify it.

    The copy has one table, `shared.weight`, plain file names and `tie_word_embeddings: true`: every
    version of transformers loads it right. `source` is only read. `out` appears when it is
    complete. Raises FileError where `out` exists or cannot be written, or `source` is beyond
    repair.
    """
    out = Path(out)
    inspection = inspect_text_encoder(locate(source), variant)
    if out.exists():
        raise FileError(f"--repair {out}: already exists", "give a new folder")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        reason = f"--repair {out}: cannot be written ({error.strerror})"
        raise FileError(reason, "choose another") from error
    try:
        encoder, _ = load_text_encoder(
            inspection.folder, variant=variant, allow_pickle=allow_pickle
        )
        key = trusted_key(inspection, encoder)
        del encoder
        _copy_weights(inspection, key, partial)
        _copy_settings(inspection.folder, partial)
        _, verdict = load_text_encoder(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    reason = f"a clean copy is in {out}, loaded back and verified"
    return replace(verdict, verdict="REPAIRED", reason=reason)


def _copy_weights(inspection: Inspection, key: str, out: Path) -> None:
    """Writes the weights with the table `key` as the only one, one file at a time, and an index
    where they are several files.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for file in inspection.files:
        tensors = _read_tensors(file)
        tables = {name: tensors.pop(name) for name in (SHARED, EMBED) if name in tensors}
        if file == inspection.tables[key].file:
            tensors[SHARED] = tables[key]
        if not tensors:  # a shard that held the other table and nothing else
            continue
        is_single = len(inspection.files) == 1
        name = "model.safetensors" if is_single else f"{file.stem}.safetensors"
        write_tensors(out / name, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    if len(inspection.files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(out / "model.safetensors.index.json", index)


def _read_tensors(file: Path) -> dict[str, torch.Tensor]:
    if file.suffix == ".bin":
        return torch.load(file, map_location="cpu", weights_only=True)
    return load_file(file)


def _copy_settings(folder: Path, out: Path) -> None:
    """Copies the JSON files except indices; config.json asks for tied tables in the copy."""
    for file in folder.glob("[!.]*.json"):
        if ".index." not in file.name:
            shutil.copyfile(file, out / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("transformers_weights", None)  # names a file of the source
    _write_json(out / "config.json", config | {"tie_word_embeddings": True})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
