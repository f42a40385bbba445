"""Files that survive a kill, and that others may read where the umask lets them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wan_distill.errors import UsageError
from wan_distill.system import files
from wan_distill.system.files import (
    DamagedFile,
    hash_tensors,
    lock_file,
    make_output_folder,
    open_to_umask,
    read_hashed,
    sha256,
    write_atomically,
    write_hashed,
    write_tensors,
)
from wan_distill.system.tensor_stream import write_stream
from wan_distill.training import checkpoint

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no umask and no folder handles")


def write_bytes(file: Path) -> None:
    write_atomically(file, b"new")


def write_one_tensor(file: Path) -> None:
    write_tensors(file, {"a": torch.ones(2)})


def write_a_stream(file: Path) -> None:
    write_stream(file, {"a": (torch.float32, (2,))}, [("a", torch.ones(2))])


WRITERS = pytest.mark.parametrize("write", [write_bytes, write_one_tensor, write_a_stream])


@WRITERS
def test_what_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, write):
    """The next attempt needs the room."""
    (tmp_path / "file").write_bytes(b"old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", fails)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


# ----------------------------------------------------------------------------------------- hashes


def test_every_altered_byte_of_a_hashed_file_is_noticed(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3.0).bfloat16(),
        "b": torch.tensor(1.5, dtype=torch.float64),
        "c": torch.zeros(2, 0),
    }
    file = tmp_path / "x.safetensors"
    write_hashed(file, tensors, {"about": "it"})
    back = read_hashed(file)
    assert set(back) == set(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    data = file.read_bytes()
    padding = data.rindex(b"}") + 1  # spaces behind the header
    for i in range(len(data)):
        if i >= padding and data[i] == 0x20:
            continue
        file.write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(DamagedFile, match=r"x\.safetensors: missing or damaged"):
            read_hashed(file)
    file.write_bytes(data)
    read_hashed(file)


def test_other_names_types_shapes_and_values_have_other_hashes() -> None:
    ones = torch.ones(2, 2)
    contents = [
        {"a": ones},
        {"b": ones},
        {"a": ones.reshape(4)},
        {"a": ones.double()},
        {"a": 2 * ones},
        {"a": ones, "b": ones},
        {"a": ones.T.contiguous() * torch.tensor([[1.0, 2.0], [3.0, 4.0]])},
    ]
    assert len({hash_tensors(content) for content in contents}) == len(contents)
    turned = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    assert hash_tensors({"a": turned}) == hash_tensors({"a": turned.contiguous()})


# ------------------------------------------------------------------------------------------ locks


def test_one_run_at_a_time_writes_into_a_folder(tmp_path: Path) -> None:
    file = tmp_path / ".lock"
    with lock_file(file, True):
        with (
            pytest.raises(UsageError, match="another run is writing into it"),
            lock_file(file, True),
        ):
            raise AssertionError
        with lock_file(file, False):  # another process of the same run
            pass
        with lock_file(tmp_path / "other", True):
            pass
    with lock_file(file, True):
        pass


# ------------------------------------------------------------------------------------ permissions


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def mode(file: Path) -> int:
    return file.stat().st_mode & 0o777


@posix
@WRITERS
@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_decides_who_may_read_a_file(
    tmp_path: Path, write: Callable[[Path], None], mask: int, expected: int
) -> None:
    with umask(mask):
        write(tmp_path / "file")
    assert mode(tmp_path / "file") == expected
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


@posix
def test_files_that_diffusers_wrote_get_the_same_permissions(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    for name in ("one.safetensors", "two.safetensors"):
        save_file({"a": torch.ones(2)}, tmp_path / "transformer" / name)
    script = tmp_path / "script"
    script.touch(0o700)
    with umask(0o022):
        open_to_umask(tmp_path)
    assert [mode(f) for f in sorted(tmp_path.glob("*/*"))] == [0o644, 0o644]
    assert mode(script) == 0o700


# ------------------------------------------------------------------------------------- durability


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """What reaches the disk, in order: ("fsync", file or folder), ("rename", new name)."""
    recorded: list[tuple[str, Path]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        real_fsync(handle)
        recorded.append(("fsync", Path(os.readlink(f"/proc/self/fd/{handle}"))))

    def replace(source: Path, target: Path) -> None:
        real_replace(source, target)
        recorded.append(("rename", Path(target)))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return recorded


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="finds the name of an open file in /proc"
)


@needs_proc
@WRITERS
def test_content_is_on_the_disk_before_the_name_appears(
    tmp_path: Path, events: list[tuple[str, Path]], write: Callable[[Path], None]
) -> None:
    file = tmp_path / "file"
    write(file)
    (what, temporary), rename = events
    assert (what, rename) == ("fsync", ("rename", file))
    assert temporary != file and temporary.parent == tmp_path and not temporary.exists()


@needs_proc
def test_a_checkpoint_reaches_the_disk_in_order(
    tmp_path: Path, events: list[tuple[str, Path]]
) -> None:
    """Each file and then the list of files before the folder gets its name; then that name."""
    checkpoint.save(tmp_path, 3, {"student": {"a": torch.ones(2)}}, {"config": {}}, keep=None)
    final = tmp_path / "checkpoint-3"
    renamed = events.index(("rename", final))
    partial = {path.parent for what, path in events[:renamed] if what == "rename"}
    assert partial == {tmp_path / ".partial-3"}
    (folder,) = partial
    written = {path.name for what, path in events[:renamed] if what == "rename"}
    assert written == {f.name for f in final.iterdir()} == {"student.safetensors", "state.json"}
    assert events[renamed - 1] == ("fsync", folder)
    assert events[renamed + 1] == ("fsync", tmp_path)
    for place, (what, _) in enumerate(events[: renamed - 1]):
        if what == "rename":
            assert events[place - 1][0] == "fsync"


@WRITERS
def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(file)
    assert file.read_bytes() == b"old"


def test_the_systems_reason_survives_safetensors(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        write_one_tensor(tmp_path / "absent" / "file")
    assert raised.value.errno == 2 and raised.value.filename == str(tmp_path / "absent" / "file")


# ----------------------------------------------------------------------------------------- content


def test_any_tensor_is_written_as_it_is(tmp_path: Path) -> None:
    """Also views and tensors with gradients."""
    weight = torch.nn.Parameter(torch.arange(6.0).view(2, 3))
    write_tensors(tmp_path / "file", {"turned": weight.T}, {"who": "me"})
    assert torch.equal(load_file(tmp_path / "file")["turned"], weight.detach().T)


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    make_output_folder(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot be written.*choose another"):
        make_output_folder(tmp_path / "file")
