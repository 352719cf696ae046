"""Dense captioning from files: detections with captions against region descriptions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deixis_bench.eval.data import Picture
from deixis_train.evaluation.captions import meteor_scores
from deixis_train.evaluation.dense_captions import Detections, Truth, dense_caption_map, detection_shares
from deixis_train.evaluation.errors import EvaluationError

TASK = "regions"  # whose rows are the truth


def read_detections(path: Path) -> dict[str, Detections]:
    """A JSON list of {"image_id", "bbox": [x, y, width, height] px, "score", "caption"}, by picture.

    `image_id` is the picture's file name without its ending; leading zeros do not matter. Raises EvaluationError.
    """
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"{path}: cannot read the detections: {error.strerror}") from None
    except ValueError as error:
        raise EvaluationError(f"{path}: not JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise EvaluationError(f"{path}: not a list of detections, or an empty one")
    groups: dict[str, list[tuple[list[float], float, str]]] = {}
    for number, record in enumerate(records):
        try:
            x, y, w, h = (float(v) for v in record["bbox"])
            score, caption, key = float(record["score"]), record["caption"], _key(str(record["image_id"]))
        except (KeyError, TypeError, ValueError):
            raise EvaluationError(f"{path}:[{number}]: needs image_id, bbox of four numbers, score, caption") from None
        if not isinstance(caption, str) or not all(math.isfinite(v) for v in (x, y, w, h, score)):
            raise EvaluationError(f"{path}:[{number}]: the caption is no text, or a number is not finite")
        groups.setdefault(key, []).append(([x, y, x + w, y + h], score, caption))
    return {
        key: Detections(
            np.array([box for box, _, _ in group]),
            np.array([score for _, score, _ in group]),
            tuple(caption for _, _, caption in group),
        )
        for key, group in groups.items()
    }


def dense_metrics(path: Path, pictures: Sequence[Picture], limited: bool) -> tuple[dict[str, float], dict[str, Any]]:
    """mAP of the detections in `path`, and what was counted. Pictures without detections count as missed.

    Raises EvaluationError for detections of pictures that have no annotations, unless the pictures were `limited`.
    """
    detections = read_detections(path)
    nothing = Detections(np.zeros((0, 4)), np.zeros(0), ())
    pairs = []
    for picture in pictures:
        rows = [row for row in picture.rows.get(TASK, ()) if row.box is not None]
        truth = Truth(np.array([row.box for row in rows]).reshape(-1, 4), tuple(row.text for row in rows))
        pairs.append((truth, detections.pop(_key(picture.path.stem), nothing)))
    if detections and not limited:
        raise EvaluationError(f"{path}: detections of picture {next(iter(detections))}, which has no annotations")
    if not any(len(found.scores) for _, found in pairs):
        raise EvaluationError(f"{path}: no detections of the pictures that are measured")
    counted = {
        "regions": sum(len(truth.captions) for truth, _ in pairs),
        "detections": sum(len(found.captions) for _, found in pairs),
    }
    return {**dense_caption_map(pairs, meteor_scores), **detection_shares(pairs)}, counted


def _key(name: str) -> str:
    return name.lstrip("0") or "0"
