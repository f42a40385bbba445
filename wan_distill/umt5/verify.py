"""The table in use against the file's, whatever the loader said."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.umt5.inspect import (
    EMBED,
    ITEM_SIZE,
    SHARED,
    Inspection,
    StoredTable,
    check_class,
    inspect_text_encoder,
    installed_transformers,
    rows_to_compare,
)


@dataclass(frozen=True)
class Verification:
    """The table in use against the file. `matches` None: it cannot be told, and `reason` says why."""

    matches: bool | None
    shares: bool
    rows_compared: int
    rows_total: int
    reason: str = ""


@dataclass(frozen=True)
class Verdict:
    """PASS: right as loaded. REPAIRED: right now. BROKEN: must not be used."""

    verdict: str
    reason: str
    remedy: str
    keys_in_file: str
    rows_compared: int
    rows_total: int
    transformers: str
    fingerprint: str = ""
    loads_right_on: str = field(default="")

    def to_json(self) -> dict:
        return asdict(self)

    def explain(self) -> list[str]:
        """Three lines: what the load report means, what was verified, what was done."""
        done = {
            "PASS": "Nothing needed repair.",
            "REPAIRED": f"Repaired in memory: {self.reason}. {self.remedy}",
            "BROKEN": f"Not usable: {self.reason}. {self.remedy}",
        }[self.verdict]
        return [
            "Text encoder: UMT5 has one token table under two names; this file holds "
            f"{self.keys_in_file}. A report "
            f"that {EMBED} is MISSING is harmless only if the two are tied after loading "
            "(transformers "
            f"{self.transformers}; right on: {self.loads_right_on}).",
            f"Verified: {self.rows_compared} of {self.rows_total} rows of the table in use equal "
            "the file's."
            if self.verdict != "BROKEN"
            else f"Verified: the table in use is wrong ({self.rows_compared} rows read).",
            done,
        ]


def remember(verdict: Verdict, note: Path, files: str) -> None:
    """Notes what was found out about the text encoder whose files have the fingerprint `files`."""
    from wan_distill.system.files import write_atomically

    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        note, json.dumps(dict(files=files, verdict=verdict.to_json()), indent=1).encode()
    )


def recall(note: Path, files: str) -> Verdict | None:
    """What `remember` noted, if it was about these very files and the transformers installed now."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        verdict = Verdict(**noted["verdict"]) if noted["files"] == files else None
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # no note of ours: then it is loaded and verified
        return None
    return verdict if verdict and verdict.transformers == installed_transformers() else None


def table_in_use(encoder):
    """The parameter that turns token ids into vectors, [V, D]; follows accelerate's offloading to
    its true copy.
    """
    module = encoder.encoder.embed_tokens
    weight = module.weight
    hook = module.__dict__.get("_hf_hook")
    if weight.is_meta and hook is not None:
        weight = hook.weights_map["weight"]
    return weight


def verify(encoder, source: str | Path | Inspection, key: str | None = None) -> Verification:
    """Compares the table in use with the file's, row by row, at the loaded dtype.

    Args:
        encoder: a loaded UMT5EncoderModel; quantised Linear layers, offloading and device maps do
            not matter.
        source: its folder, or its inspection.
        key: which stored table is the truth; by default the only one, or `shared.weight`.

    Raises TextEncoderError where the encoder is of another class or the file holds no table.
    """
    import torch

    found = source if isinstance(source, Inspection) else inspect_text_encoder(source)
    check_class(found, type(encoder).__name__)
    stored = found.tables[key or (SHARED if SHARED in found.tables else EMBED)]
    used = table_in_use(encoder)
    shares = encoder.shared.weight is encoder.encoder.embed_tokens.weight or (
        not used.is_meta and used.data_ptr() == encoder.shared.weight.data_ptr()
    )
    total = used.shape[0]
    if used.is_meta:
        return Verification(
            None, shares, 0, total, "the table is on the meta device: it has no values to compare"
        )
    if type(used.data) is not torch.Tensor or not used.is_floating_point():
        return Verification(
            None, shares, 0, total, f"the table itself is quantised ({type(used.data).__name__})"
        )
    if stored.shape is not None and tuple(used.shape) != stored.shape:
        return Verification(
            False, shares, 0, total, f"its shape is {tuple(used.shape)}, the file's {stored.shape}"
        )
    rows = rows_to_compare(tuple(used.shape), used.element_size())
    expected = read_rows(stored, rows).to(used.dtype)
    actual = used.detach()[torch.tensor(rows, device=used.device)].cpu()
    same = torch.equal(
        expected.contiguous().view(torch.uint8), actual.contiguous().view(torch.uint8)
    )
    return Verification(
        same, shares, len(rows), total, "" if same else "the table in use is not the file's"
    )


