"""The irregular part of the detector: places to proposals, proposals to detections (section 10). numpy only.

The graphs predict a box at every place of a feature pyramid (`box_proposals`), and judge and move given boxes
(`box_refine`). Sorting and suppression between and behind them are here. ONNX's NonMaxSuppression is no help: it drops
what is above the threshold, here a box at the threshold goes too.

One picture at a time; everything is float32 and follows the training code operation by operation. Boxes are XYXY px of
the padded network input. Letters in shapes: A places of all levels, P proposals, M `max_detections`, N any number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import DetectionSpec

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_LEAST_UNION = np.float32(1e-8)  # px, so that empty boxes overlap nothing


@dataclass(frozen=True)
class Detections:
    """Slots of one picture, best first.

    boxes: [M, 4], inside the padded input; zeros in an empty slot. scores: [M]; above 0 for objects, -1 for boxes that
    scored too little, 0 for empty slots.
    """

    boxes: Floats
    scores: Floats

    @property
    def count(self) -> int:
        """How many of the first slots are objects."""
        return int((self.scores > 0).sum())


def top_places(boxes: Floats, heatmap: Floats, count: int) -> tuple[Floats, Floats]:
    """The places with the highest scores.

    Args:
        boxes: the box predicted at each place [A, 4].
        heatmap: logits [A].
        count: how many to take; never more than A - 1.

    Returns:
        boxes [k, 4] and scores [k] in 0..1, best first; of equal scores the earlier place first.
    """
    scores = _sigmoid(heatmap)
    order = _descending(scores)[: min(count, len(scores) - 1)]
    return boxes[order], scores[order]


def nms(boxes: Floats, threshold: float, limit: int) -> Indices:
    """Greedy non-maximum suppression of boxes [N, 4] in the order of their scores, best first.

    A box whose IoU with a kept one is at least `threshold` is suppressed, and so is one without a coordinate above 0.

    Returns:
        Indices of the kept boxes, ascending, at most `limit`.
    """
    sizes = _areas(boxes)
    suppressed = boxes.max(axis=1) <= 0
    kept: list[int] = []
    for index in range(len(boxes)):
        if len(kept) == limit:
            break
        if not suppressed[index]:
            kept.append(index)
            rest = slice(index + 1, None)  # those before are decided
            suppressed[rest] |= _ious(boxes[index], sizes[index], boxes[rest], sizes[rest]) >= threshold
    return np.array(kept, np.int64)


def suppress(boxes: Floats, scores: Floats, threshold: float, count: int) -> tuple[Floats, Floats]:
    """What `nms` keeps of candidates [N, 4] with scores [N], best first, padded to `count`.

    Returns:
        boxes [count, 4] and scores [count]. A slot that nothing fills has score 0 and holds the last candidate.
    """
    kept = nms(boxes, threshold, count)
    out_boxes, out_scores = np.repeat(boxes[-1:], count, axis=0), np.zeros(count, np.float32)
    out_boxes[: len(kept)], out_scores[: len(kept)] = boxes[kept], scores[kept]
    return out_boxes, out_scores


def clip_boxes(boxes: Floats, size: int) -> Floats:
    """Boxes [N, 4] inside a square input of `size` px."""
    return boxes.clip(0, np.float32(size))


def propose(boxes: Floats, heatmap: Floats, spec: DetectionSpec, size: int) -> tuple[Floats, Floats]:
    """Proposals of one picture from what the first stage predicts everywhere: boxes [A, 4] and heatmap logits [A].

    Returns:
        boxes [P, 4], clipped to the input of `size` px, and scores [P] in 0..1, 0 for a slot that nothing fills.
    """
    candidates, scores = top_places(boxes, heatmap, spec.candidates)
    kept, scores = suppress(candidates, scores, spec.proposal_iou, spec.proposals)
    return clip_boxes(kept, size), scores


def finish(boxes: Floats, scores: Floats, logits: Floats, deltas: Floats, spec: DetectionSpec, size: int) -> Detections:
    """Detections from proposals [P, 4] with scores [P], and what the second stage says of them.

    Args:
        logits: (background, object) [P, 2].
        deltas: (dx, dy, dw, dh) [P, 4] in the units of `spec.delta_scale`.
        size: side of the padded input, px.
    """
    found = clip_boxes(apply_deltas(boxes, deltas, spec), size)
    joint = np.sqrt(_softmax(logits)[:, 1] * scores)
    joint = np.where(joint > np.float32(spec.score_threshold), joint, np.float32(-1.0))
    order = _descending(joint)
    found, joint = suppress(found[order], joint[order], spec.detection_iou, spec.max_detections)
    found[joint == 0] = 0.0
    return Detections(found, joint)


def apply_deltas(boxes: Floats, deltas: Floats, spec: DetectionSpec) -> Floats:
    """Boxes [N, 4] moved and resized by the second stage's deltas [N, 4]: [N, 4], not clipped."""
    extent: Floats = boxes[:, 2:] - boxes[:, :2]
    units: Floats = np.array(spec.delta_scale, np.float32)
    moves: Floats = deltas / units
    half: Floats = extent * np.float32(0.5)
    shift: Floats = moves[:, :2] * extent
    center: Floats = boxes[:, :2] + half + shift
    reach: Floats = half * np.exp(np.minimum(moves[:, 2:], np.float32(spec.max_log_scale)))
    return np.concatenate([center - reach, center + reach], axis=1)


def join_scores(scores: Floats, log_probs: Floats) -> Floats:
    """Scores of boxes joined with those of their captions: the geometric mean, elementwise.

    Args:
        scores: of the boxes; what is below 0 counts as 0.
        log_probs: of the captions, as the decoder ranks them; of a shape that goes with `scores`.
    """
    joint: Floats = np.maximum(scores, 0) * np.exp(log_probs)
    return np.sqrt(joint)


def rank_beams(scores: Floats, beam_scores: Floats, count: int) -> tuple[Floats, Indices, Indices]:
    """The best pairs of box and beam; a box may come several times, or not at all.

    Args:
        scores: of the boxes [N].
        beam_scores: of the K beams of each box [N, K].
        count: pairs to keep.

    Returns:
        Joint score, index of the box and index of the beam of each pair, best first; [count] at most.
    """
    joint = join_scores(scores[:, None], beam_scores).ravel()
    order = _descending(joint)[:count]
    box, beam = np.divmod(order, beam_scores.shape[1])
    return joint[order], box, beam


def _descending(values: Floats) -> Indices:
    return np.argsort(-values, kind="stable")


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # exp of a very negative logit: the score is 0
        return np.reciprocal(np.exp(-x) + np.float32(1), dtype=np.float32)


def _softmax(logits: Floats) -> Floats:
    powers: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    total: Floats = powers.sum(axis=1, keepdims=True)
    return powers / total


def _areas(boxes: Floats) -> Floats:
    extent = np.maximum(boxes[:, 2:] - boxes[:, :2], 0)
    return extent[:, 0] * extent[:, 1]


def _ious(box: Floats, size: np.float32, others: Floats, sizes: Floats) -> Floats:
    """IoU [N] of a box [4] with others [N, 4], given their areas; 0 where both are empty."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    overlap: Floats = np.maximum(sides[:, 0], 0) * np.maximum(sides[:, 1], 0)
    union: Floats = np.maximum(size + sizes - overlap, _LEAST_UNION)
    return overlap / union
