"""A file that was written tensor by tensor is the file that safetensors would have written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from wan_distill.system.tensor_stream import write_stream

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(5.0).to(torch.bfloat16),
    "c": torch.tensor(2.5),
    "d": torch.ones(3, 3).to(torch.float8_e4m3fn),
    "e": torch.empty(0, dtype=torch.float8_e4m3fn),
}
LAYOUT = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def test_tensors_in_any_order_and_dtype_come_back(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_stream(file, LAYOUT, reversed(TENSORS.items()), {"format": "pt"})
    again = load_file(file)
    assert again.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == tensor.shape
        assert torch.equal(again[name].float(), tensor.float())
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": torch.zeros(3, 2)}, "a: torch.float32 .* was not announced"),
        ({"z": torch.zeros(1)}, "z: .* was not announced"),
        ({"a": TENSORS["a"]}, "b: was announced and never came"),
    ],
)
def test_what_was_not_announced_leaves_no_file(tmp_path: Path, tensors: dict, said: str) -> None:
    file = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=said):
        write_stream(file, LAYOUT, tensors.items())
    assert not file.exists()
