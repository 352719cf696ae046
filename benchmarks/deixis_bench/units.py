"""Numbers of reports as people read them: three digits, a unit, a dash for what was not measured."""

from __future__ import annotations

import math

MISSING = "–"


def digits(value: float | None, unit: str = "") -> str:
    """Three significant digits, whole numbers from 100 on with thin groups of three; `unit` behind it."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        text = f"{value:g}"
    else:
        behind = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{min(behind, 6)}f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{text}\N{NO-BREAK SPACE}{unit}" if unit else text


def percent(share: float | None) -> str:
    """A share of 1 as whole percents."""
    if share is None:
        return MISSING
    text = "<1" if 0 < share < 0.005 else f"{100 * share:.0f}"
    return f"{text}\N{NO-BREAK SPACE}%"


def megabytes(size: float | None) -> str:
    """Bytes in MB of 2^20, as the system counts memory."""
    return MISSING if size is None else digits(size / (1 << 20), "MB")


def large(value: float | None, unit: str) -> str:
    """A count with the prefix that fits: 1.53 GFLOP, 96.3 MB, 1.20 k…"""
    if value is None:
        return MISSING
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return digits(value / size, prefix + unit)
    return digits(value, unit)


def times(ratio: float | None) -> str:
    """A ratio: 2.31×."""
    return MISSING if ratio is None else f"{digits(ratio)}×"


def spread(least: float | None, most: float | None) -> str:
    """Least and most over the rounds."""
    return MISSING if least is None or most is None else f"{digits(least)} to {digits(most)}"
