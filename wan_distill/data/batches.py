"""The files of one batch of samples, which are written all or none."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from torch import Tensor

from wan_distill.data.samples import SampleStore
from wan_distill.system.files import DamagedFile, read_hashed, write_hashed

Named = dict[str, Tensor]


def store_batch(store: SampleStore, rows: list[int], contents: dict[Path, Named]) -> None:
    """Writes the files of one batch: all of them or, after a kill, none: see `finish_batches`."""
    store.create()
    batch = store.batch_file(rows[0])
    if len(rows) > 1:
        write_hashed(
            batch,
            {f"{f.name}/{name}": x for f, named in contents.items() for name, x in named.items()},
        )
    for file, tensors in contents.items():
        write_hashed(file, tensors)
    for row in rows:
        if store.file(row) in contents:
            store.handed_over(row).unlink(missing_ok=True)
    batch.unlink(missing_ok=True)


def finish_batches(store: SampleStore) -> None:
    """Writes what a kill left of the files of a batch.

    Then every batch is whole or absent, and the missing samples are solved in the batches that they
    would have been solved in: sums round differently in batches of other sizes.
    """
    for batch in sorted(store.folder.glob(".batch-*.unsplit")):
        contents: dict[Path, Named] = {}
        with suppress(DamagedFile):  # or another process has just finished it
            for name, tensor in read_hashed(batch).items():
                file, _, part = name.partition("/")
                contents.setdefault(store.folder / file, {})[part] = tensor
        for path, tensors in contents.items():
            write_hashed(path, tensors)
        batch.unlink(missing_ok=True)
    for row in store.handed_over_rows():
        if store.file(row).exists():
            store.handed_over(row).unlink(missing_ok=True)
