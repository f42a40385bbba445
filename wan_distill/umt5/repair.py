"""Loads a text encoder, puts the file's table in use where it is not, or writes a clean copy."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.system.weight_files import weight_files
from wan_distill.umt5.inspect import (
    EMBED,
    SHARED,
    Inspection,
    check_class,
    inspect_text_encoder,
    locate,
    refuse_pickle,
)
from wan_distill.umt5.silence import silence_tied_weight_report
from wan_distill.umt5.verify import (
    Verdict,
    fingerprint,
    read_rows,
    table_in_use,
    trusted_key,
    verify,
)


def repair(encoder, source: str | Path | Inspection, key: str | None = None) -> None:
    """Puts the file's table in use under both names, as one parameter, in the encoder's dtype and
    place.

    Do this before anything is quantised, offloaded, sharded or compiled.
    """
    import torch

    found = source if isinstance(source, Inspection) else inspect_text_encoder(source)
    stored = found.tables[key or trusted_key(found, encoder)]
    old = encoder.encoder.embed_tokens.weight
    place = next((p.device for p in encoder.parameters() if not p.is_meta), torch.device("cpu"))
    table = torch.nn.Parameter(
        read_rows(stored).to(place, old.dtype), requires_grad=old.requires_grad
    )
    encoder.shared.weight = table
    encoder.encoder.embed_tokens.weight = table


def verify_or_repair(encoder, found: Inspection) -> Verdict:
    """Verifies a loaded encoder, repairs it in memory where needed, and says so. Raises
    TextEncoderError.
    """
    check_class(found, type(encoder).__name__)
    key, done, remedy = trusted_key(found, encoder), [], ""
    if len(found.tables) == 2 and not found.tables_equal:
        remedy = "Write a clean copy: python test_umt5_weights.py --teacher_path ... --repair OUT"
        done.append(f"the file holds two different tables, of which {key} is healthy")
    checked = verify(encoder, found, key)
    if checked.matches is None and not table_in_use(encoder).is_meta:
        raise TextEncoderError(
            f"{found.folder}: cannot be verified, {checked.reason}; load it unquantised first"
        )
    if not checked.matches:
        repair(encoder, found, key)
        done.append(f"{checked.reason}; the file's was put in its place")
    elif not checked.shares:
        repair(encoder, found, key)
        done.append("the two names held equal but separate tables; they share one now")
    checked = verify(encoder, found, key)
    if not checked.matches:
        raise TextEncoderError(
            f"{found.folder}: {checked.reason}, also after repair; get the original checkpoint"
        )
    return Verdict(
        "REPAIRED" if done else "PASS",
        "; ".join(done) or "the table in use is the file's",
        remedy,
        found.keys_in_file,
        checked.rows_compared,
        checked.rows_total,
        found.transformers,
        fingerprint(encoder),
        found.loads_right_on,
    )


def load_text_encoder(
    source: str | Path,
    *,
    subfolder: str = "text_encoder",
    torch_dtype=None,
    revision=None,
    cache_dir=None,
    verbose: bool = False,
    allow_pickle: bool = False,
    **kwargs,
):
    """Loads a UMT5 text encoder quietly and makes sure that its table is the file's.

    Args:
        source: hub id, pipeline folder, or text encoder folder.
        kwargs: go to `UMT5EncoderModel.from_pretrained`.

    Returns (encoder in eval mode, Verdict). Raises TextEncoderError where it is broken beyond
    repair.
    """
    folder = locate(source, subfolder, revision, cache_dir)
    found = inspect_text_encoder(folder)
    check_class(found, "UMT5EncoderModel")
    if not allow_pickle:
        refuse_pickle(found)
    from transformers import UMT5EncoderModel

    with silence_tied_weight_report(verbose):
        encoder = UMT5EncoderModel.from_pretrained(found.folder, torch_dtype=torch_dtype, **kwargs)
    return encoder.eval(), verify_or_repair(encoder, found)


def repair_on_disk(source: str | Path, out: str | Path) -> Verdict:
    """Writes a clean copy of a text encoder to the new folder `out`, atomically, and loads it back
    to verify it.

    The copy holds one table, `shared.weight`, and says `tie_word_embeddings: true`, which every
    version of transformers loads right. `source` is never written to.
    """
    from safetensors.torch import load_file, save_file

    found, out = inspect_text_encoder(locate(source)), Path(out)
    if out.exists():
        raise TextEncoderError(f"--repair {out}: already exists; give a new folder")
    refuse_pickle(found)
    encoder, _ = load_text_encoder(found.folder)
    truth = found.tables[trusted_key(found, encoder)]
    del encoder
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        weight_map, total = {}, 0
        for file in weight_files(found.folder):
            tensors = load_file(file)
            here = tensors.pop(SHARED, None), tensors.pop(EMBED, None)
            if file == truth.file:
                tensors[SHARED] = here[0] if truth.key == SHARED else here[1]
            save_file(tensors, partial / file.name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file.name)
            total += sum(t.numel() * t.element_size() for t in tensors.values())
        for file in found.folder.iterdir():
            if file.suffix == ".json" and not file.name.endswith(".index.json"):
                shutil.copy2(file, partial)
        config = json.loads((found.folder / "config.json").read_text(encoding="utf-8")) | {
            "tie_word_embeddings": True
        }
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n", encoding="utf-8"
            )
        _, verdict = load_text_encoder(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(
        verdict, verdict="REPAIRED", reason=f"a clean copy is in {out}, loaded back and verified"
    )
