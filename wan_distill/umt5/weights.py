"""The encoder's tensors besides its table: against their files, and the fingerprint of all."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import UMT5EncoderModel

from wan_distill.umt5.inspect import Inspection
from wan_distill.umt5.tables import EMBED, SHARED, rows_to_compare
from wan_distill.umt5.verify import bits, table_in_use

HASHED_WHOLE = 1 << 20  # bytes: larger tensors are hashed at three places
ROWS = 32  # at each


def why_not_the_files(encoder: UMT5EncoderModel, inspection: Inspection) -> str:
    """Why a tensor of `encoder` cannot be the file's; empty if all can be.

    The first and the last row of each are compared, at its dtype. Left out are the table, which
    `verify` compares, and what is quantised or has no values here.
    """
    ours = dict(encoder.named_parameters(remove_duplicate=False))
    wanted = set(ours) - {SHARED, EMBED}
    for file in inspection.files:
        for name, first, last in _stored_rows(file, wanted):
            wanted.remove(name)
            used = ours[name].detach()
            if used.is_meta or type(ours[name].data) is not Tensor or not used.is_floating_point():
                continue
            for stored, row in ((first, used[:1]), (last, used[-1:])):
                if row.shape != stored.shape or not torch.equal(
                    bits(row.cpu()), bits(stored.to(used.dtype))
                ):
                    return f"{name} in use is not the file's"
    lacking = sorted(wanted)
    return f"the file lacks {len(lacking)} tensors, {lacking[0]} first" if lacking else ""


def _stored_rows(file: Path, names: set[str]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, first row, last row) of those of `names` that a weight file holds."""
    if file.suffix == ".bin":
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        for name in names & state.keys():
            yield name, state[name][:1], state[name][-1:]
        return
    with safe_open(file, framework="pt") as stored:
        for name in names & set(stored.keys()):
            rows = stored.get_slice(name)
            yield name, rows[:1], rows[-1:]


def fingerprint(encoder: UMT5EncoderModel) -> str:
    """A hash of the encoder in use, 32 hexadecimal digits: of each tensor's name, shape, dtype and
    values (of a large one, rows at its start, middle and end; of a large table, the sampled rows).

    How the files were laid out, the device, offloading and transformers do not change it.
    """
    digest = hashlib.sha256()
    table = table_in_use(encoder).detach()
    rows = rows_to_compare(tuple(table.shape), table.element_size())
    _add(digest, SHARED, table, table[torch.tensor(rows, device=table.device)])
    for module_name, module in sorted(encoder.named_modules()):
        for leaf, parameter in sorted(module.named_parameters(recurse=False)):
            name = f"{module_name}.{leaf}"
            if name.endswith((SHARED, EMBED)):
                continue
            hook = module.__dict__.get("_hf_hook")  # accelerate's, where it has offloaded
            values = hook.weights_map[leaf] if parameter.is_meta and hook else parameter.detach()
            _add(digest, name, values, *_sample(values))
    return digest.hexdigest()[:32]


def _sample(values: Tensor) -> list[Tensor]:
    if values.dim() < 2 or values.numel() * values.element_size() <= HASHED_WHOLE:
        return [values]
    middle = values.shape[0] // 2
    return [values[:ROWS], values[middle : middle + ROWS], values[-ROWS:]]


def _add(digest: hashlib._Hash, name: str, whole: Tensor, *parts: Tensor) -> None:
    digest.update(f"{name} {tuple(whole.shape)} {whole.dtype}\n".encode())
    for part in parts:
        digest.update(bits(part.cpu()).numpy().tobytes())
