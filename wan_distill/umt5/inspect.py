"""What a text encoder's configuration and files say, without loading a weight; needs no torch."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.system.weight_files import read_header, weight_files

SHARED, EMBED = "shared.weight", "encoder.embed_tokens.weight"
ALL_ROWS_BELOW = 64 << 20  # bytes: tables up to this size are compared whole
SAMPLED_ROWS = 4096  # of a larger table: 32 MB of UMT5-XXL's 2.1 GB
ITEM_SIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


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
        """Versions of transformers whose `from_pretrained` gives the right table (measured:
        docs/UMT5_MATRIX.md).
        """
        return {
            "shared only": "4.x, and 5.3 or newer (5.0 to 5.2 leave the table uninitialised)",
            "embed_tokens only": "any",
            "both, equal": "any",
            "neither": "none",
            "both, different": "none for certain: 4.x uses shared, 5.x uses embed_tokens, without a word",
        }[self.keys_in_file]

    def loads_right_here(self) -> bool | None:
        """Whether the installed transformers would load it right; None where nothing can be told."""
        major, minor = (
            (int(part) for part in self.transformers.split(".")[:2])
            if self.transformers
            else (0, 0)
        )
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
    """Reads config.json and the headers of the weight files below `folder` (a text encoder's, or a
    pipeline's).

    Raises TextEncoderError where there is no UMT5 text encoder or its files contradict each other.
    """
    folder = Path(folder)
    if (folder / "text_encoder").is_dir():
        folder = folder / "text_encoder"
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TextEncoderError(
            f"{folder}: config.json cannot be read ({error}); give the folder of a Wan pipeline or "
            "of its text encoder"
        ) from error
    tables = {
        key: table for file in weight_files(folder) for key, table in _tables_in(file).items()
    }
    both = [tables[key] for key in (SHARED, EMBED) if key in tables]
    return Inspection(
        folder=folder,
        architecture=(config.get("architectures") or ["?"])[0],
        model_type=config.get("model_type", "?"),
        tie_word_embeddings=config.get("tie_word_embeddings"),
        tables=tables,
        tables_equal=_equal(*both) if len(both) == 2 else None,
        transformers=installed_transformers(),
    )


def _tables_in(file: Path) -> dict[str, StoredTable]:
    if file.suffix == ".bin":
        return {
            key: StoredTable(key, file, None, None, None)
            for key in _names_in_pickle(file) & {SHARED, EMBED}
        }
    header, data = read_header(file)
    return {
        key: StoredTable(
            key,
            file,
            tuple(header[key]["shape"]),
            header[key]["dtype"],
            data + header[key]["data_offsets"][0],
        )
        for key in (SHARED, EMBED)
        if key in header
    }


def _names_in_pickle(file: Path) -> set[str]:
    """Every text in a .bin file's pickle, read without executing any of it."""
    import pickletools
    import zipfile

    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            return {
                argument
                for _, argument, _ in pickletools.genops(archive.read(name))
                if isinstance(argument, str)
            }
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


def check_class(found: Inspection, loaded: str) -> None:
    """Raises TextEncoderError unless this is a UMT5 encoder, loaded as one: T5 loads it without
    error, and wrong.
    """
    if found.model_type != "umt5" or loaded != "UMT5EncoderModel":
        raise TextEncoderError(
            f"{found.folder}: a {found.model_type} checkpoint loaded as {loaded}; Wan's text "
            "encoder is UMT5, whose "
            "every layer has its own position bias: load it with UMT5EncoderModel"
        )
    if not found.tables:
        raise TextEncoderError(
            f"{found.folder}: holds neither {SHARED} nor {EMBED}; download the text encoder again"
        )


def refuse_pickle(found: Inspection) -> None:
    """Raises TextEncoderError where the weights are pickles."""
    if any(file.suffix == ".bin" for file in weight_files(found.folder)):
        raise TextEncoderError(
            f"{found.folder}: holds only .bin weights and unpickling can run code; convert them to "
            "safetensors, or pass --allow_pickle if you trust them"
        )


def locate(
    source: str | Path, subfolder: str = "text_encoder", revision=None, cache_dir=None
) -> Path:
    """The local folder of a text encoder; from the hub only its own files are fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return (
            Path(
                snapshot_download(
                    str(source),
                    revision=revision,
                    cache_dir=cache_dir,
                    allow_patterns=[f"{subfolder}/*"],
                )
            )
            / subfolder
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TextEncoderError(
            f"{source}: neither a folder here nor reachable on the hub ({reason}); "
            "check the spelling and the network"
        ) from error
