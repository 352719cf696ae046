"""Masks of photographs under box prompts: the truth they are judged by, and the command from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import deixis
from deixis_bench.coco_boxes import fill, main

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"
HEIGHT, WIDTH = 90, 120


def polygon(random: np.random.Generator, x: float, y: float) -> list[float]:
    """A blunt polygon of seven corners around (x, y), flat, px (of sharp tips COCO keeps no pixel)."""
    angles = np.sort((np.arange(7) + random.uniform(0, 0.7, 7)) * 2 * np.pi / 7)
    radii = random.uniform(18, 25, 7)
    corners = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], -1)
    return [float(v) for v in np.clip(corners, 0, [WIDTH, HEIGHT]).ravel()]


@pytest.mark.parametrize("seed", range(8))
def test_fill_agrees_with_cocos_up_to_the_outline(seed: int) -> None:
    random = np.random.default_rng(seed)
    polygons: Any = [polygon(random, 28, 40), polygon(random, 90, 50)][: 1 + seed % 2]
    mask = fill(polygons, HEIGHT, WIDTH)
    assert mask.dtype == bool and mask.shape == (HEIGHT, WIDTH)
    wanted = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, HEIGHT, WIDTH))).astype(bool)
    # The outline counts as inside, and COCO ends half a pixel earlier: up to two pixels more, and at most one less.
    grown = cv2.dilate(wanted.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    shrunk = cv2.erode(wanted.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    assert (mask <= grown).all() and (mask >= shrunk).all()
    assert 500 < wanted.sum() <= mask.sum() < 1.15 * wanted.sum()


def test_fill_of_nothing() -> None:
    assert not fill([], 4, 5).any()


def test_the_command_runs_a_bundle_over_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), random.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8))
    cv2.imwrite(str(tmp_path / "images" / "b.png"), random.integers(0, 255, (WIDTH, HEIGHT, 3), np.uint8))
    outlines = [[polygon(random, 28, 40)], [polygon(random, 90, 50), polygon(random, 28, 40)]]
    instances = {
        "images": [{"id": 4, "file_name": "a.png"}, {"id": 5, "file_name": "b.png"}],
        "annotations": [{"image_id": 4, "segmentation": outline} for outline in outlines],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances), encoding="utf-8")
    report = tmp_path / "report.json"
    arguments = ["coco_boxes", str(TINY), "--data", str(tmp_path), "--threads", "1", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    values = json.loads(report.read_text(encoding="utf-8"))
    assert values["data"] == {"pictures": 2, "objects": 2}

    # The same by hand: one box around all parts of an object.
    ious = []
    with deixis.load(TINY, device="cpu", threads=1) as model:
        scene = model.encode(tmp_path / "images" / "a.png")
        for outline in outlines:
            corners = np.concatenate(outline).reshape(-1, 2)
            found = scene.segment(box=(*corners.min(0), *corners.max(0))).mask.array
            wanted = fill(outline, HEIGHT, WIDTH)
            ious.append((found & wanted).sum() / (found | wanted).sum())
    assert values["metrics"]["mean IoU"] == pytest.approx(np.mean(ious), abs=1e-3)
    assert values["metrics"]["median IoU"] == pytest.approx(np.median(ious), abs=1e-3)
