"""What could not be read is told apart from what could not be written."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import train_distillation
from wan_distill.system.disk_errors import describe_disk_error

ROOM = "once there is room and permission"


def failure(code: int, *file: str) -> OSError:
    return OSError(code, os.strerror(code), *file)


def test_the_output_is_written(tmp_path):
    out = tmp_path / "out"
    said = describe_disk_error(failure(errno.EACCES, str(out / "a")), str(out))
    assert (
        said.startswith(f"{out / 'a'}: Permission denied; what was complete is kept")
        and ROOM in said
    )


def test_the_output_is_known_by_another_path_too(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    monkeypatch.chdir(tmp_path)
    error = failure(errno.EACCES, str(tmp_path / "disk" / "a"))
    assert ROOM in describe_disk_error(error, "out")
    assert ROOM in describe_disk_error(failure(errno.EACCES, "out/a"), str(tmp_path / "disk"))


@pytest.mark.parametrize("code", [errno.EISDIR, errno.ENOTDIR, errno.EEXIST])
def test_what_lies_in_the_way_is_to_be_moved(code, tmp_path):
    out, file = str(tmp_path / "out"), str(tmp_path / "out" / "high")
    said = describe_disk_error(failure(code, file), out)
    assert said == f"{file}: {os.strerror(code)}; move it away, and run the same command again"
    renamed = OSError(code, os.strerror(code), f"{out}/.partial", None, file)
    assert describe_disk_error(renamed, out) == said


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ENOENT, errno.EISDIR])
def test_everything_else_is_read(code, tmp_path):
    file = str(tmp_path / "teacher" / "a")
    said = describe_disk_error(failure(code, file), str(tmp_path / "out"))
    assert said.startswith(f"{file}: cannot be read ({os.strerror(code)})") and ROOM not in said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_disk_without_room_is_written_to_wherever_it_is(code, tmp_path):
    for file in ([str(tmp_path / "cache")], []):
        said = describe_disk_error(failure(code, *file), "out")
        assert ROOM in said and os.strerror(code) in said


def test_errors_without_a_file():
    assert "Input/output error; see whether the disks" in describe_disk_error(
        failure(errno.EIO), "out"
    )
    library = OSError("no file\nhere")
    assert describe_disk_error(library, "out") == "no file here"
    numbered = OSError(errno.EBADF, "Bad file descriptor", 7)
    assert "7: cannot be read" in describe_disk_error(numbered, "out")


@pytest.mark.parametrize(("inside", "says"), [(True, ROOM), (False, "cannot be read")])
def test_the_training_script_tells_them_apart(inside, says, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def fail(config) -> int:
        raise failure(errno.EACCES, str((out if inside else tmp_path) / "file"))

    monkeypatch.setattr(train_distillation, "run", fail)
    assert train_distillation.main([f"--output_dir={out}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}") and says in said and said.count("\n") == 1
    with pytest.raises(OSError):
        train_distillation.main([f"--output_dir={out}", "--debug"])


def test_the_default_output_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def fail(config) -> int:
        raise failure(errno.EACCES, str(Path("outputs", "x", "file")))

    monkeypatch.setattr(train_distillation, "run", fail)
    assert train_distillation.main([]) == 1
    assert ROOM in capsys.readouterr().err
