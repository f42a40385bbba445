"""What is wrong with a file that cannot be read, and a remedy that helps."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from wan_distill.errors import FileError
from wan_distill.settings.reading import check_pickle, read_header, read_json

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:aaaa\nsize 145776\n"
PAGE = b"<!DOCTYPE html><html>401</html>"


@pytest.mark.parametrize(
    ("content", "reason", "remedy"),
    [
        (b"", "is empty", "download it again"),
        (b"{", "cannot be read", "correct it, or download it again"),
        (b'{"a": "\xff"}', "cannot be read", "correct it, or download it again"),
        (b"[1]", "is not a JSON object", "download it again"),
        (b"[" * 99999, "nested too deeply", "correct it, or download it again"),
        (b"\xef\xbb\xbf{}", "begins with a byte-order mark", "save it as UTF-8 without BOM"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text", "save it as UTF-8"),
        (POINTER, "is a pointer of Git LFS", "run `git lfs pull`"),
        (PAGE, "is a web page", "download it again, after `hf auth login`"),
    ],
)
def test_json_that_cannot_be_read(content, reason, remedy, tmp_path):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_json(file)
    assert reason in error.value.reason and error.value.reason.startswith(f"{file}: ")
    assert error.value.remedy == remedy
    assert str(error.value) == f"{error.value.reason}; {remedy}"


@pytest.mark.parametrize(
    ("content", "reason", "remedy"),
    [
        (b"", "truncated or not safetensors (0 bytes)", "download it again"),
        (b"12345678", "truncated or not safetensors", "download it again"),
        (b"\x03\0\0\0\0\0\0\0{{{", "its header is damaged", "download it again"),
        (b"\0\0\1\0\0\0\0\0" + b"[" * 65536, "its header is damaged", "download it again"),
        (POINTER, "is a pointer of Git LFS", "run `git lfs pull`"),
        (PAGE, "is a web page", "download it again, after `hf auth login`"),
        (b"GGUF\x03\0\0\0more", "is a GGUF file", "diffusers' layout"),
        (b"PK\x03\x04more and more", "is a pickle of torch", "convert it to safetensors"),
    ],
)
def test_weights_that_cannot_be_read(content, reason, remedy, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_header(file)
    assert reason in error.value.reason and remedy in error.value.remedy


def test_pickles_are_known_by_their_first_bytes(tmp_path):
    file = tmp_path / "model.bin"
    torch.save({"a": torch.zeros(1)}, file)
    check_pickle(file)
    torch.save({"a": torch.zeros(1)}, file, _use_new_zipfile_serialization=False)
    check_pickle(file)
    for content, reason in ((POINTER, "Git LFS"), (PAGE, "web page"), (b"", "not a torch")):
        file.write_bytes(content)
        with pytest.raises(FileError, match=reason):
            check_pickle(file)


@pytest.mark.parametrize("read", [read_json, read_header, check_pickle])
def test_a_disk_that_does_not_give_a_file_is_not_told_to_download(read, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"{}")

    def fail(self: Path, *_, **__) -> None:
        raise OSError(5, os.strerror(5), str(self))

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(FileError, match="Input/output error") as error:
        read(file)
    assert error.value.remedy == "check the disk"

    def forbid(self: Path, *_, **__) -> None:
        raise PermissionError(13, os.strerror(13), str(self))

    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(FileError, match="Permission denied") as error:
        read(file)
    assert error.value.remedy == "give this user permission to read it"


def test_what_is_not_there_is_missing_or_a_link_to_nothing(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileError, match="is missing"):
        read_json(file)
    file.symlink_to(tmp_path / "nothing")
    with pytest.raises(FileError, match="is a link to nothing"):
        read_json(file)
