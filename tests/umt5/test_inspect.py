"""What the files say is read without torch, and without reading the weights."""

from __future__ import annotations

import itertools
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from safetensors.torch import save_file
from umt5_layouts import EMBED, LAYOUTS, SHARED, true_weights, write_layout

from wan_distill.errors import FileError, TextEncoderError, UsageError
from wan_distill.umt5.inspect import inspect_text_encoder, locate
from wan_distill.umt5.tables import rows_to_compare

REAL_SHAPE = (256384, 4096)  # UMT5-XXL's table, in bfloat16


def write_sparse_encoder(folder: Path, keys: tuple[str, ...]) -> int:
    """Writes a text encoder with tables of the real size, all zeros, as a sparse file. Returns how
    many bytes lie before its data.
    """
    size = REAL_SHAPE[0] * REAL_SHAPE[1] * 2
    header = {
        key: {"dtype": "BF16", "shape": REAL_SHAPE, "data_offsets": [i * size, (i + 1) * size]}
        for i, key in enumerate(keys)
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + len(keys) * size)
    (folder / "config.json").write_text(json.dumps({"model_type": "umt5"}))
    return 8 + len(text)


@pytest.fixture
def bytes_read(monkeypatch) -> list[int]:
    """How many bytes each `read` of a file opened by `Path.open` in binary mode returned."""
    counts: list[int] = []
    original: Callable[..., Any] = Path.open

    def open_and_count(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(path, mode, *args, **kwargs)
        if mode != "rb":
            return file

        class Counting:
            def __enter__(self) -> Counting:
                return self

            def __exit__(self, *error: Any) -> None:
                file.close()

            def read(self, size: int) -> bytes:
                content = file.read(size)
                counts.append(len(content))
                return content

            def seek(self, position: int) -> None:
                file.seek(position)

        return Counting()

    monkeypatch.setattr(Path, "open", open_and_count)
    return counts


def test_only_the_header_of_the_real_encoder_is_read(tmp_path, bytes_read):
    header_size = write_sparse_encoder(tmp_path, (SHARED,))
    assert inspect_text_encoder(tmp_path).keys_in_file == "shared only"
    assert sum(bytes_read) == header_size


def test_of_two_tables_of_the_real_size_a_sample_is_read(tmp_path, bytes_read):
    header_size = write_sparse_encoder(tmp_path, (SHARED, EMBED))
    assert inspect_text_encoder(tmp_path).keys_in_file == "both, equal"
    rows = rows_to_compare(REAL_SHAPE, 2)
    assert sum(bytes_read) == header_size + 2 * len(rows) * REAL_SHAPE[1] * 2
    assert sum(bytes_read) < 70e6


def test_sampled_rows_are_spread_over_the_whole_table():
    rows = rows_to_compare(REAL_SHAPE, 2)
    assert rows == sorted(set(rows)) and 4096 <= len(rows) <= 4098
    assert rows[0] == 0 and rows[-1] == REAL_SHAPE[0] - 1
    tenths = {10 * row // REAL_SHAPE[0] for row in rows}
    assert tenths == set(range(10))
    largest_gap = max(b - a for a, b in itertools.pairwise(rows))
    assert largest_gap < 20 * REAL_SHAPE[0] / len(rows)


def test_every_row_of_a_small_table_is_compared():
    assert rows_to_compare((5000, 16), 4) == list(range(5000))
    assert rows_to_compare((4096, 10**6), 4) == list(range(4096))


def test_a_row_outside_the_first_ones_decides_whether_two_tables_are_equal(tmp_path):
    folder = write_layout("both equal", tmp_path / "encoder")
    weights = true_weights()
    weights[EMBED] = weights[SHARED].clone()
    weights[EMBED][-1, -1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert inspect_text_encoder(folder).keys_in_file == "both, different"


def test_inspection_needs_neither_torch_nor_transformers(tmp_path):
    folders = [str(write_layout(name, tmp_path / name.replace(" ", "_"))) for name in LAYOUTS]
    code = (
        "import sys, json\nfrom wan_distill.umt5.inspect import inspect_text_encoder\n"
        f"print(json.dumps([inspect_text_encoder(f).keys_in_file for f in {folders!r}]))\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert dict(zip(LAYOUTS, json.loads(result.stdout), strict=True)) == {
        "shared only": "shared only",
        "embed only": "embed_tokens only",
        "both equal": "both, equal",
        "poisoned embed": "both, different",
        "poisoned shared": "both, different",
        "both healthy but different": "both, different",
        "neither": "neither",
        "sharded": "shared only",
        ".bin": "shared only",
        ".bin both": "both, not compared",
    }


def test_a_damaged_file_is_refused(tmp_path):
    folder = write_layout("shared only", tmp_path / "encoder")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(FileError, match="truncated"):
        inspect_text_encoder(folder)


def test_a_table_of_one_dimension_is_refused(tmp_path):
    folder = write_layout("shared only", tmp_path / "encoder")
    save_file({SHARED: torch.zeros(8)}, folder / "model.safetensors")
    with pytest.raises(TextEncoderError, match="which no token table has"):
        inspect_text_encoder(folder)


def test_a_file_in_place_of_a_folder_is_said_to_be_one(tmp_path):
    file = write_layout("shared only", tmp_path / "encoder") / "model.safetensors"
    with pytest.raises(UsageError, match="is one file; give the folder"):
        locate(file)
