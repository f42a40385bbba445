"""The truth about a UMT5 text encoder's tied weights: inspect the file, verify the memory, repair, explain.

UMT5 keeps one token table under two names, `shared.weight` and `encoder.embed_tokens.weight`; Wan's checkpoints
store only the first. Whether the second is then tied to it or left as uninitialised memory depends on the version
of transformers (docs/UMT5_WEIGHT_LOADING.md), so the table *in use* is compared with the file, whatever was said.

Inspecting needs neither torch nor transformers: they are imported by the functions that touch a loaded encoder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
ALL_ROWS_BELOW = 64 << 20  # bytes: tables up to this size are compared whole
SAMPLED_ROWS = 4096  # of a larger table: 32 MB of UMT5-XXL's 2.1 GB
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


class TextEncoderError(ValueError):
    """A text encoder that must not be trained on. The message says what, why and what to do, in one line."""


# ------------------------------------------------------------------------------------------------------------ inspect


@dataclass(frozen=True)
class StoredTable:
    """Where a token table lies in a file. Shape [V, D]; offset and dtype are None in pickles."""

    key: str
    file: Path
    shape: tuple[int, ...] | None
    dtype: str | None
    offset: int | None

    def rows(self, indices: list[int]) -> list[bytes]:
        """Raw bytes of the given rows, read from the file one by one."""
        size = self.shape[1] * ITEM_SIZE[self.dtype]
        with self.file.open("rb") as data:
            found = []
            for index in indices:
                data.seek(self.offset + index * size)
                found.append(data.read(size))
        return found


@dataclass(frozen=True)
class Inspection:
    """What the configuration and the files say, without loading a weight."""

    folder: Path
    architecture: str
    model_type: str
    tie_word_embeddings: bool | None
    tables: dict[str, StoredTable]
    tables_equal: bool | None
    transformers: str

    @property
    def keys_in_file(self) -> str:
        if len(self.tables) == 2:
            return "both, equal" if self.tables_equal else "both, different"
        only = next(iter(self.tables), "neither")
        return {SHARED: "shared only", EMBED: "embed_tokens only"}.get(only, only)

    @property
    def loads_right_on(self) -> str:
        """Versions of transformers whose `from_pretrained` gives the right table (measured: docs/UMT5_MATRIX.md)."""
        return {
            "shared only": "4.x, and 5.3 or newer (5.0 to 5.2 leave the table uninitialised)",
            "embed_tokens only": "any", "both, equal": "any", "neither": "none",
            "both, different": "none for certain: 4.x uses shared, 5.x uses embed_tokens, without a word",
        }[self.keys_in_file]

    def loads_right_here(self) -> bool | None:
        """Whether the installed transformers would load it right; None where nothing can be told."""
        major, minor = (int(part) for part in self.transformers.split(".")[:2]) if self.transformers else (0, 0)
        if self.keys_in_file == "shared only" and self.transformers:
            return not (major == 5 and minor < 3)
        return {"neither": False, "both, different": None}.get(self.keys_in_file, True)


def installed_transformers() -> str:
    """Version of transformers; empty without it."""
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


def inspect_text_encoder(folder: str | Path) -> Inspection:
    """Reads config.json and the headers of the weight files below `folder` (a text encoder's, or a pipeline's).

    Raises TextEncoderError where there is no UMT5 text encoder or its files contradict each other.
    """
    folder = Path(folder)
    if (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TextEncoderError(f"{folder}: config.json cannot be read ({error}); give the folder of a Wan pipeline or "
                               "of its text encoder") from error
    tables = {key: table for file in weight_files(folder) for key, table in _tables_in(file).items()}
    both = [tables[key] for key in (SHARED, EMBED) if key in tables]
    return Inspection(
        folder=folder, architecture=(config.get("architectures") or ["?"])[0], model_type=config.get("model_type", "?"),
        tie_word_embeddings=config.get("tie_word_embeddings"), tables=tables,
        tables_equal=_equal(*both) if len(both) == 2 else None, transformers=installed_transformers())


def weight_files(folder: Path) -> list[Path]:
    """The weight files that the index names, or all there are; safetensors before pickles."""
    for pattern in ("*.safetensors", "*.bin"):
        for index in sorted(folder.glob(f"{pattern}.index.json")):
            named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in named if not (folder / name).is_file()]
            if missing:
                raise TextEncoderError(f"{folder}: {missing[0]} is named by {index.name} but missing; "
                                       "download it again")
            return [folder / name for name in named]
        if files := sorted(folder.glob(pattern)):
            return files
    raise TextEncoderError(f"{folder}: no weight file (*.safetensors or *.bin) here; download the text encoder again")


def read_header(file: Path) -> tuple[dict, int]:
    """A safetensors file's header, and where its data begins. Raises TextEncoderError on a damaged file."""
    size = file.stat().st_size
    with file.open("rb") as data:
        start = data.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise TextEncoderError(f"{file}: truncated or not safetensors; download it again")
        try:
            header = json.loads(data.read(length))
        except ValueError as error:
            raise TextEncoderError(f"{file}: its header is damaged; download it again") from error
    end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    if 8 + length + end > size:
        raise TextEncoderError(f"{file}: truncated ({size} of {8 + length + end} bytes); download it again")
    return header, 8 + length


