"""Notices of other packages: kept while they are imported, shown where something failed."""

from __future__ import annotations

import logging
import sys

import pytest

from wan_distill.errors import Halted, UsageError
from wan_distill.system.notices import keep_notices, print_kept


def notice() -> logging.Logger:
    """What packages do while they are imported; their logger holds on to stderr."""
    logger = logging.getLogger("some.package")
    logger.handlers = [logging.StreamHandler()]
    logger.propagate = False
    logger.warning("Failed to load a library")
    print("W some notice", file=sys.stderr)
    return logger


def test_notices_are_kept_and_later_messages_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with keep_notices():
        logger = notice()
    assert capsys.readouterr().err == ""
    logger.warning("a message of the run")
    assert capsys.readouterr().err == "a message of the run\n"
    print_kept(RuntimeError())
    said = capsys.readouterr().err
    assert "While packages were imported they said:\nFailed to load a library\nW some" in said
    print_kept(RuntimeError())
    assert capsys.readouterr().err == ""  # once is enough


def test_who_asks_for_them_sees_them(capsys: pytest.CaptureFixture[str]) -> None:
    with keep_notices(shown=True):
        notice()
    assert "Failed to load a library" in capsys.readouterr().err


def test_stderr_is_there_again_after_an_import_that_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sys.stderr
    with pytest.raises(ImportError), keep_notices():
        notice()
        raise ImportError
    assert sys.stderr is before
    print_kept(ImportError())
    assert "Failed to load a library" in capsys.readouterr().err


def refusal(cause: Exception | None) -> UsageError:
    """An error in one line, raised because of `cause`."""
    try:
        raise UsageError("--compile: does not work here") from cause
    except UsageError as error:
        return error


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (refusal(None), False),
        (refusal(ValueError()), False),
        (refusal(ImportError()), True),
        (Halted(), False),
        (OSError(), False),
        (KeyError(), True),
    ],
)
def test_only_errors_that_they_may_explain_show_them(
    error: Exception, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with keep_notices():
        notice()
    print_kept(error)
    assert ("Failed to load a library" in capsys.readouterr().err) == shown
    print_kept(KeyError())  # what was not shown is still there
    assert ("Failed to load a library" in capsys.readouterr().err) != shown
