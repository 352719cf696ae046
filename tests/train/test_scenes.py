"""Table scenes: the same seed gives the same data, texts are true and single out one object, boxes fit their masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deixis_train.data.scenes.generate import describe, generate, main, make_scene, tight_box, write_shard
from deixis_train.data.scenes.objects import COLORS, KINDS, SIZES, mesh
from deixis_train.data.scenes.world import build_world

COUNT, SEED = 12, 4_000_000


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    assert generate(out, SEED, COUNT, size=256, workers=1, shard=5, captions=5) == COUNT
    return out


@pytest.fixture(scope="module")
def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(data.glob("scenes-*.jsonl")) for line in path.read_text().splitlines()]


def matches(noun: list[str], item: dict[str, Any]) -> bool:
    """Whether every word of a noun phrase is true of an object of a line."""
    known = {*KINDS, *COLORS, *SIZES, "object"}
    assert noun and set(noun) <= known, noun
    return all(word == "object" or word in (item["kind"], item["color"], item["size"]) for word in noun)


def referred(text: str, items: list[dict[str, Any]]) -> set[int]:
    """The objects that an expression fits, read from its words and the line alone, without any margin."""
    x = [(o["box"][0] + o["box"][2]) / 2 for o in items]
    y = [o["foot"][1] for o in items]
    words = text.split()
    assert words.pop(0) == "the"
    body = " ".join(words)
    for relation, true in (
        (" left of the ", lambda a, b: x[a] < x[b]),
        (" right of the ", lambda a, b: x[a] > x[b]),
        (" in front of the ", lambda a, b: y[a] > y[b]),
        (" behind the ", lambda a, b: y[a] < y[b]),
    ):
        if relation in body:
            head, tail = (part.split() for part in body.split(relation))
            anchors = [i for i, o in enumerate(items) if matches(tail, o)]
            assert len(anchors) == 1, text
            return {i for i, o in enumerate(items) if i != anchors[0] and matches(head, o) and true(i, anchors[0])}
    places = (("on the far left", x, 1), ("on the far right", x, -1), ("at the front", y, -1), ("at the back", y, 1))
    places = (*places, ("leftmost", x, 1), ("rightmost", x, -1))
    for place, values, sign in places:
        if place in body:
            fits = [i for i, o in enumerate(items) if matches(body.replace(place, " ").split(), o)]
            best = min(sign * values[i] for i in fits)
            return {i for i in fits if sign * values[i] == best}
    if body.endswith(" in the middle"):
        fits = [i for i, o in enumerate(items) if matches(body.removesuffix(" in the middle").split(), o)]
        assert len(fits) == 3, text
        return {sorted(fits, key=lambda i: x[i])[1]}
    return {i for i, o in enumerate(items) if matches(words, o)}


def test_every_expression_fits_its_object_alone() -> None:
    kinds_of_text = set()
    for seed in range(SEED, SEED + 40):
        line = describe(make_scene(seed, 256), 0)
        assert line["expressions"]
        for entry in line["expressions"]:
            assert referred(entry["text"], line["objects"]) == {entry["object"]}, (seed, entry)
            kinds_of_text |= {
                w
                for w in ("left", "right", "front", "back", "middle", "behind", "leftmost")
                if w in entry["text"].split()
            }
    assert kinds_of_text == {"left", "right", "front", "back", "middle", "behind", "leftmost"}


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


def test_words_have_boxes_and_phrases_point_at_their_objects(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert len(line["captions"]) == 5
        for caption in line["captions"]:
            words, boxes = caption["words"], caption["boxes"]
            assert len(words) == len(boxes) and words[-1] == "."
            assert all(w == w.lower() and w and " " not in w for w in words)
            for x0, y0, x1, y1 in boxes:
                assert 0 <= x0 < x1 <= line["width"] and 0 <= y0 < y1 <= line["height"]
            named = [(words[i - 1], w, tuple(boxes[i])) for i, w in enumerate(words) if w in KINDS]
            assert sorted(named) == sorted((o["color"], o["kind"], tuple(o["box"])) for o in line["objects"])
            centers = [box[0] + box[2] for _, _, box in named]
            assert centers == sorted(centers)
            for word, box in zip(words, boxes, strict=True):
                assert word != "table" or box == line["table"]


def test_region_captions_name_their_object(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        assert [r["object"] for r in line["regions"]] == list(range(len(line["objects"])))
        for entry in line["regions"]:
            item = line["objects"][entry["object"]]
            assert entry["text"] == f"a {item['size']} {item['color']} {item['kind']}"


def test_pictures_have_the_size_of_their_line(data: Path, lines: list[dict[str, Any]]) -> None:
    for line in lines:
        picture = cv2.imread(str(data / line["file"]))
        assert picture.shape == (line["height"], line["width"], 3)
        assert max(picture.shape) == 256
        assert picture.std() > 5


def test_same_seed_same_bytes(data: Path, tmp_path: Path) -> None:
    generate(tmp_path, SEED, COUNT, size=256, workers=2, shard=5, captions=5)
    names = sorted(str(p.relative_to(data)) for p in data.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert all((data / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)


def test_resumes_where_it_stopped(data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    write_shard((1, range(5, 10)), tmp_path, SEED, 256, 5)
    (tmp_path / ".scenes-0000.jsonl.1.part").write_text("left by a run that was killed")
    assert generate(tmp_path, SEED, COUNT, size=256, workers=1, shard=5, captions=5) == COUNT - 5
    assert generate(tmp_path, SEED, COUNT, size=256, workers=1, shard=5, captions=5) == 0
    for path in data.glob("scenes-*.jsonl"):
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


@pytest.mark.parametrize("change", [{"seed": SEED + 1}, {"size": 320}, {"shard": 4}, {"captions": 1}])
def test_refuses_a_directory_of_another_data_set(data: Path, change: dict[str, int]) -> None:
    options = {"seed": SEED, "count": COUNT, "size": 256, "workers": 1, "shard": 5, "captions": 5} | change
    with pytest.raises(ValueError, match="another directory"):
        generate(data, **options)


@pytest.mark.parametrize("change", [{"count": 0}, {"captions": 6}, {"size": 64}, {"workers": 0}])
def test_refuses_nonsense(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        generate(tmp_path, **({"seed": 1, "count": 1} | change))


def test_neighbouring_data_sets_share_their_common_seed(tmp_path: Path) -> None:
    """Scene i of seed s is scene 0 of seed s + i: only disjoint ranges of seeds are disjoint data sets."""
    a, b = describe(make_scene(SEED + 3, 256), 0), describe(make_scene(SEED + 3, 256), 3)
    assert a["objects"] == b["objects"] and a["captions"] == b["captions"] and a["expressions"] == b["expressions"]
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


@pytest.mark.parametrize("kind", KINDS)
def test_meshes_are_closed_and_face_outwards(kind: str) -> None:
    """The divergence theorem: outward faces of a closed surface span a positive volume, below that of its box."""
    shape = mesh(kind)
    p = shape.vertices[shape.quads]
    halves = np.concatenate([p[:, [0, 1, 2]], p[:, [0, 2, 3]]])
    volume = np.einsum("ij,ij->i", halves[:, 0], np.cross(halves[:, 1], halves[:, 2])).sum() / 6
    extent = np.ptp(shape.vertices, axis=0)
    assert 0 < volume < extent.prod() * 1.2
    assert abs(shape.vertices[:, 2].min()) < 0.012
