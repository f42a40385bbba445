"""What ends a run early, and its exit code. Each message is one line: value, reason, remedy."""

from __future__ import annotations

RESUMABLE = 75  # run the same command again to go on (sysexits.h: EX_TEMPFAIL)
INTERRUPTED = 130  # Ctrl-C where there is nothing to go on from (128 + SIGINT, as shells do)


class UsageError(Exception):
    """Bad input. Ends the program with exit code 2."""


class FileError(ValueError):
    """A file that cannot be used.

    Attributes:
        reason: which file, and why.
        remedy: what helps.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class TextEncoderError(FileError):
    """A text encoder or tokenizer that must not be trained on."""


class Stopped(Exception):
    """A signal asked for an end, and everything worth keeping is on disk. Ends the program with
    exit code RESUMABLE.
    """


class Halted(Exception):
    """The run cannot go on, though nothing was mistyped. Ends the program with exit code 1."""


class NonFiniteError(Halted):
    """A loss, gradient, weight or latent is NaN or infinite; raised before anything is spoilt by
    it.
    """


class ExportError(Halted):
    """A file that was written does not give back the student."""


def one_line(error: BaseException) -> str:
    """The message of `error` without line breaks."""
    return " ".join(str(error).split())
