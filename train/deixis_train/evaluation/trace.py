"""Traces against traces: point L1, and Local Bipartite Matching (section 15; MITR: Meng et al., CVPR 2021)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linprog

from deixis_train.evaluation.errors import EvaluationError

Floats = NDArray[np.float64]

CHUNK = 20  # boxes of the shorter trace that are matched together
FULL = 1 - 1e-6  # a truth of this area or more means "nowhere in particular" and does not count


def point_l1(predicted: ArrayLike, truth: ArrayLike, counts: ArrayLike) -> float | None:
    """Mean distance of one picture's predicted points to the nearer true point of the same token or word.

    Args:
        predicted: [..., L, P, 2] as fractions of width and height; all texts of the picture together.
        truth: [..., L, Q, 2], likewise.
        counts: [..., L] bool, tokens or words that count; those whose truth is all 0 never do.

    Returns:
        The mean over points and words of the mean of |dx| and |dy|, or None when nothing counts.
    """
    points, wanted = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    valid = np.asarray(counts, bool) & (wanted > 0).any(axis=(-2, -1))
    if not valid.any():
        return None
    distances = np.abs(points[valid][:, :, None] - wanted[valid][:, None]).mean(-1)
    return float(distances.min(-1).mean())


def lbm(predicted: ArrayLike, truth: ArrayLike, k: int) -> float | None:
    """Local Bipartite Matching of two traces; 0 is perfect.

    Args:
        predicted: [N, 4] boxes XYXY as fractions of the picture, in the order of the words.
        truth: [M, 4], likewise. Boxes that cover the whole picture are left out.
        k: half the width of the window, in boxes of the shorter trace, that a box may be matched in; 0 keeps the order.

    Returns:
        The mean over chunks of the mean coordinate error of matched boxes, or None when either trace is empty.
    """
    scores = lbm_chunks(predicted, truth, k)
    return float(np.mean(scores)) if scores else None


def lbm_chunks(predicted: ArrayLike, truth: ArrayLike, k: int) -> list[float]:
    """The score of every chunk of up to 20 boxes of the shorter trace, see `lbm`."""
    a, b = np.asarray(predicted, np.float64).reshape(-1, 4), np.asarray(truth, np.float64).reshape(-1, 4)
    b = b[(b[:, 2:] - b[:, :2]).prod(-1) < FULL]
    if len(a) > len(b):
        a, b = b, a
    if not len(a):
        return []
    return [
        _match(
            a[start : start + CHUNK],
            b[start * len(b) // len(a) : math.ceil((start + CHUNK) * len(b) / len(a))],
            k,
        )
        for start in range(0, len(a), CHUNK)
    ]


def _match(a: Floats, b: Floats, k: int) -> float:
    """Least mean cost of giving every box of a [p, 4] partners of b [m, 4], p <= m, each used at most once."""
    p, m = len(a), len(b)
    cost = np.abs(a[:, None] - b[None]).mean(-1)
    row, column = np.mgrid[:p, :m]
    # (i - k) m / p <= j < (i + 1 + k) m / p, in whole numbers
    allowed = ((row - k) * m <= column * p) & (column * p < (row + 1 + k) * m)
    rows, columns = row[allowed], column[allowed]
    pairs = np.arange(len(rows))
    every_row = np.zeros((p, len(rows)))
    every_row[rows, pairs] = 1
    every_column = np.zeros((m, len(rows)))
    every_column[columns, pairs] = 1
    found = linprog(cost[allowed], A_eq=every_row, b_eq=np.ones(p), A_ub=every_column, b_ub=np.ones(m), bounds=(0, 1))
    if found.status == 0:
        return float(found.fun / p)
    if found.status != 2:
        raise EvaluationError(f"LBM of {p} and {m} boxes: the linear programme failed: {found.message}")
    return float(np.trace(cost) / p)  # infeasible, as a slot may hold no whole column: matched in order, as MITR does
