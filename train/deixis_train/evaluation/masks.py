"""Masks against masks: cIoU, gIoU and their relatives (sections 9.4 and 15). Masks are bool [H, W] of the picture."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask

from deixis_train.data.preparation.geometry import decode_mask
from deixis_train.data.samples import Rle

EPSILON = 1e-5


def mask_of_logits(
    logits: NDArray[np.float32], valid: tuple[int, int], padded: int, original: tuple[int, int]
) -> NDArray[np.bool_]:
    """Mask of a referred thing from logits [side, side] over the padded input, bool of the `original` (height, width).

    Section 9.4: cut to int(valid * side / padded) rows and columns, at least one, then one bilinear resize without
    anti-aliasing straight to the original size; True above 0.
    """
    rows, columns = (max(1, int(v * s / padded)) for v, s in zip(valid, logits.shape, strict=True))
    cropped = np.ascontiguousarray(logits[:rows, :columns], np.float32)
    return cv2.resize(cropped, (original[1], original[0]), interpolation=cv2.INTER_LINEAR) > 0


def segment_of_logits(
    logits: NDArray[np.float32], valid: tuple[int, int], padded: int, original: tuple[int, int]
) -> NDArray[np.bool_]:
    """Mask of a box prompt as SAM makes it: logits to the padded size, cut to the picture, then to its own size."""
    whole = cv2.resize(np.ascontiguousarray(logits, np.float32), (padded, padded), interpolation=cv2.INTER_LINEAR)
    cropped = np.ascontiguousarray(whole[: valid[0], : valid[1]])
    return cv2.resize(cropped, (original[1], original[0]), interpolation=cv2.INTER_LINEAR) > 0


def box_of_mask(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Tightest XYXY box around a mask, x1 and y1 exclusive; zeros for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros(4)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def decode(rle: Rle) -> NDArray[np.bool_]:
    """A bool mask [H, W] from COCO's compressed run lengths."""
    return decode_mask(rle).astype(bool)


def encode(mask: NDArray[np.bool_]) -> Rle:
    """COCO's compressed run lengths of a mask, as JSON stores them."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    counts = rle["counts"]
    assert isinstance(counts, bytes)  # text only where it is read from JSON
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode("ascii")}


def overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> tuple[int, int]:
    """Pixels in both masks, and pixels in either. Raises ValueError for masks of different sizes."""
    if predicted.shape != truth.shape:
        raise ValueError(f"a mask of {predicted.shape} px cannot be compared with one of {truth.shape} px")
    return int((predicted & truth).sum()), int((predicted | truth).sum())


def mask_metrics(intersections: Sequence[int] | ArrayLike, unions: Sequence[int] | ArrayLike) -> dict[str, float]:
    """cIoU (all intersections over all unions), gIoU (mean of the ratios), and the share of masks above one half.

    Raises ValueError for none.
    """
    inter, union = np.asarray(intersections, np.float64), np.asarray(unions, np.float64)
    if not inter.size:
        raise ValueError("no masks, so no cIoU")
    ratios = inter / np.maximum(union, 1)
    return {
        "cIoU": float(inter.mean() / (union.mean() + EPSILON)),
        "gIoU": float((inter / (union + EPSILON)).mean()),
        "mask P@0.5": float((ratios > 0.5).mean()),
    }
