"""The fake bundle with a detector: places, boxes and scores that depend on the picture, and can be told by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from fakes import SIZE, FakeEngine, make_manifest, make_model

from deixis import Model
from deixis.bundle import DetectionSpec, Graph, Manifest

PLACES = 12
SPEC = DetectionSpec(candidates=8, proposals=6, max_detections=5)


class DenseEngine(FakeEngine):
    """Finds about four objects in every picture."""

    def box_proposals(self, features: np.ndarray) -> dict[str, np.ndarray]:
        boxes, heatmaps = [], []
        for picture in features:
            random = np.random.default_rng(int(picture.sum() * 8) % 1000)
            low = random.uniform(-4, SIZE * 0.4, (PLACES, 2))
            boxes.append(np.concatenate([low, low + random.uniform(6, SIZE * 0.6, (PLACES, 2))], axis=1))
            heatmaps.append(random.normal(size=PLACES))
        level = features.mean(axis=(1, 2))[:, :1, None, None].astype(np.float32)
        return {
            "p3": np.tile(level, (1, 2, 4, 4)),
            "heatmap": np.array(heatmaps, np.float32),
            "boxes": np.array(boxes, np.float32),
        }

    def box_refine(self, p3: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
        assert p3.shape[1:] == (2, 4, 4)
        judged = np.stack([np.zeros(boxes.shape[:2]), 3 * np.sin(boxes.sum(axis=2))], axis=2)
        return {"logits": judged.astype(np.float32), "deltas": np.cos(boxes).astype(np.float32)}


def make_dense_manifest(spec: DetectionSpec = SPEC) -> Manifest:
    plain = make_manifest()
    like = plain.graphs["prompt_extractor"]
    graphs: dict[str, Graph] = {**plain.graphs, "box_proposals": like, "box_refine": like}
    tasks = {**plain.tasks, "dense_captions": plain.tasks["region_caption"]}
    return dataclasses.replace(plain, graphs=graphs, tasks=tasks, detection=spec)


def make_dense_model(folder: Path, spec: DetectionSpec = SPEC, end_bias: float = -3.0) -> tuple[Model, DenseEngine]:
    model, engine = make_model(folder, make_dense_manifest(spec), DenseEngine(end_bias))
    assert isinstance(engine, DenseEngine)
    return model, engine
