"""Small data folders in the published layouts, for the tests of readers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 40, 30


def write_picture(path: Path, width: int = WIDTH, height: int = HEIGHT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    assert cv2.imwrite(str(path), rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return path


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, values: list[Any]) -> Path:
    """One JSON value per line; a text is written as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """COCO JSON; every picture gets a size, and annotations their ids."""
    return {
        "images": [{"width": WIDTH, "height": HEIGHT, **image} for image in images],
        "annotations": [{"id": number, **annotation} for number, annotation in enumerate(annotations)],
        **more,
    }


def narration(image_id: str = "7", **changes: Any) -> dict[str, Any]:
    return {
        "dataset_id": "mscoco_val2017",
        "image_id": image_id,
        "annotator_id": 3,
        "caption": "A mug and a plate.",
        "timed_caption": [
            {"utterance": "A mug", "start_time": 0.0, "end_time": 1.0},
            {"utterance": "and a plate.", "start_time": 1.0, "end_time": 2.0},
        ],
        "traces": [
            [{"x": 0.1, "y": 0.2, "t": 0.0}, {"x": 0.3, "y": 0.4, "t": 1.0}],
            [{"x": 0.7, "y": 0.8, "t": 2.0}],
        ],
        **changes,
    }
