"""Compares the token table that a loaded encoder uses with the one in its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import UMT5EncoderModel

from wan_distill.system.files import write_atomically
from wan_distill.umt5.inspect import (
    Inspection,
    check_class,
    inspect_text_encoder,
    installed_transformers,
)
from wan_distill.umt5.tables import EMBED, SHARED, StoredTable, rows_to_compare


@dataclass(frozen=True)
class Verification:
    """The table in use against the file's.

    `matches` is None where they cannot be compared; `reason` then says why. `shares` says whether
    both names are one tensor in memory.
    """

    matches: bool | None
    shares: bool
    rows_compared: int
    rows_total: int
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """On a text encoder, and on its tokenizer where that lies beside it.

    PASS: right as loaded. REPAIRED: right now. BROKEN: must not be used.

    Attributes:
        fingerprint: of the encoder as it was loaded.
        tokenizer: fingerprint of the tokenizer's files; empty where there are none.
        entries: of the tokenizer.
        difference: between the embeddings of two unlike prompts, relative to their norm.
    """

    verdict: str
    reason: str
    remedy: str
    keys_in_file: str
    rows_compared: int
    rows_total: int
    transformers: str
    fingerprint: str = ""
    loads_right_on: str = ""
    tokenizer: str = ""
    entries: int = 0
    difference: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The fields, as `json.dumps` takes them."""
        return asdict(self)

    def explain(self) -> list[str]:
        """Three lines, on every run: what the load report means, what was verified, what was done.
        Also where all is well: users meet the report in other tools, and hear that it is cosmetic.
        """
        verified = (
            f"Verified: {self.rows_compared} of {self.rows_total} rows of the table in use equal "
            "the file's."
        )
        if self.entries:
            verified += (
                f" The tokenizer has {self.entries} entries for them; the embeddings of two unlike "
                f"prompts are {self.difference:.2g} of their norm apart."
            )
        if self.verdict == "BROKEN":
            verified = f"Verified: the table in use is wrong ({self.rows_compared} rows read)."
        return [
            "Text encoder: UMT5 has one token table under two names; this file holds "
            f"{self.keys_in_file}. A report that {EMBED} is MISSING is harmless only if the two "
            f"are tied after loading (transformers {self.transformers}; right on: "
            f"{self.loads_right_on}).",
            verified,
            {
                "PASS": "Nothing needed repair.",
                "REPAIRED": f"Repaired in memory: {self.reason}. {self.remedy}",
                "BROKEN": f"Not usable: {self.reason}. {self.remedy}",
            }[self.verdict],
        ]


def remember(verdict: Verdict, note: Path, files: str) -> None:
    """Writes the verdict on the text encoder whose files have the fingerprint `files` to `note`."""
    note.parent.mkdir(parents=True, exist_ok=True)
    content = {"files": files, "verdict": verdict.to_json()}
    write_atomically(note, json.dumps(content, indent=1).encode())


def recall(note: Path, files: str) -> Verdict | None:
    """The verdict that `remember` wrote to `note`; None unless it is about files of the fingerprint
    `files`, read by the transformers that is installed now.
    """
    try:
        content = json.loads(note.read_text(encoding="utf-8"))
        verdict = Verdict(**content["verdict"])
        is_current = content["files"] == files and verdict.transformers == installed_transformers()
    except (OSError, ValueError, KeyError, TypeError):  # missing, or not written by us
        return None
    return verdict if is_current else None


def table_in_use(encoder: UMT5EncoderModel) -> torch.Tensor:
    """The tensor [V, D] that turns token ids into vectors. Where accelerate has offloaded it, the
    copy that holds the values.
    """
    module = encoder.encoder.embed_tokens
    weight = module.weight
    hook = module.__dict__.get("_hf_hook")
    if weight.is_meta and hook is not None:
        return hook.weights_map["weight"]
    return weight


def verify(
    encoder: UMT5EncoderModel, source: str | Path | Inspection, key: str | None = None
) -> Verification:
    """Compares the table in use with the file's, row by row, at the loaded dtype.

    Args:
        encoder: loaded; its Linear layers may be quantised, and it may be offloaded or spread over
            devices.
        source: its folder, or the inspection of that.
        key: which stored table is the true one; by default the only one, or `shared.weight`.

    Raises TextEncoderError where the encoder is of another class or the file holds no table.
    """
    inspection = source if isinstance(source, Inspection) else inspect_text_encoder(source)
    check_class(inspection, type(encoder).__name__)
    stored = inspection.tables[key or (SHARED if SHARED in inspection.tables else EMBED)]
    used = table_in_use(encoder)
    shares = encoder.shared.weight is encoder.encoder.embed_tokens.weight or (
        not used.is_meta and used.data_ptr() == encoder.shared.weight.data_ptr()
    )
    total = used.shape[0]
    obstacle = _why_incomparable(used)
    if obstacle:
        return Verification(None, shares, 0, total, obstacle)
    shape = tuple(used.shape)
    if stored.place is not None and shape != stored.place.shape:
        reason = f"its shape is {shape}, the file's {stored.place.shape}"
        return Verification(False, shares, 0, total, reason)
    rows = rows_to_compare(shape, used.element_size())
    expected = read_rows(stored, rows).to(used.dtype)
    actual = used.detach()[torch.tensor(rows, device=used.device)].cpu()
    same = torch.equal(bits(expected), bits(actual))
    reason = "" if same else "the table in use is not the file's"
    return Verification(same, shares, len(rows), total, reason)


def _why_incomparable(table: torch.Tensor) -> str:
    """Why `table` has no values that could be compared with a file's; empty if it has."""
    if table.is_meta:
        return "the table is on the meta device: it has no values to compare"
    if type(table.data) is not torch.Tensor or not table.is_floating_point():
        return f"the table itself is quantised ({type(table.data).__name__})"
    return ""


def bits(values: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8: NaN equals NaN, and 8-bit floats can be compared."""
    return values.contiguous().view(torch.uint8)


def read_rows(stored: StoredTable, rows: list[int] | None = None) -> torch.Tensor:
    """Rows [n, D] of a stored table, by their indices; all of them for None."""
    if stored.place is None:
        state = torch.load(stored.file, map_location="cpu", weights_only=True, mmap=True)
        return state[stored.key] if rows is None else state[stored.key][rows]
    with safe_open(stored.file, framework="pt") as file:
        table = file.get_slice(stored.key)
        if rows is None or len(rows) == stored.place.shape[0]:
            return table[:]
        return torch.cat([table[row : row + 1] for row in rows])
