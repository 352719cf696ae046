"""Percentiles of times, the same wherever they are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """p50, p90, p99, mean and spread of times, in milliseconds, and how many there are.

    Percentiles are interpolated linearly between neighbours (numpy's default), so with few times p99 lies close to the
    longest. Raises ValueError without times.
    """
    if not len(seconds):
        raise ValueError("no times were taken")
    values = np.asarray(seconds, np.float64) * 1000
    found = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    return {
        **found,
        "mean": float(values.mean()),
        "least": float(values.min()),
        "most": float(values.max()),
        "count": len(values),
    }
