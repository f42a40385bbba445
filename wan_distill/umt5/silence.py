"""Hides the load report that only the tied table is missing; every other message is shown."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from wan_distill.umt5.inspect import EMBED

LOADERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
ANSI_COLOUR = r"\x1b\[[0-9;]*m"
TABLE_ROW = r"^(.+?)\s*\|\s*([A-Z]+)\b"  # key, status; transformers 5 writes a table
SENTENCE = (  # transformers 4 writes a sentence
    r"(?s)Some weights of \w*T5EncoderModel were not initialized "
    rf".*newly initialized: \['{re.escape(EMBED)}'\]"
)


def is_tied_weight_report(message: str) -> bool:
    """Whether `message` reports the tied table, and no other tensor, as missing from the file of a
    UMT5 or T5 encoder.
    """
    text = re.sub(ANSI_COLOUR, "", message)
    if "T5EncoderModel LOAD REPORT" in text:
        return re.findall(TABLE_ROW, text, re.MULTILINE) == [(EMBED, "MISSING")]
    return re.match(SENTENCE, text) is not None


class _ReportFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not is_tied_weight_report(record.getMessage())


@contextmanager
def silence_tied_weight_report(verbose: bool = False) -> Iterator[None]:
    """Hides, inside the block, the report that only the tied table is missing.

    transformers writes it through `logging`, which a `warnings` filter does not reach, so both are
    filtered. `verbose` hides nothing. All filters are removed at the end, also after an error.
    """
    if verbose:
        yield
        return
    report_filter = _ReportFilter()
    loggers = [logging.getLogger(name) for name in LOADERS]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=SENTENCE)
        for logger in loggers:
            logger.addFilter(report_filter)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(report_filter)
