"""Mean IoU of a bundle's masks when the true boxes of photographs are the prompts.

`python -m deixis_bench.coco_boxes BUNDLE --data DIR` wants DIR/instances.json (COCO format, polygons) and DIR/images.
The box is the polygon's bounds, the mask is `scene.segment`'s, the truth is the filled polygon, outline included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

import deixis
from deixis_bench.report import finish


def fill(polygons: list[list[float]], height: int, width: int) -> np.ndarray:
    """Polygons [x0, y0, x1, y1, ...] px as bool [H, W]."""
    mask = np.zeros((height, width), np.uint8)
    for polygon in polygons:  # one by one: together, overlapping ones would cut holes into each other
        cv2.fillPoly(mask, [np.round(np.reshape(polygon, (-1, 2))).astype(np.int32)], (1,))
    return mask.astype(bool)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deixis_bench.coco_boxes", description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    instances = json.loads((options.data / "instances.json").read_text(encoding="utf-8"))
    if not instances["annotations"]:
        parser.error(f"{options.data / 'instances.json'} has no annotations; nothing to measure")
    ious: list[float] = []
    with deixis.load(options.bundle, threads=options.threads) as model:
        for picture in instances["images"]:
            things = [thing for thing in instances["annotations"] if thing["image_id"] == picture["id"]]
            scene = model.encode(options.data / "images" / picture["file_name"])
            height, width = scene.size
            prompts = []
            for thing in things:
                corners = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in thing["segmentation"]])
                prompts.append((scene, deixis.Prompt(box=[*corners.min(0), *corners.max(0)])))
            for thing, segment in zip(things, model.segment_batch(prompts) if prompts else [], strict=True):
                truth = fill(thing["segmentation"], height, width)
                mask = segment.mask.array
                ious.append(float((mask & truth).sum() / (mask | truth).sum()))
        data = {"pictures": len(instances["images"]), "objects": len(ious)}
        metrics = {"mean IoU": float(np.mean(ious)), "median IoU": float(np.median(ious))}
        finish(metrics, data, model, options.json)


if __name__ == "__main__":
    main()
