"""Which of two stored token tables is the true one, judged by their values."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import UMT5EncoderModel

from wan_distill.errors import TextEncoderError
from wan_distill.umt5.inspect import Inspection
from wan_distill.umt5.tables import EMBED, SHARED, StoredTable, rows_to_compare
from wan_distill.umt5.verify import read_rows

PLAUSIBLE_SPREAD = (1e-4, 1e3)  # standard deviation of all values of a trained table
ORIGINAL = "get the original checkpoint"
LEAST_DIFFERENCE = 1e-2  # between the embeddings of unlike prompts, relative to their norm


def compare_pickled(inspection: Inspection) -> Inspection:
    """The inspection, with `tables_equal` filled in where two tables lie in pickles.

    Unpickles them: call `refuse_pickles` first.
    """
    if len(inspection.tables) < 2 or inspection.tables_equal is not None:
        return inspection
    shared, embed = (read_rows(inspection.tables[key]) for key in (SHARED, EMBED))
    return replace(inspection, tables_equal=torch.equal(shared, embed))


def trusted_key(inspection: Inspection, encoder: UMT5EncoderModel | None = None) -> str:
    """The name of the stored table to trust, judged by the rows that are compared.

    The canary runs on the layers of `encoder`, where one is given. Raises TextEncoderError where no
    table is healthy, and where two are and differ.
    """
    inspection = compare_pickled(inspection)
    keys = [SHARED] if inspection.tables_equal else list(inspection.tables)
    faults = {}
    for key in keys:
        rows = _rows_to_judge(inspection.tables[key])
        faults[key] = unhealthy(rows)
        if not faults[key] and encoder is not None and len(keys) > 1:
            faults[key] = canary(encoder, rows)
    healthy = [key for key in keys if not faults[key]]
    if len(healthy) == 2:
        raise TextEncoderError(
            f"{inspection.folder}: {SHARED} and {EMBED} differ and both look healthy, so it "
            "is not known which is right",
            ORIGINAL,
        )
    if not healthy:
        why = ", ".join(f"{key} {fault}" for key, fault in faults.items())
        raise TextEncoderError(
            f"{inspection.folder}: the file holds no healthy token table ({why})", ORIGINAL
        )
    return healthy[0]


def _rows_to_judge(stored: StoredTable) -> torch.Tensor:
    if stored.place is None:
        return read_rows(stored)
    return read_rows(stored, rows_to_compare(stored.place.shape, stored.place.item_size))


def unhealthy(rows: torch.Tensor) -> str:
    """Why `rows` [n, D] cannot be of a trained token table; empty if they can."""
    values = rows.float()
    if not values.isfinite().all():
        return "holds NaN or infinite values"
    spread = float(values.std())
    if not PLAUSIBLE_SPREAD[0] < spread < PLAUSIBLE_SPREAD[1]:
        return f"has values that spread by {spread:.1e}, which no trained table does"
    if float((values.std(dim=1) < 1e-6 * spread).float().mean()) > 0.5:
        return "is constant in most of its rows"
    return ""


def canary(encoder: UMT5EncoderModel, rows: torch.Tensor) -> str:
    """Why `encoder` cannot work on token vectors `rows` [n, D]; empty if it can.

    Prompts of random rows must give finite embeddings: unlike prompts clearly different ones, equal
    prompts equal ones.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(rows.shape[0], (2, 8), generator=generator)
    tokens = prompts[[0, 1, 0]]
    place = next(p for p in encoder.encoder.block.parameters() if not p.is_meta)
    with torch.no_grad():
        output = encoder(inputs_embeds=rows[tokens].to(place.device, encoder.dtype))
    return why_alike(output.last_hidden_state.float())[1]


def why_alike(states: torch.Tensor) -> tuple[float, str]:
    """(difference, fault) of the embeddings [3, L, D] of two unlike prompts and the first again.

    The difference of the first two is relative to the norm of the first; the fault is empty where
    they are finite and clearly different, and equal prompts gave equal ones.
    """
    if not states.isfinite().all():
        return 0.0, "gives NaN or infinite embeddings"
    difference = float((states[0] - states[1]).norm() / states[0].norm().clamp_min(1e-30))
    if difference < LEAST_DIFFERENCE:
        return difference, f"gives unlike prompts nearly equal embeddings ({difference:.1e} apart)"
    if not torch.equal(states[0], states[2]):
        return difference, "gives one prompt two embeddings"
    return difference, ""
