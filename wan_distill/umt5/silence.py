"""Hides the report that only the tied table is missing; every other message is shown."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from wan_distill.umt5.inspect import EMBED

_REPORT_LOGGERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_quiet_threads: dict[int, int] = {}
_lock = threading.Lock()


def is_tied_weight_report(message: str) -> bool:
    """Whether `message` reports the tied table, and nothing else, as missing from a UMT5 or T5
    encoder's file.
    """
    text = _ANSI.sub("", message)
    if re.search(r"\w*T5EncoderModel LOAD REPORT", text):
        rows = re.findall(r"^\s*(\S+)\s*\|\s*(MISSING|UNEXPECTED|MISMATCH|CONVERSION)", text, re.M)
        return [(name, status) for name, status in rows] == [(EMBED, "MISSING")]
    newly = re.search(
        r"T5EncoderModel were not initialized .*newly initialized: \[(.*?)\]", text, re.S
    )
    return newly is not None and newly.group(1).strip("'\" ") == EMBED


class _ReportFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not (
            threading.get_ident() in _quiet_threads and is_tied_weight_report(record.getMessage())
        )


_filter = _ReportFilter()


def _show_unless_report(message, category, filename, lineno, file=None, line=None) -> None:
    if not (threading.get_ident() in _quiet_threads and is_tied_weight_report(str(message))):
        _show_before(message, category, filename, lineno, file, line)


_show_before = warnings.showwarning


@contextmanager
def silence_tied_weight_report(verbose: bool = False) -> Iterator[None]:
    """Inside, on this thread, the report that only the tied table is missing is not shown; anything
    else is.

    transformers 5 writes it through `logging`, so a `warnings` filter alone misses it: both paths
    are covered. `verbose` shows everything. What was changed is put back, also after an error.
    """
    global _show_before
    if verbose:
        yield
        return
    thread = threading.get_ident()
    with _lock:
        if not _quiet_threads:
            _show_before, warnings.showwarning = warnings.showwarning, _show_unless_report
            for name in _REPORT_LOGGERS:
                logging.getLogger(name).addFilter(_filter)
        _quiet_threads[thread] = _quiet_threads.get(thread, 0) + 1
    try:
        yield
    finally:
        with _lock:
            _quiet_threads[thread] -= 1
            if not _quiet_threads[thread]:
                del _quiet_threads[thread]
            if not _quiet_threads:
                warnings.showwarning = _show_before
                for name in _REPORT_LOGGERS:
                    logging.getLogger(name).removeFilter(_filter)
