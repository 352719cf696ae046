"""Referring segmentation judged as GLaMM's evaluation does it (GLaMM specification, section 11.2).

PixelLLM's evaluator (`masks.mask_metrics`) stabilises the same two figures in another way, and has nothing for
empty masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

SUM_EPSILON = 1e-10
MASK_EPSILON = 1e-5


def referring_metrics(intersections: Sequence[int] | ArrayLike, unions: Sequence[int] | ArrayLike) -> dict[str, float]:
    """cIoU (all intersections over all unions) and gIoU (mean over masks) in px of N pairs of masks.

    A mask that should be empty and is has IoU 1. Raises ValueError for none.
    """
    inter, union = np.asarray(intersections, np.float64), np.asarray(unions, np.float64)
    if not inter.size:
        raise ValueError("no masks, so no cIoU")
    ratios = inter / (union + MASK_EPSILON) + (union == 0)
    return {
        "cIoU": float(inter.sum() / (union.sum() + SUM_EPSILON)),
        "gIoU": float(ratios.sum() / (len(ratios) + MASK_EPSILON)),
    }
