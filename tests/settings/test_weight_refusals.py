"""Weight files that are refused, and what the message says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from weight_layouts import SETTINGS, empty_part, save, write

from wan_distill.errors import FileError
from wan_distill.settings.reading import read_header
from wan_distill.settings.weight_files import weight_files


@pytest.fixture(params=list(SETTINGS))
def stem(request) -> str:
    """The stem of the file names of one library."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path, stem: str) -> Path:
    """A folder with that library's config.json and no weights."""
    return empty_part(tmp_path / "part", stem)


@pytest.mark.parametrize("kinds", [("single", "shards"), ("bin", "bin shards")])
def test_two_complete_checkpoints_are_refused_by_name(folder, stem, kinds):
    for kind in kinds:
        write(kind, folder, stem, 1.0)
    single, index = sorted(file.name for file in folder.glob("*model.*"))[:2]
    with pytest.raises(FileError, match="two checkpoints") as refusal:
        weight_files(folder)
    assert single in str(refusal.value) and index in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        '{"metadata": {}}',
        "[]",
        "{",
        '{"metadata": {}, "weight_map": []}',
        '{"weight_map": {"a": "part.safetensors"}}',  # without metadata, which loaders read
    ],
)
def test_an_index_that_is_none_is_refused(folder, stem, content):
    index = folder / f"{stem}.safetensors.index.json"
    index.write_text(content)
    save({"a": 1.0}, folder / "part.safetensors")
    with pytest.raises(FileError, match="download it again") as refusal:
        weight_files(folder)
    assert index.name in str(refusal.value)


def test_an_index_cannot_name_files_outside_its_folder(folder, stem):
    save({"a": 1.0}, folder.parent / "other.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../other.safetensors"}}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match="outside its folder"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("kinds", "variant", "says"),
    [
        ((), None, "no weight file .* download it again"),
        (("single fp16",), None, "loads with --variant fp16"),
        (("shards fp16",), "ema", "loads with --variant fp16"),
        (("shards fp16", "bin"), "ema", "loads without --variant or with --variant fp16"),
        (("single",), "fp16", "loads without --variant"),
        (("shards",), "fp16", "loads without --variant"),
    ],
)
def test_a_refusal_says_what_to_do(folder, stem, kinds, variant, says):
    for kind in kinds:
        write(kind, folder, stem, 1.0)
    with pytest.raises(FileError, match=says):
        weight_files(folder, variant)


def test_a_single_file_of_another_name_is_refused_with_the_right_name(folder, stem):
    save({"a": 1.0}, folder / "wan_fp8.safetensors")
    says = f"only wan_fp8.safetensors; rename it to {stem}.safetensors"
    with pytest.raises(FileError, match=says):
        weight_files(folder)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_shard_without_an_index_is_not_to_be_renamed(folder, stem, variant):
    middle = f".{variant}" if variant else ""
    save({"a": 1.0}, folder / f"{stem}{middle}-00001-of-00002.safetensors")
    with pytest.raises(FileError, match=r"no .*index.*json here, only .*download it again"):
        weight_files(folder, variant)


def test_a_link_to_nothing_is_said_to_be_one(folder, stem):
    os.symlink(folder / "gone", folder / f"{stem}.safetensors")
    with pytest.raises(FileError, match=f"{stem}.safetensors is a link to nothing"):
        weight_files(folder)


@pytest.mark.parametrize("header", [b"[]", b'{"a": 1}', b'{"a": {}}', b"\xff\xff", b'{"a"'])
def test_a_damaged_header_is_refused(tmp_path, header):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(FileError, match="header is damaged"):
        read_header(file)


def test_a_stale_index_beside_a_single_file_is_to_be_removed(tmp_path):
    """diffusers reads the index and never the single file; transformers does the opposite."""
    folder = empty_part(tmp_path / "part", "diffusion_pytorch_model")
    write("single", folder, "diffusion_pytorch_model", 1.0)
    write("shards", folder, "diffusion_pytorch_model", 2.0)
    shard = folder / "diffusion_pytorch_model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(FileError, match=r"with an index it is not read; remove diffusion.*index"):
        weight_files(folder)
    shard.symlink_to("nothing")
    with pytest.raises(FileError, match="but a link to nothing; "):
        weight_files(folder)


def test_a_suffix_in_capitals_is_to_be_renamed(tmp_path):
    folder = empty_part(tmp_path / "part", "model")
    (folder / "MODEL.SAFETENSORS").touch()
    with pytest.raises(FileError, match=r"only MODEL.SAFETENSORS; rename it to model.safetensors"):
        weight_files(folder)
