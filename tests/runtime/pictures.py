"""Pictures for the runtime's tests."""

from __future__ import annotations

import numpy as np


def make_picture(height: int, width: int, seed: int) -> np.ndarray:
    """RGB uint8 [height, width, 3] of random colour blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 5 // width
    return np.ascontiguousarray(blocks[rows[:, None], columns[None]])
