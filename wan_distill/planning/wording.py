"""Numbers with units, as the plan prints them."""

from __future__ import annotations


def count(number: float) -> str:
    return _scaled(number, {1e9: "B", 1e6: "M", 1e3: "K", 1: ""})


def size(number: float) -> str:
    """Bytes, in decimal units."""
    return _scaled(number, {1e9: " GB", 1e6: " MB", 1e3: " KB"})


def operations(number: float) -> str:
    """Floating-point operations."""
    units = {1e18: " EFLOP", 1e15: " PFLOP", 1e12: " TFLOP", 1e9: " GFLOP", 1e6: " MFLOP"}
    return _scaled(number, units)


def duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"


def if_busy(seconds: float, busy: float) -> str:
    """What is added to a duration that was planned on a machine that other work kept busy; nothing
    where none did.

    Args:
        busy: share of the processor that other work took.
    """
    if not busy:
        return ""
    return f", {duration(seconds / (1 - busy))} if other work keeps {busy:.0%} of the processor"


def _scaled(number: float, units: dict[float, str]) -> str:
    unit = next((u for u in units if number >= u), min(units))
    return f"{number / unit:.3g}{units[unit]}"
