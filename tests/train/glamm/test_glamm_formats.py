"""Readers of the data sets that only GLaMM learns from: what a record becomes, and what a bad one costs."""

from __future__ import annotations

import json
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deixis_train.data.formats import open_source
from deixis_train.data.formats.errors import DataError
from deixis_train.data.preparation.geometry import decode_mask
from deixis_train.data.preparation.store import decode, encode
from deixis_train.data.samples import Sample

WIDTH, HEIGHT = 48, 40
CAPTION = "A man and a dog on a bench."


def square(x: int, y: int, side: int) -> list[list[int]]:
    return [[x, y, x + side, y, x + side, y + side, x, y + side]]


def rle(x: int, y: int, side: int) -> dict[str, Any]:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y : y + side, x : x + side] = 1
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.reshape(-1), [0]])))
    edges = [0, *runs.tolist(), WIDTH * HEIGHT]
    return {"size": [HEIGHT, WIDTH], "counts": [b - a for a, b in pairwise(edges)]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("a.jpg", "b.jpg"):
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    return tmp_path


def read(folder: Path, kind: str, value: Any, *, lines: bool = False, **more: Any) -> list[Sample]:
    path = folder / "annotations.json"
    path.write_text("\n".join(map(json.dumps, value)) if lines else json.dumps(value), encoding="utf-8")
    source = open_source(kind, [path], folder / "images", name="set", losses=["text"], **{"max_skipped": 0.5, **more})
    samples = list(source)
    assert [decode(encode(sample)) for sample in samples] == samples
    return samples


def phrases(sample: Sample) -> list[str]:
    return [sample.rows[0].text[p.start : p.end] for p in sample.rows[0].phrases]


def test_grandf_captions_keep_phrases_apart(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    groundings = {
        "a dog": {"token_positives": [10, 15], "rle_masks": [rle(2, 2, 8), rle(8, 2, 8)]},
        "A man": {"token_positives": [0, 5], "rle_masks": [rle(20, 2, 9)]},
        "man": {"token_positives": [2, 5], "rle_masks": [rle(20, 2, 9)]},
    }
    good = {"file_name": "a.jpg", "caption": CAPTION, "groundings": groundings}
    bad = {"file_name": "b.jpg", "caption": CAPTION, "groundings": {"x": {"token_positives": [0, 99], "rle_masks": []}}}
    with caplog.at_level(logging.WARNING):
        [sample] = read(folder, "grandf", [good, bad])
    assert phrases(sample) == ["A man", "a dog"]
    assert len(sample.rows[0].phrases[1].masks) == 2
    assert decode_mask(sample.rows[0].phrases[0].masks[0])[2:11, 20:29].all()
    assert f"{folder}/annotations.json:record 2: [0, 99] is no stretch of words" in caplog.text
    with pytest.raises(DataError, match=r"no usable record|malformed"):
        read(folder, "grandf", [bad])


def test_refcocog_sentences_end_before_the_next(folder: Path) -> None:
    refs = [
        {"sentence": "A man and a", "segmentation": square(2, 2, 10)},
        {"sentence": "a dog on a bench", "segmentation": square(20, 2, 10)},
        {"sentence": "a cat", "segmentation": square(20, 2, 10)},
    ]
    record = {"17": {"img_file_name": "a.jpg", "caption": CAPTION, "refs": refs}}
    [sample] = read(folder, "refcocog_gcg", [record])
    assert sample.rows[0].text == CAPTION.lower()
    assert phrases(sample) == ["a man and", "a dog on a bench"]


def test_flickr_phrases_of_one_stretch_are_one(folder: Path) -> None:
    images = [
        {"id": 1, "file_name": "a.jpg", "caption": CAPTION},
        {"id": 2, "file_name": "b.jpg", "caption": "too short"},
    ]
    annotations = [
        {"image_id": 1, "tokens_positive": [[0, 5]], "bbox": [2, 2, 8, 8], "sam_mask": rle(2, 2, 8)},
        {"image_id": 1, "tokens_positive": [[0, 5]], "bbox": [20, 2, 8, 8], "sam_mask": rle(20, 2, 8)},
        {"image_id": 1, "tokens_positive": [[10, 15], [18, 26]], "bbox": [1, 1, 9, 9], "sam_mask": rle(1, 1, 9)},
        {"image_id": 2, "tokens_positive": [[0, 3]], "bbox": [1, 1, 9, 9], "sam_mask": rle(1, 1, 9)},
    ]
    [sample] = read(folder, "flickr_gcg", {"images": images, "annotations": annotations})
    assert phrases(sample) == ["A man", "a dog"]
    assert [len(p.masks) for p in sample.rows[0].phrases] == [2, 1]
    assert sample.rows[0].phrases[0].box == (2, 2, 10, 10)


@pytest.mark.parametrize(
    ("layout", "classes", "value", "name"),
    [
        ("ade20k", ["wall", "sky"], 2, "sky"),
        ("cocostuff", "unlabeled\n0: person\n1: sky-other\n2: road\n", 2, "road"),
        ("mapillary", {"labels": [{"readable": "Bird"}, {"readable": "Bike Lane"}]}, 1, "bike lane"),
    ],
)
def test_label_maps_name_their_classes(folder: Path, layout: str, classes: Any, value: int, name: str) -> None:
    (folder / "maps").mkdir()
    for stem, size in (("a", (HEIGHT, WIDTH)), ("b", (5, 5))):
        cv2.imwrite(str(folder / "maps" / f"{stem}.png"), np.full(size, value, np.uint8))
    path = folder / "classes"
    path.write_text(classes if isinstance(classes, str) else json.dumps(classes), encoding="utf-8")
    options = {"labels": folder / "maps", "layout": layout}
    source = open_source(
        "label_maps", [path], folder / "images", name="set", losses=["mask"], max_skipped=0.5, **options
    )
    [sample] = list(source)
    assert source.skipped == 1  # a map of another size than its picture
    assert sample.labels is not None and sample.labels.names[value] == name
    if layout == "cocostuff":
        assert sample.labels.names[1] == ""
    assert decode(encode(sample)) == sample
    with pytest.raises(DataError, match="layout 'cityscapes' is unknown"):
        open_source("label_maps", [path], folder, name="set", losses=[], labels=folder / "maps", layout="cityscapes")


def test_parts_belong_to_their_objects(folder: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "bench_(seat):back_rest"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "segmentation": square(2, 2, 9)},
            {"image_id": 1, "category_id": 2, "segmentation": square(2, 2, 9)},
            {"image_id": 1, "category_id": 3, "segmentation": square(2, 2, 9)},
        ],
    }
    [sample] = read(folder, "parts", document)
    assert [(row.text, row.part) for row in sample.rows] == [("bench", "back rest"), ("dog", "")]


