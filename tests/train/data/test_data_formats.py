"""Every published format: a small folder of it is read back, and its malformed records are named and counted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from published import HEIGHT, WIDTH, coco, write_json, write_lines, write_picture

from deixis_train.data.formats import KINDS, json_files, open_source
from deixis_train.data.formats.errors import DataError
from deixis_train.data.preparation.geometry import decode_mask
from deixis_train.data.samples import Row, Sample, Source

SQUARE = [[4, 5, 14, 5, 14, 15, 4, 15]]  # polygon of the box below
BOX = [4, 5, 10, 10]  # xywh


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.jpg", "inner/b.png"):
        write_picture(tmp_path / "images" / name)
    return tmp_path


def opened(folder: Path, kind: str, document: Any, **options: Any) -> Source:
    if not isinstance(document, Path):
        document = write_json(folder / f"{kind}.json", document)
    options = {"losses": {"text"}, "max_skipped": 0.6, **options}
    return open_source(kind, [document], folder / "images", name="mine", **options)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Any]:
    with caplog.at_level(logging.WARNING):
        yield lambda: [record.getMessage() for record in caplog.records]


IMAGES = [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "inner/b.png"}]


def test_coco_captions(folder: Path, messages: Any) -> None:
    annotations = [
        {"image_id": 1, "caption": "A mug. "},
        {"image_id": 2, "caption": "A plate."},
        {"image_id": 1, "caption": "Red mug."},
        {"image_id": 1, "caption": ""},
        {"image_id": 9, "caption": "Nowhere."},
    ]
    source = opened(folder, "coco_captions", coco(IMAGES, annotations))
    mug, plate = source
    assert [row.text for row in mug.rows] == ["A mug.", "Red mug."]
    assert (mug.image, mug.width, mug.height) == (folder / "images" / "a.jpg", WIDTH, HEIGHT)
    assert plate.key == "b.png" and plate.where.endswith("coco_captions.json:images[1]")
    assert source.skipped == 2
    assert "annotations[4]: no picture has the id 9" in messages()[0] and "annotations[3]: 'caption'" in messages()[1]


def test_coco_instances(folder: Path, messages: Any) -> None:
    uncompressed = {"size": [HEIGHT, WIDTH], "counts": [0, 30, WIDTH * HEIGHT - 30]}
    common = {"image_id": 1, "category_id": 5, "bbox": BOX}
    annotations = [
        {**common, "segmentation": SQUARE, "attributes": {"color": "red"}},
        {**common, "segmentation": uncompressed},
        {**common, "iscrowd": 1, "segmentation": uncompressed},
        {**common, "bbox": [4, 5, 0, 10]},
        {**common, "bbox": [4, 5, math.nan, 10]},
        {**common, "bbox": [35, 5, 20, 10]},
        {**common, "bbox": [-1, 5, 11, 10]},
        {**common, "category_id": 6},
        {**common, "segmentation": {"size": [9, 9], "counts": [81]}},
        {**common, "segmentation": [[1, 2, 3, 4]]},
    ]
    document = coco(IMAGES, annotations, categories=[{"id": 5, "name": "mug"}])
    source = opened(folder, "coco_instances", document, max_skipped=0.9)
    [sample] = source
    polygon, runs, hanging = sample.instances
    assert polygon.category == "mug" and polygon.box == (4, 5, 14, 15) and polygon.attributes == {"color": "red"}
    assert polygon.mask is not None and runs.mask is not None
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[5:15, 4:14] = 1
    np.testing.assert_array_equal(decode_mask(polygon.mask), expected)
    assert decode_mask(runs.mask)[:, 0].all() and decode_mask(runs.mask).sum() == 30
    assert hanging.box == (0, 5, 10, 15)
    reasons = ["no area", "not four finite", "outside the picture", "no category", "mask of size", "polygon"]
    assert source.skipped == len(reasons)
    assert all(reason in message for reason, message in zip(reasons, messages(), strict=True))


def test_instances_join_other_sources_by_file_name(folder: Path) -> None:
    annotations = [{"image_id": 2, "category_id": 5, "bbox": BOX}]
    images = [{"id": 2, "file_name": "elsewhere/b.png"}]
    instances = write_json(folder / "i.json", coco(images, annotations, categories=[{"id": 5, "name": "mug"}]))
    captions = coco(IMAGES, [{"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "two"}])
    first, second = opened(folder, "coco_captions", captions, instances=instances)
    assert first.instances == () and [i.category for i in second.instances] == ["mug"]
    captions = coco(IMAGES[:1], [{"image_id": 1, "caption": "one"}])
    with pytest.raises(DataError, match=r"i\.json has none of its pictures"):
        list(opened(folder, "coco_captions", captions, instances=instances))


RED = Row("the red mug", box=(4.0, 5.0, 14.0, 15.0))
BLUE = Row("the blue mug", box=(20.0, 5.0, 30.0, 15.0))


def mdetr() -> dict[str, Any]:
    images = [
        {"id": 10, "file_name": "a.jpg", "caption": "the red mug", "original_id": 1, "dataset_name": "refcoco"},
        {"id": 11, "file_name": "inner/b.png", "caption": "plate", "original_id": 2, "dataset_name": "refcoco"},
        {"id": 12, "file_name": "a.jpg", "caption": "the blue mug", "original_id": 1, "dataset_name": "refcoco"},
    ]
    boxes = [(10, BOX), (11, BOX), (12, [20, 5, 10, 10])]
    annotations = [
        {"image_id": i, "bbox": box, "area": 100, "iscrowd": 0, "tokens_positive": [[0, 3]]} for i, box in boxes
    ]
    return coco(images, annotations)


def sentences(field: str, value: list[list[Any]]) -> dict[str, Any]:
    boxes = [(1, BOX), (1, [20, 5, 10, 10]), (2, BOX)]
    annotations = [{"image_id": i, "bbox": box, field: v} for (i, box), v in zip(boxes, value, strict=True)]
    return coco(IMAGES, annotations)


def original_refs() -> dict[str, Any]:
    annotations = [{"id": 7, "image_id": 1, "bbox": BOX}, {"id": 8, "image_id": 1, "bbox": [20, 5, 10, 10]}]
    annotations += [{"id": 9, "image_id": 2, "bbox": BOX}, {"id": 6, "image_id": 1, "bbox": BOX}]
    refs = [
        {"ref_id": n, "ann_id": ann, "split": split, "sentences": [{"sent": text}]}
        for n, (ann, split, text) in enumerate(
            [(7, "val", "the red mug"), (8, "val", "the blue mug"), (9, "val", "plate"), (9, "testA", "unseen")]
        )
    ]
    refs[3]["ann_id"] = 6
    return coco(IMAGES, annotations, refs=refs)


@pytest.mark.parametrize(
    ("document", "options"),
    [
        (mdetr(), {}),
        (sentences("sentences", [[{"sent": "the red mug"}], [{"raw": "the blue mug"}], [{"sent": "plate"}]]), {}),
        (sentences("sents", [["the red mug"], ["the blue mug"], ["plate"]]), {}),
        (original_refs(), {"split": "val"}),
    ],
    ids=["mdetr", "sentences", "sents", "refs"],
)
def test_referring_expressions_in_their_json_forms(folder: Path, document: Any, options: dict[str, Any]) -> None:
    first, second = opened(folder, "refer", document, **options)
    assert first.key == "a.jpg" and list(first.rows) == [RED, BLUE]
    assert second.key == "b.png" and [row.text for row in second.rows] == ["plate"]


def test_expressions_in_the_pictures_entries_and_masks(folder: Path) -> None:
    images = [{"id": 1, "file_name": "a.jpg", "expressions": ["the red mug"]}]
    [sample] = opened(folder, "refer", coco(images, [{"image_id": 1, "bbox": BOX, "segmentation": SQUARE}]))
    [row] = sample.rows
    assert row.box == RED.box and row.mask is not None and decode_mask(row.mask).sum() == 100


def test_malformed_expressions(folder: Path, messages: Any) -> None:
    document = mdetr()
    document["images"] += [
        {"id": 13, "file_name": "a.jpg", "caption": "no box", "width": WIDTH, "height": HEIGHT},
        {"id": 14, "file_name": "a.jpg", "caption": "other size", "width": WIDTH, "height": 31},
        {"id": 15, "file_name": "missing.jpg", "caption": "gone", "width": WIDTH, "height": HEIGHT},
    ]
    source = opened(folder, "refer", document)
    assert sum(len(sample.rows) for sample in source) == 3
    assert source.skipped == 3
    text = "\n".join(messages())
    for what in (
        "images[3]: 0 boxes",
        "images[4]: size (40, 31) contradicts",
        "images[5]: picture missing.jpg is missing",
    ):
        assert what in text


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_are_refused(folder: Path, kind: str) -> None:
    pickle = folder / "refs(unc).p"
    pickle.write_bytes(b"\x80\x02.")
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: pickles are refused.*JSON"):
        open_source(kind, [pickle], folder / "images", name="ref", losses={"point"})


def test_grounded_captions(folder: Path, messages: Any) -> None:
    images = [{"id": 1, "file_name": "a.jpg", "caption": "a red mug and two plates", "dataset_name": "flickr"}]
    boxes = [BOX, [20, 5, 10, 10], [20, 15, 10, 10], BOX, BOX]
    spans = [[[0, 9]], [[14, 24]], [[14, 24]], [[2, 5], [18, 24]], [[20, 30]]]
    annotations = [{"image_id": 1, "bbox": b, "tokens_positive": s} for b, s in zip(boxes, spans, strict=True)]
    source = opened(folder, "goldg", coco(images, annotations))
    [sample] = source
    assert [row.text for row in sample.rows] == ["a red mug", "two plates", "two plates", "red plates"]
    assert sample.rows[2].box == (20, 15, 30, 25)
    assert source.skipped == 1 and "annotations[4]: 'tokens_positive' [20, 30]" in messages()[0]


REGIONS = [
    {"region_id": 1, "image_id": 1, "x": 4, "y": 5, "width": 10, "height": 10, "phrase": "the red mug"},
    {"region_id": 2, "image_id": 1, "x": -1, "y": 0, "width": 9, "height": 9, "phrase": "a table "},
    {"region_id": 3, "image_id": 1, "x": 90, "y": 0, "width": 9, "height": 9, "phrase": "beyond"},
]


def check_regions(sample: Sample) -> None:
    mug, table = sample.rows
    assert mug == Row("the red mug", prompt=(4, 5, 14, 15), box=(4, 5, 14, 15))
    assert table.text == "a table" and table.box == (0, 0, 8, 9)


def test_visual_genome_in_its_own_layout(folder: Path, messages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "_PIECE", 64)  # records span many pieces
    write_picture(folder / "images" / "VG_100K" / "1.jpg")
    write_picture(folder / "images" / "VG_100K_2" / "2.jpg")
    sizes = [
        {"image_id": 1, "url": "https://x/VG_100K/1.jpg", "width": WIDTH, "height": HEIGHT},
        {"image_id": 2, "url": "https://x/VG_100K_2/2.jpg", "width": WIDTH, "height": HEIGHT},
    ]
    document = [{"id": 1, "regions": REGIONS}, {"id": 2, "regions": REGIONS[:2]}, {"id": 3, "regions": REGIONS[:2]}]
    source = opened(folder, "visual_genome", document, sizes=write_json(folder / "image_data.json", sizes))
    first, second = source
    check_regions(first)
    assert first.instances == () and second.image.parent.name == "VG_100K_2"
    assert source.skipped == 3  # the region beyond the picture, and both of the missing picture
    assert "visual_genome.json:record 1, region 2: box" in messages()[0]
    assert "visual_genome.json:record 3: picture 3.jpg is missing" in messages()[1]

    splits = write_json(folder / "splits.json", {"train": [1], "test": [2]})
    options = {"splits": splits, "losses": {"text", "proposal"}}
    [chosen] = opened(folder, "visual_genome", document, split="test", **options)
    assert chosen.key == "2.jpg" and [i.box for i in chosen.instances] == [row.box for row in chosen.rows]
    with pytest.raises(DataError, match=r"splits\.json: no list 'val'; it has train, test"):
        list(opened(folder, "visual_genome", document, split="val", **options))


def test_visual_genome_as_coco_json(folder: Path) -> None:
    annotations = [
        {"image_id": 1, "bbox": [r["x"], r["y"], r["width"], r["height"]], "caption": r["phrase"]} for r in REGIONS
    ]
    source = opened(folder, "visual_genome", coco(IMAGES, annotations))
    [sample] = source
    check_regions(sample)
    assert source.skipped == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".tsv"])
def test_image_text(folder: Path, suffix: str, messages: Any) -> None:
    file = folder / f"pairs{suffix}"
    if suffix == ".tsv":
        file.write_text("image\ttext\na.jpg\tA mug, red.\n\nb.png\ta\tb\nb.png\tA plate\n", encoding="utf-8")
    else:
        write_lines(file, [{"image": "a.jpg", "text": "A mug, red."}, "", "", {"image": "b.png"}])
        with file.open("a", encoding="utf-8") as out:
            out.write('{"image": "b.png", "caption": "A plate", "width": 40, "height": 30}\n')
    source = opened(folder, "image_text", file)
    assert [(s.key, s.rows[0].text) for s in source] == [("a.jpg", "A mug, red."), ("b.png", "A plate")]
    assert source.skipped == 1 and messages()[0].startswith(f"{file}:4: ")


def test_conversations(folder: Path, messages: Any) -> None:
    def turns(*values: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]

    records = [
        {"id": "1", "image": "a.jpg", "conversations": turns("<image>\nWhat is it? ", "A mug.", "Red?\n", "Yes.")},
        {"id": "2", "conversations": turns("No picture", "None")},
        {"id": "3", "image": "b.png", "conversations": turns("What?")},
        {"id": "4", "image": "b.png", "conversations": [*reversed(turns("a", "b"))]},
        {"id": "5", "image": "b.png", "conversations": turns("<image>", "b")},
    ]
    for file in (write_json(folder / "talk.json", records), write_lines(folder / "talk.jsonl", records)):
        source = opened(folder, "llava", file, max_skipped=0.9)
        [sample] = source
        assert [(row.context, row.text) for row in sample.rows] == [
            ("Question: What is it?Answer: ", "A mug."),
            ("Question: Red?Answer: ", "Yes."),
        ]
        assert source.skipped == 3
    assert "talk.json:record 3: 1 turns" in messages()[0] and f"{folder / 'talk.jsonl'}:4: turns of" in messages()[4]


@pytest.mark.parametrize(
    ("kind", "document", "what"),
    [
        ("coco_captions", "[1, 2", r"data\.json:1: not JSON"),
        (
            "coco_captions",
            '{"images": []}',
            "not COCO JSON, which is an object with the lists 'images' and 'annotations'",
        ),
        ("coco_captions", '{"images": [], "annotations": []}', r"no usable record in .*data\.json"),
        ("coco_instances", '{"images": [], "annotations": []}', r"data\.json: no list 'categories'"),
        ("refer", '{"images": [], "annotations": []}', r"data\.json: no expressions"),
        ("goldg", '{"images": [], "annotations": []}', r"data\.json: no annotation has 'tokens_positive'"),
        ("visual_genome", "[1, 2", r"data\.json: not JSON, or it breaks off, after record 1"),
        ("visual_genome", '["\xff"]', r"data\.json: not JSON text in UTF-8"),
        ("goldg", '["\xff"]', r"data\.json: not JSON text in UTF-8"),
        ("visual_genome", "[]", r"no usable record in .*data\.json"),
        ("image_text", "\n\n?", r"data\.json:3: not JSON"),
        ("llava", "", r"no usable record in .*data\.json"),
    ],
)
def test_other_formats_and_nothing_at_all(folder: Path, kind: str, document: str, what: str) -> None:
    file = folder / "data.json"
    file.write_text(document, encoding="latin-1")
    with pytest.raises(DataError, match=what):
        list(opened(folder, kind, file))


def test_what_does_not_exist_is_named_at_once(folder: Path) -> None:
    file = write_json(folder / "c.json", {})
    common: dict[str, Any] = {"name": "mine", "losses": {"text"}}
    with pytest.raises(DataError, match="unknown kind 'coco'; known are localized_narratives, coco_captions"):
        open_source("coco", [file], folder / "images", **common)
    with pytest.raises(DataError, match="'refer' has no option 'splits'; it takes split"):
        open_source("refer", [file], folder / "images", splits="val", **common)
    with pytest.raises(DataError, match="'goldg' has no option 'split'; it takes none"):
        open_source("goldg", [file], folder / "images", split="val", **common)
    with pytest.raises(DataError, match=r"d\.json: no such file"):
        open_source("goldg", [file, folder / "d.json"], folder / "images", **common)
    with pytest.raises(DataError, match="pictures: no such folder"):
        open_source("goldg", [file], folder / "pictures", **common)
    with pytest.raises(DataError, match="names no files"):
        open_source("goldg", [], folder / "images", **common)
