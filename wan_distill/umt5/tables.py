"""The two token tables as they lie in weight files, read without torch."""

from __future__ import annotations

import pickletools
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path

from wan_distill.errors import TextEncoderError
from wan_distill.settings.reading import AGAIN, check_pickle, read_header
from wan_distill.settings.weight_names import explain_codes

SHARED = "shared.weight"
EMBED = "encoder.embed_tokens.weight"
ALL_ROWS_BELOW = 64 << 20  # bytes: tables up to this size are compared whole
SAMPLED_ROWS = 4096  # of a larger table: 32 MB of UMT5-XXL's 2.1 GB


@dataclass(frozen=True)
class TablePlace:
    """Where the values of a table of shape [V, D] lie in a safetensors file."""

    shape: tuple[int, int]
    dtype: str  # as safetensors names it, for example BF16
    offset: int  # bytes from the start of the file to the first value
    size: int  # bytes of the whole table

    @property
    def item_size(self) -> int:
        """Bytes per value."""
        return self.size // (self.shape[0] * self.shape[1])


@dataclass(frozen=True)
class StoredTable:
    """A token table in a file. `place` is None in a pickle, where only the names are read."""

    key: str
    file: Path
    place: TablePlace | None


def tables_in(file: Path) -> dict[str, StoredTable]:
    """The token tables that one weight file holds, by name. Raises TextEncoderError where it is
    damaged.
    """
    if file.suffix == ".bin":
        names = _names_in_pickle(file)
        return {key: StoredTable(key, file, None) for key in (SHARED, EMBED) if key in names}
    header, data = read_header(file)
    stored = {name: entry for name, entry in header.items() if name != "__metadata__"}
    if shown := explain_codes({}, stored):
        raise TextEncoderError(f"{file}: {shown[0]}", shown[1])
    tables = {}
    for key in (SHARED, EMBED):
        if key not in header:
            continue
        shape = tuple(header[key]["shape"])
        begin, end = header[key]["data_offsets"]
        if len(shape) != 2 or 0 in shape:
            raise TextEncoderError(
                f"{file}: {key} has shape {shape}, which no token table has", AGAIN
            )
        place = TablePlace(shape, header[key]["dtype"], data + begin, end - begin)
        tables[key] = StoredTable(key, file, place)
    return tables


def _names_in_pickle(file: Path) -> set[str]:
    """Every text in a .bin file's pickle, read without executing any of it."""
    check_pickle(file)
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            operations = pickletools.genops(archive.read(name))
            return {argument for _, argument, _ in operations if isinstance(argument, str)}
    except (zipfile.BadZipFile, StopIteration) as error:
        raise TextEncoderError(
            f"{file}: a pickle in the format of torch before 1.6, whose tensors are not listed",
            "convert it to safetensors",
        ) from error


def rows_to_compare(shape: tuple[int, ...], item_size: int) -> list[int]:
    """Indices of the rows of a table [V, D] that are compared, in ascending order.

    All rows of a small table; a seeded random sample of a large one, with its first and last row.
    `item_size` is in bytes per value.
    """
    count = shape[0]
    if count <= SAMPLED_ROWS or count * shape[1] * item_size <= ALL_ROWS_BELOW:
        return list(range(count))
    return sorted({0, count - 1, *random.Random(0).sample(range(count), SAMPLED_ROWS)})


def equal_tables(a: StoredTable, b: StoredTable) -> bool | None:
    """Whether two stored tables have equal rows; None for pickles."""
    if a.place is None or b.place is None:
        return None
    if (a.place.shape, a.place.dtype) != (b.place.shape, b.place.dtype):
        return False
    rows = rows_to_compare(a.place.shape, a.place.item_size)
    return _raw_rows(a.file, a.place, rows) == _raw_rows(b.file, b.place, rows)


def _raw_rows(file: Path, place: TablePlace, indices: list[int]) -> list[bytes]:
    """The bytes of the given rows, read from the file one by one."""
    row_size = place.shape[1] * place.item_size
    rows = []
    with file.open("rb") as data:
        for index in indices:
            data.seek(place.offset + index * row_size)
            rows.append(data.read(row_size))
    return rows