def read_rows(stored: StoredTable, rows: list[int] | None = None):
    """Rows [n, D] of a stored table as a tensor; all of them for None."""
    import torch
    from safetensors import safe_open

    if stored.offset is None:
        table = torch.load(stored.file, map_location="cpu", weights_only=True, mmap=True)[
            stored.key
        ]
        return table if rows is None else table[rows]
    with safe_open(stored.file, framework="pt") as file:
        table = file.get_slice(stored.key)
        if rows is None or len(rows) == stored.shape[0]:
            return table[:]
        return torch.cat([table[row : row + 1] for row in rows])


def fingerprint(encoder) -> str:
    """A hash of the table in use: shape, dtype and rows (a seeded sample of large tables). The same
    on any device, under any offloading and with any version of transformers."""
    import torch

    used = table_in_use(encoder).detach()
    rows = rows_to_compare(tuple(used.shape), used.element_size())
    values = used[torch.tensor(rows, device=used.device)].cpu().contiguous().view(torch.uint8)
    digest = hashlib.sha256(f"{tuple(used.shape)} {used.dtype}".encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def unhealthy(rows) -> str:
    """Why `rows` [n, D] cannot be of a trained token table; empty if they can."""
    values = rows.float()
    if not values.isfinite().all():
        return "holds NaN or infinite values"
    spread = float(values.std())
    if not 1e-4 < spread < 1e3:
        return f"has values that spread by {spread:.1e}, which no trained table does"
    if float((values.std(dim=1) < 1e-6 * spread).float().mean()) > 0.5:
        return "is constant in most of its rows"
    return ""


def canary(encoder, rows) -> str:
    """Why `encoder` cannot work on token vectors `rows` [n, D]; empty if unlike prompts give
    finite, clearly different embeddings and equal prompts equal ones."""
    import torch

    tokens = torch.randint(rows.shape[0], (2, 8), generator=torch.Generator().manual_seed(0))[
        [0, 1, 0]
    ]
    place = next(p for p in encoder.encoder.block.parameters() if not p.is_meta)
    with torch.no_grad():
        states = encoder(
            inputs_embeds=rows[tokens].to(place.device, encoder.dtype)
        ).last_hidden_state.float()
    if not states.isfinite().all():
        return "gives NaN or infinite embeddings"
    difference = float((states[0] - states[1]).norm() / states[0].norm())
    if difference < 1e-2 or not torch.equal(states[0], states[2]):
        return f"gives unlike prompts nearly equal embeddings ({difference:.1e} apart)"
    return ""


def trusted_key(found: Inspection, encoder=None) -> str:
    """The stored table to trust, by evidence from (a sample of) its rows.

    `encoder`, when given, lends its layers to the canary. Raises TextEncoderError where no table is
    healthy, or where two are and differ.
    """
    keys = [SHARED] if found.tables_equal else list(found.tables)
    reasons = {}
    for key in keys:
        stored = found.tables[key]
        rows = read_rows(
            stored, rows_to_compare(stored.shape, ITEM_SIZE[stored.dtype]) if stored.shape else None
        )
        reasons[key] = unhealthy(rows) or (
            canary(encoder, rows) if encoder is not None and len(keys) > 1 else ""
        )
    good = [key for key, reason in reasons.items() if not reason]
    if len(good) == 2:
        raise TextEncoderError(
            f"{found.folder}: {SHARED} and {EMBED} differ and both look healthy; nothing here "
            "tells "
            "which is right: get the original checkpoint"
        )
    if not good:
        why = ", ".join(f"{key} {reason}" for key, reason in reasons.items())
        raise TextEncoderError(
            f"{found.folder}: the file holds no healthy token table ({why}); "
            "get the original checkpoint"
        )
    return good[0]
