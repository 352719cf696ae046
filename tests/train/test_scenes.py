"""Data sets of table scenes: the same seed gives the same data, runs resume, boxes fit their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deixis_train.data.scenes.generate import describe, generate, main, make_scene, tight_box, write_shard
from deixis_train.data.scenes.objects import KINDS
from deixis_train.data.scenes.texts import texts_of
from deixis_train.data.scenes.world import build_world

COUNT, SEED = 12, 4_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    assert generate(out, SEED, COUNT, size=256, workers=1, shard=5) == COUNT
    return out


@pytest.fixture(scope="module")
def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(data.glob("scenes-*.jsonl")) for line in path.read_text().splitlines()]


def test_boxes_are_tight_and_inside(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        taken = np.zeros((line["height"], line["width"]), int)
        assert 3 <= len(line["objects"]) <= 10
        for item in line["objects"]:
            mask = coco_mask.decode(item["rle"]).astype(bool)
            assert mask.shape == taken.shape
            ys, xs = np.nonzero(mask)
            assert item["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            assert 0.35 <= item["visible"] <= 1
            taken += mask
        assert taken.max() == 1


def test_lines_say_what_their_texts_say(lines: list[dict[str, Any]]) -> None:
    """The texts of a line can be made again from its ground truth, without rendering."""
    for line in lines:
        texts = texts_of({name: line[name] for name in ("width", "height", "seed", "table", "objects")})
        (caption,) = line["captions"]
        assert [(w.text, w.box) for w in texts.captions[0]] == [
            (word, tuple(box)) for word, box in zip(caption["words"], caption["boxes"], strict=True)
        ]
        assert [(e["text"], e["object"]) for e in line["expressions"]] == list(texts.expressions)
        assert [(r["text"], r["object"]) for r in line["regions"]] == [(t, k) for k, t in enumerate(texts.regions)]
        for word, box in zip(caption["words"], caption["boxes"], strict=True):
            assert 0 <= box[0] < box[2] <= line["width"] and 0 <= box[1] < box[3] <= line["height"]
            assert word not in KINDS or any(o["kind"] == word and o["box"] == box for o in line["objects"])


def test_pictures_have_the_size_of_their_line(data: Path, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        picture = cv2.imread(str(data / line["file"]))
        assert picture is not None
        assert picture.shape == (line["height"], line["width"], 3)
        assert max(picture.shape) == 256
        assert picture.std() > 5


def test_same_seed_same_bytes(data: Path, tmp_path: Path) -> None:
    generate(tmp_path, SEED, COUNT, size=256, workers=2, shard=5)
    names = sorted(str(p.relative_to(data)) for p in data.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert all((data / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_resumes_where_it_stopped(data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_shard((1, range(5, 10)), tmp_path, SEED, 256)
    (tmp_path / ".scenes-0000.jsonl.1.part").write_text("left by a run that was killed")
    assert generate(tmp_path, SEED, COUNT, size=256, workers=1, shard=5) == COUNT - 5
    assert generate(tmp_path, SEED, COUNT, size=256, workers=1, shard=5) == 0
    for path in data.glob("scenes-*.jsonl"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"size": 320}, {"shard": 4}, {"count": 5}])
def test_refuses_a_directory_of_another_data_set(data: Path, change: dict[str, int]) -> None:
    options = {"seed": SEED, "count": COUNT, "size": 256, "workers": 1, "shard": 5} | change
    with pytest.raises(ValueError, match="another directory"):
        generate(data, **options)


@pytest.mark.parametrize("change", [{"count": 0}, {"size": 64}, {"workers": 0}])
def test_refuses_nonsense(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        generate(tmp_path, **({"seed": 1, "count": 1} | change))


def test_neighbouring_data_sets_share_their_common_seed(tmp_path: Path) -> None:
    """Scene i of seed s is scene 0 of seed s + i: only disjoint ranges of seeds are disjoint data sets."""
    a, b = describe(make_scene(SEED + 3, 256), 0), describe(make_scene(SEED + 3, 256), 3)
    assert {**a, "id": 3, "file": "images/000003.jpg"} == b
    assert describe(make_scene(SEED + 4, 256), 0)["objects"] != a["objects"]
    command = ["--seed", str(SEED + 3), "--count", "1", "--size", "256", "--workers", "1"]
    assert main(["--out", str(tmp_path), *command]) == 0
    assert json.loads((tmp_path / "scenes-0000.jsonl").read_text())["objects"] == json.loads(json.dumps(a["objects"]))


def test_objects_stand_apart_and_project_into_the_picture() -> None:
    for seed in range(20):
        world = build_world(np.random.default_rng(seed), 512)
        for i, a in enumerate(world.objects):
            pixels, depth = world.camera.project(a.vertices())
            assert (depth > 0).all() and (pixels >= 0).all()
            assert (pixels <= (world.camera.width, world.camera.height)).all()
            assert all(np.hypot(*(a.at - b.at)) > a.radius + b.radius for b in world.objects[:i])


def test_camera_ground_and_homography_agree_with_projection() -> None:
    camera = build_world(np.random.default_rng(3), 512).camera
    point = camera.ground(200.0, 150.0)
    assert abs(point[2]) < 1e-12
    np.testing.assert_allclose(camera.project(point)[0], (200.0, 150.0), atol=1e-9)
    pixel = camera.plane_homography(0.0) @ np.array([point[0], point[1], 1.0])
    np.testing.assert_allclose(pixel[:2] / pixel[2], (200.0, 150.0), atol=1e-9)


def test_masks_agree_with_projected_geometry() -> None:
    """An unhidden object's mask has the box of its projected vertices, to a pixel and the width of a drawn edge."""
    checked = 0
    for seed in range(SEED, SEED + 6):
        scene, world = make_scene(seed), build_world(np.random.default_rng([seed, 0, 0]), 512)
        for item, mask, share in zip(scene.items, scene.masks, scene.visible, strict=True):
            for placed in world.objects:
                names = (placed.kind, placed.color, placed.size)
                if share == 1 and names == (item.kind, item.color, item.size):
                    pixels, _ = world.camera.project(placed.vertices())
                    box = np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])
                    np.testing.assert_allclose(tight_box(mask), box, atol=1.5)
                    checked += 1
    assert checked >= 10


def test_one_line_says_what_is_wrong(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--seed", "1", "--count", "1", "--workers", "1"]
    assert main(["--out", str(data), *command]) == 1
    assert main(["--out", str(data / "images" / "000000.jpg"), *command]) == 1
    assert main(["--out", str(data), "--seed", "1", "--count", "0"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [error for error in errors if error.startswith("error: ")] == errors and len(errors) == 3


def test_a_damaged_shard_is_named(data: Path, tmp_path: Path) -> None:
    whole = (data / "scenes-0000.jsonl").read_bytes()
    (tmp_path / "scenes-0000.jsonl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"scenes-0000.jsonl is damaged .* delete it"):
        generate(tmp_path, SEED, COUNT, size=256, workers=1, shard=5)