def _tables_in(file: Path) -> dict[str, StoredTable]:
    if file.suffix == ".bin":
        return {key: StoredTable(key, file, None, None, None) for key in _names_in_pickle(file) & {SHARED, EMBED}}
    header, data = read_header(file)
    return {key: StoredTable(key, file, tuple(header[key]["shape"]), header[key]["dtype"],
                             data + header[key]["data_offsets"][0]) for key in (SHARED, EMBED) if key in header}


def _names_in_pickle(file: Path) -> set[str]:
    """Every text in a .bin file's pickle, read without executing any of it."""
    import pickletools
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            return {argument for _, argument, _ in pickletools.genops(archive.read(name)) if isinstance(argument, str)}
    except (zipfile.BadZipFile, StopIteration) as error:
        raise TextEncoderError(f"{file}: not a torch checkpoint; download it again") from error


def rows_to_compare(shape: tuple[int, ...], item_size: int) -> list[int]:
    """All rows of a small table; a seeded sample of a large one, first and last row included."""
    count = shape[0]
    if count <= SAMPLED_ROWS or count * shape[1] * item_size <= ALL_ROWS_BELOW:
        return list(range(count))
    return sorted({0, count - 1, *random.Random(0).sample(range(count), SAMPLED_ROWS)})


def _equal(a: StoredTable, b: StoredTable) -> bool | None:
    if a.offset is None or b.offset is None:
        return None
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    rows = rows_to_compare(a.shape, ITEM_SIZE[a.dtype])
    return a.rows(rows) == b.rows(rows)


# ------------------------------------------------------------------------------------------------------------ silence

_REPORT_LOGGERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_quiet_threads: dict[int, int] = {}
_lock = threading.Lock()


def is_tied_weight_report(message: str) -> bool:
    """Whether `message` reports the tied table, and nothing else, as missing from a UMT5 or T5 encoder's file."""
    text = _ANSI.sub("", message)
    if re.search(r"\w*T5EncoderModel LOAD REPORT", text):
        rows = re.findall(r"^\s*(\S+)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", text, re.M)
        return [(name, status) for name, status in rows] == [(EMBED, "MISSING")]
    newly = re.search(r"T5EncoderModel were not initialized .*newly initialized: \[(.*?)\]", text, re.S)
    return newly is not None and newly.group(1).strip("'\" ") == EMBED


class _ReportFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (threading.get_ident() in _quiet_threads and is_tied_weight_report(record.getMessage()))


_filter = _ReportFilter()


def _show_unless_report(message, category, filename, lineno, file=None, line=None) -> None:
    if not (threading.get_ident() in _quiet_threads and is_tied_weight_report(str(message))):
        _show_before(message, category, filename, lineno, file, line)


_show_before = warnings.showwarning


