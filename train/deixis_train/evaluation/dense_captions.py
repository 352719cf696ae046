"""Dense captioning mAP of Visual Genome (section 15; Johnson et al., CVPR 2016): a grid over IoU and METEOR."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis_train.evaluation.boxes import iou_matrix

Floats = NDArray[np.float64]
# METEOR of each caption against its references.
Meteor = Callable[[list[str], list[list[str]]], ArrayLike]

IOU_THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7)
METEOR_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25)
MERGE_ABOVE = 0.7
FOUND_FROM = 0.5
RECALL_LEVELS = np.arange(100) / 100
EMPTY = "empty"  # stands on both sides when the truth has an empty caption, which METEOR cannot judge


@dataclass(frozen=True)
class Truth:
    """What is annotated on one picture: boxes [G, 4] XYXY and as many captions."""

    boxes: Floats
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Detections:
    """What was found on one picture: boxes [D, 4] XYXY, scores [D], and as many captions."""

    boxes: Floats
    scores: Floats
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Matches:
    """Detections of one picture, best score first, with the merged truth each was held against.

    scores, ious [D]; matched [D]: the first of its merged box; captions and references, one entry per detection.
    """

    scores: Floats
    ious: Floats
    matched: NDArray[np.bool_]
    captions: list[str]
    references: list[list[str]]


def merge_truth(truth: Truth) -> tuple[Floats, list[list[str]]]:
    """Boxes that mean the same thing made one: the mean boxes [M, 4], each with all captions of its group.

    The box with the most partners at an IoU of at least 0.7 goes first (the first of equals), with its partners.
    """
    near = iou_matrix(truth.boxes, truth.boxes) >= MERGE_ABOVE
    np.fill_diagonal(near, True)
    left = np.ones(len(truth.boxes), bool)
    boxes, captions = [], []
    while left.any():
        partners = (near & left).sum(1) * left
        group = np.flatnonzero(near[int(partners.argmax())] & left)
        boxes.append(truth.boxes[group].mean(0))
        captions.append([truth.captions[i] for i in group])
        left[group] = False
    return np.array(boxes, np.float64).reshape(-1, 4), captions


def match(detections: Detections, boxes: ArrayLike, captions: Sequence[Sequence[str]]) -> Matches:
    """Hold detections against merged truth: each looks at its best box only, and a box is matched once."""
    order = np.argsort(-detections.scores, kind="stable")
    found = [detections.captions[i] for i in order]
    truth = np.asarray(boxes, np.float64).reshape(-1, 4)
    if not len(truth):
        zeros = np.zeros(len(order))
        return Matches(detections.scores[order], zeros, zeros.astype(bool), found, [[] for _ in order])
    ious = iou_matrix(detections.boxes[order], truth)
    best = ious.argmax(1)
    values = ious[np.arange(len(order)), best]
    used = np.zeros(len(truth), bool)
    matched = np.zeros(len(order), bool)
    references = []
    for index, box in enumerate(best):
        matched[index] = values[index] > 0 and not used[box]
        used[box] |= matched[index]
        texts = list(captions[box])
        if matched[index] and not all(texts):
            found[index], texts = EMPTY, [EMPTY]
        references.append(texts)
    return Matches(detections.scores[order], values, matched, found, references)


def detection_shares(pictures: Sequence[tuple[Truth, Detections]]) -> dict[str, float]:
    """What mAP does not say at a glance, with all detections and any caption: the share of true boxes (merged) that are
    found with an IoU of at least 0.5, the share of detections that find one, and detections per picture.
    """
    counts = np.array([count_found(*picture) for picture in pictures]).reshape(-1, 3)
    truths, detections, found = (int(total) for total in counts.sum(0))
    return {
        "detection recall": found / max(1, truths),
        "detection precision": found / max(1, detections),
        "detections per picture": detections / max(1, len(pictures)),
    }


def count_found(truth: Truth, detections: Detections) -> tuple[int, int, int]:
    """Of one picture: merged true boxes, detections, and boxes found with an IoU of at least 0.5."""
    boxes, captions = merge_truth(truth)
    matches = match(detections, boxes, captions)
    return len(boxes), len(detections.captions), int((matches.matched & (matches.ious >= FOUND_FROM)).sum())


def average_precision(scores: ArrayLike, right: ArrayLike, truths: int) -> float:
    """AP of detections of a whole data set: mean over recalls 0, 0.01 .. 0.99 of the best precision there or beyond.

    scores [D], right [D] bool, truths: how many there were to find. Raises ValueError when there was nothing.
    """
    if truths < 1:
        raise ValueError("nothing annotated, so no average precision")
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    hits = np.cumsum(np.asarray(right, bool)[order])
    if not len(hits):
        return 0.0
    precision, recall = hits / np.arange(1, len(hits) + 1), hits / truths
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALL_LEVELS, side="left")  # recall never falls
    return float(np.where(at < len(best), best[np.minimum(at, len(best) - 1)], 0.0).mean())


def dense_caption_map(pictures: Sequence[tuple[Truth, Detections]], meteor: Meteor | None) -> dict[str, float]:
    """mAP over the grid of IoU and METEOR thresholds, and `mAP_detection`, where captions do not count.

    Without `meteor` only the detection values are computed. Raises ValueError when nothing is annotated.
    """
    merged = [merge_truth(truth) for truth, _ in pictures]
    truths = sum(len(boxes) for boxes, _ in merged)
    matches = [match(found, *truth) for (_, found), truth in zip(pictures, merged, strict=True)]
    scores = np.concatenate([m.scores for m in matches]) if matches else np.zeros(0)
    ious = np.concatenate([m.ious for m in matches]) if matches else np.zeros(0)
    matched = np.concatenate([m.matched for m in matches]) if matches else np.zeros(0, bool)
    values: dict[str, float] = {}
    for iou in IOU_THRESHOLDS:
        right = matched & (ious >= iou)
        values[f"mAP_detection_iou{iou}"] = average_precision(scores, right, truths)
    detection = {"mAP_detection": float(np.mean(list(values.values()))), **values}
    if meteor is None:
        return detection
    captions = [caption for m in matches for caption in m.captions]
    references = [texts for m in matches for texts in m.references]
    told = np.zeros(len(captions))
    near = np.flatnonzero(matched & (ious >= min(IOU_THRESHOLDS)))  # all others are wrong whatever they say
    if len(near):
        told[near] = meteor([captions[i] for i in near], [references[i] for i in near])
    grid = {
        f"mAP_iou{iou}_meteor{least:.2f}": average_precision(scores, matched & (ious >= iou) & (told > least), truths)
        for iou in IOU_THRESHOLDS
        for least in METEOR_THRESHOLDS
    }
    return {"mAP": float(np.mean(list(grid.values()))), **grid, **detection}