def test_grand_records_of_every_level(folder: Path) -> None:
    record = {"attribute": "Assistant: a red mug", "id": 0, "bbox": [2, 2, 10, 10], "segmentation": rle(2, 2, 8)}
    [sample] = read(folder, "grand", [{"image": "a.jpg", "value": [record]}], lines=True, level="referring")
    assert (sample.rows[0].text, sample.rows[0].box) == ("a red mug", (2, 2, 10, 10))
    detail = {"phrase": "a dog", "tokens_positive": [10, 15], "id": 3, "bbox": [2, 2, 10, 10]}
    caption = {"caption": CAPTION, "details": [detail | {"segmentation": rle(2, 2, 8)}]}
    [sample] = read(folder, "grand", [{"image": "a", "value": [caption]}], lines=True, level="captions")
    assert phrases(sample) == ["a dog"]
    thing = {"labels": ["mug", "cup"], "bbox": [2, 2, 10, 10], "segmentation": rle(2, 2, 8)}
    broken = thing | {"bbox": [2, 2, 1, 1]}
    [sample] = read(folder, "grand", [{"image": "a", "value": [thing, broken]}], lines=True, level="objects")
    assert [row.text for row in sample.rows] == ["mug"]


def test_expressions_of_several_things_and_of_none(folder: Path) -> None:
    document = {
        "images": [{"id": 1, "file_name": "a.jpg"}],
        "annotations": [
            {"id": 1, "image_id": 1, "bbox": [2, 2, 8, 8], "segmentation": square(2, 2, 8)},
            {"id": 2, "image_id": 1, "bbox": [20, 2, 8, 8], "segmentation": square(20, 2, 8)},
        ],
        "refs": [
            {"image_id": 1, "ann_id": [1, 2], "sentences": [{"sent": "both"}]},
            {"image_id": 1, "ann_id": [-1], "sentences": [{"sent": "the third one"}]},
            {"image_id": 1, "ann_id": 1, "sentences": [{"sent": "the left one"}]},
        ],
    }
    [sample] = read(folder, "refer", document)
    areas = {row.text: int(decode_mask(row.mask).sum()) for row in sample.rows if row.mask}
    assert areas == {"both": 128, "the third one": 0, "the left one": 64}