@contextmanager
def silence_tied_weight_report(verbose: bool = False) -> Iterator[None]:
    """Inside, on this thread, the report that only the tied table is missing is not shown; anything else is.

    transformers 5 writes it through `logging`, so a `warnings` filter alone misses it: both paths are covered.
    `verbose` shows everything. What was changed is put back, also after an error.
    """
    global _show_before
    if verbose:
        yield
        return
    thread = threading.get_ident()
    with _lock:
        if not _quiet_threads:
            _show_before, warnings.showwarning = warnings.showwarning, _show_unless_report
            for name in _REPORT_LOGGERS:
                logging.getLogger(name).addFilter(_filter)
        _quiet_threads[thread] = _quiet_threads.get(thread, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _quiet_threads[thread] -= 1
            if not _quiet_threads[thread]:
                del _quiet_threads[thread]
            if not _quiet_threads:
                warnings.showwarning = _show_before
                for name in _REPORT_LOGGERS:
                    logging.getLogger(name).removeFilter(_filter)


# ------------------------------------------------------------------------------------------------------------- verify


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
        done = {"PASS": "Nothing needed repair.", "REPAIRED": f"Repaired in memory: {self.reason}. {self.remedy}",
                "BROKEN": f"Not usable: {self.reason}. {self.remedy}"}[self.verdict]
        return [
            f"Text encoder: UMT5 has one token table under two names; this file holds {self.keys_in_file}. A report "
            f"that {EMBED} is MISSING is harmless only if the two are tied after loading (transformers "
            f"{self.transformers}; right on: {self.loads_right_on}).",
            f"Verified: {self.rows_compared} of {self.rows_total} rows of the table in use equal the file's."
            if self.verdict != "BROKEN" else f"Verified: the table in use is wrong ({self.rows_compared} rows read).",
            done,
        ]


def remember(verdict: Verdict, note: Path, files: str) -> None:
    """Notes what was found out about the text encoder whose files have the fingerprint `files`."""
    from wan_distill.checkpoint import write_atomically

    note.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(note, json.dumps(dict(files=files, verdict=verdict.to_json()), indent=1).encode())


def recall(note: Path, files: str) -> Verdict | None:
    """What `remember` noted, if it was about these very files and the transformers installed now."""
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
        verdict = Verdict(**noted["verdict"]) if noted["files"] == files else None
    except (OSError, ValueError, KeyError, TypeError):  # no note of ours: then it is loaded and verified
        return None
    return verdict if verdict and verdict.transformers == installed_transformers() else None


def table_in_use(encoder):
    """The parameter that turns token ids into vectors, [V, D]; follows accelerate's offloading to its true copy."""
    module = encoder.encoder.embed_tokens
    weight = module.weight
    hook = module.__dict__.get("_hf_hook")
    if weight.is_meta and hook is not None:
        weight = hook.weights_map["weight"]
    return weight


def verify(encoder, source: str | Path | Inspection, key: str | None = None) -> Verification:
    """Compares the table in use with the file's, row by row, at the loaded dtype.

    Args:
        encoder: a loaded UMT5EncoderModel; quantised Linear layers, offloading and device maps do not matter.
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
        not used.is_meta and used.data_ptr() == encoder.shared.weight.data_ptr())
    total = used.shape[0]
    if used.is_meta:
        return Verification(None, shares, 0, total, "the table is on the meta device: it has no values to compare")
    if type(used.data) is not torch.Tensor or not used.is_floating_point():
        return Verification(None, shares, 0, total, f"the table itself is quantised ({type(used.data).__name__})")
    if stored.shape is not None and tuple(used.shape) != stored.shape:
        return Verification(False, shares, 0, total, f"its shape is {tuple(used.shape)}, the file's {stored.shape}")
    rows = rows_to_compare(tuple(used.shape), used.element_size())
    expected = read_rows(stored, rows).to(used.dtype)
    actual = used.detach()[torch.tensor(rows, device=used.device)].cpu()
    same = torch.equal(expected.contiguous().view(torch.uint8), actual.contiguous().view(torch.uint8))
    return Verification(same, shares, len(rows), total, "" if same else "the table in use is not the file's")


def read_rows(stored: StoredTable, rows: list[int] | None = None):
    """Rows [n, D] of a stored table as a tensor; all of them for None."""
    import torch
    from safetensors import safe_open

    if stored.offset is None:
        table = torch.load(stored.file, map_location="cpu", weights_only=True, mmap=True)[stored.key]
        return table if rows is None else table[rows]
    with safe_open(stored.file, framework="pt") as file:
        table = file.get_slice(stored.key)
        if rows is None or len(rows) == stored.shape[0]:
            return table[:]
        return torch.cat([table[row:row + 1] for row in rows])


def check_class(found: Inspection, loaded: str) -> None:
    """Raises TextEncoderError unless this is a UMT5 encoder, loaded as one: T5 loads it without error, and wrong."""
    if found.model_type != "umt5" or loaded != "UMT5EncoderModel":
        raise TextEncoderError(
            f"{found.folder}: a {found.model_type} checkpoint loaded as {loaded}; Wan's text encoder is UMT5, whose "
            "every layer has its own position bias: load it with UMT5EncoderModel")
    if not found.tables:
        raise TextEncoderError(f"{found.folder}: holds neither {SHARED} nor {EMBED}; download the text encoder again")


def fingerprint(encoder) -> str:
    """A hash of the table in use: shape, dtype and rows (a seeded sample of large tables). The same on any device,
    under any offloading and with any version of transformers."""
    import torch

    used = table_in_use(encoder).detach()
    rows = rows_to_compare(tuple(used.shape), used.element_size())
    values = used[torch.tensor(rows, device=used.device)].cpu().contiguous().view(torch.uint8)
    digest = hashlib.sha256(f"{tuple(used.shape)} {used.dtype}".encode())
    digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


# ----------------------------------------------------------------------------------------------------- decide, repair


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
    """Why `encoder` cannot work on token vectors `rows` [n, D]; empty if unlike prompts give finite, clearly
    different embeddings and equal prompts equal ones."""
    import torch

    tokens = torch.randint(rows.shape[0], (2, 8), generator=torch.Generator().manual_seed(0))[[0, 1, 0]]
    place = next(p for p in encoder.encoder.block.parameters() if not p.is_meta)
    with torch.no_grad():
        states = encoder(inputs_embeds=rows[tokens].to(place.device, encoder.dtype)).last_hidden_state.float()
    if not states.isfinite().all():
        return "gives NaN or infinite embeddings"
    difference = float((states[0] - states[1]).norm() / states[0].norm())
    if difference < 1e-2 or not torch.equal(states[0], states[2]):
        return f"gives unlike prompts nearly equal embeddings ({difference:.1e} apart)"
    return ""


def trusted_key(found: Inspection, encoder=None) -> str:
    """The stored table to trust, by evidence from (a sample of) its rows.

    `encoder`, when given, lends its layers to the canary. Raises TextEncoderError where no table is healthy, or
    where two are and differ.
    """
    keys = [SHARED] if found.tables_equal else list(found.tables)
    reasons = {}
    for key in keys:
        stored = found.tables[key]
        rows = read_rows(stored, rows_to_compare(stored.shape, ITEM_SIZE[stored.dtype]) if stored.shape else None)
        reasons[key] = unhealthy(rows) or (canary(encoder, rows) if encoder is not None and len(keys) > 1 else "")
    good = [key for key, reason in reasons.items() if not reason]
    if len(good) == 2:
        raise TextEncoderError(f"{found.folder}: {SHARED} and {EMBED} differ and both look healthy; nothing here tells "
                               "which is right: get the original checkpoint")
    if not good:
        why = ", ".join(f"{key} {reason}" for key, reason in reasons.items())
        raise TextEncoderError(f"{found.folder}: the file holds no healthy token table ({why}); "
                               "get the original checkpoint")
    return good[0]


def repair(encoder, source: str | Path | Inspection, key: str | None = None) -> None:
    """Puts the file's table in use under both names, as one parameter, in the encoder's dtype and place.

    Do this before anything is quantised, offloaded, sharded or compiled.
    """
    import torch

    found = source if isinstance(source, Inspection) else inspect_text_encoder(source)
    stored = found.tables[key or trusted_key(found, encoder)]
    old = encoder.encoder.embed_tokens.weight
    place = next((p.device for p in encoder.parameters() if not p.is_meta), torch.device("cpu"))
    table = torch.nn.Parameter(read_rows(stored).to(place, old.dtype), requires_grad=old.requires_grad)
    encoder.shared.weight = table
    encoder.encoder.embed_tokens.weight = table


def settle(encoder, found: Inspection) -> Verdict:
    """Verifies a loaded encoder, repairs it in memory where needed, and says so. Raises TextEncoderError."""
    check_class(found, type(encoder).__name__)
    key, done, remedy = trusted_key(found, encoder), [], ""
    if len(found.tables) == 2 and not found.tables_equal:
        remedy = "Write a clean copy: python test_umt5_weights.py --teacher_path ... --repair OUT"
        done.append(f"the file holds two different tables, of which {key} is healthy")
    checked = verify(encoder, found, key)
    if checked.matches is None and not table_in_use(encoder).is_meta:
        raise TextEncoderError(f"{found.folder}: cannot be verified, {checked.reason}; load it unquantised first")
    if not checked.matches:
        repair(encoder, found, key)
        done.append(f"{checked.reason}; the file's was put in its place")
    elif not checked.shares:
        repair(encoder, found, key)
        done.append("the two names held equal but separate tables; they share one now")
    checked = verify(encoder, found, key)
    if not checked.matches:
        raise TextEncoderError(f"{found.folder}: {checked.reason}, also after repair; get the original checkpoint")
    return Verdict("REPAIRED" if done else "PASS", "; ".join(done) or "the table in use is the file's", remedy,
                   found.keys_in_file, checked.rows_compared, checked.rows_total, found.transformers,
                   fingerprint(encoder), found.loads_right_on)


def load_text_encoder(source: str | Path, *, subfolder: str = "text_encoder", torch_dtype=None, revision=None,
                      cache_dir=None, verbose: bool = False, allow_pickle: bool = False, **kwargs):
    """Loads a UMT5 text encoder quietly and makes sure that its table is the file's.

    Args:
        source: hub id, pipeline folder, or text encoder folder.
        kwargs: go to `UMT5EncoderModel.from_pretrained`.

    Returns (encoder in eval mode, Verdict). Raises TextEncoderError where it is broken beyond repair.
    """
    folder = locate(source, subfolder, revision, cache_dir)
    found = inspect_text_encoder(folder)
    check_class(found, "UMT5EncoderModel")
    if not allow_pickle:
        refuse_pickle(found)
    from transformers import UMT5EncoderModel

    with silence_tied_weight_report(verbose):
        encoder = UMT5EncoderModel.from_pretrained(found.folder, torch_dtype=torch_dtype, **kwargs)
    return encoder.eval(), settle(encoder, found)


def refuse_pickle(found: Inspection) -> None:
    """Raises TextEncoderError where the weights are pickles."""
    if any(file.suffix == ".bin" for file in weight_files(found.folder)):
        raise TextEncoderError(f"{found.folder}: holds only .bin weights and unpickling can run code; convert them to "
                               "safetensors, or pass --allow_pickle if you trust them")


def locate(source: str | Path, subfolder: str = "text_encoder", revision=None, cache_dir=None) -> Path:
    """The local folder of a text encoder; from the hub only its own files are fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), revision=revision, cache_dir=cache_dir,
                                      allow_patterns=[f"{subfolder}/*"])) / subfolder
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextEncoderError(f"{source}: neither a folder here nor reachable on the hub ({reason}); "
                               "check the spelling and the network") from error


# ----------------------------------------------------------------------------------------------------- repair on disk


def repair_on_disk(source: str | Path, out: str | Path) -> Verdict:
    """Writes a clean copy of a text encoder to the new folder `out`, atomically, and loads it back to verify it.

    The copy holds one table, `shared.weight`, and says `tie_word_embeddings: true`, which every version of
    transformers loads right. `source` is never written to.
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
        config = json.loads((found.folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _, verdict = load_text_encoder(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(verdict, verdict="REPAIRED", reason=f"a clean copy is in {out}, loaded back and verified")
