"""Localized Narratives: what is read, and what is refused with its line."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
from published import HEIGHT, WIDTH, coco, narration, write_json, write_lines, write_picture

from deixis_train.data.formats import open_source
from deixis_train.data.formats.errors import DataError
from deixis_train.data.samples import Sample


def read(tmp_path: Path, lines: list[Any], name: str = "000000000007.jpg", **options: Any) -> list[Sample]:
    write_picture(tmp_path / "images" / name)
    file = write_lines(tmp_path / "narrations.jsonl", lines)
    return list(
        open_source("localized_narratives", [file], tmp_path / "images", name="ln", losses={"text", "point"}, **options)
    )


def test_a_narration(tmp_path: Path) -> None:
    [sample] = read(tmp_path, [narration()])
    assert (sample.image.name, sample.width, sample.height) == ("000000000007.jpg", WIDTH, HEIGHT)
    assert sample.where == f"{tmp_path / 'narrations.jsonl'}:1"
    [row] = sample.rows
    assert row.text == "A mug and a plate." and row.box is None and row.prompt is None
    mug, plate = row.utterances
    assert (
        mug.text == "A mug"
        and mug.center == pytest.approx((0.2, 0.3))
        and mug.box == pytest.approx((0.1, 0.2, 0.3, 0.4))
    )
    assert plate.box == pytest.approx((0.3, 0.4, 0.7, 0.8))


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("ab_1.jpg", {"dataset_id": "open_images_val", "image_id": "ab_1"}, {}),
        ("0007.png", {"dataset_id": "mine"}, {"picture": "{:04d}.png"}),
        ("val-7.png", {}, {"picture": "val-{}.png"}),
    ],
)
def test_names_of_pictures(tmp_path: Path, name: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    [sample] = read(tmp_path, [narration(**changes)], name, **options)
    assert sample.image.name == name


def test_sizes_stated_elsewhere_must_be_the_pictures(tmp_path: Path) -> None:
    sizes = write_json(tmp_path / "sizes.json", coco([{"id": 7, "file_name": "000000000007.jpg"}], []))
    assert read(tmp_path, [narration()], sizes=sizes)
    write_json(sizes, coco([{"id": 7, "file_name": "000000000007.jpg", "width": 41}], []))
    with pytest.raises(DataError, match=r"narrations.jsonl:1: picture 000000000007.jpg has 40x30 px, not 41x30"):
        read(tmp_path, [narration()], sizes=sizes)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in narration().items() if key != name}


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{broken", "not JSON"),
        ([1], "not an object"),
        (without("caption"), "'caption'"),
        (narration(caption="  "), "'caption' is empty"),
        (narration(timed_caption=[]), "'timed_caption' is empty"),
        (narration(timed_caption=[{"utterance": "A", "start_time": 2.0, "end_time": 1.0}]), "ends before it starts"),
        (narration(timed_caption=[{"utterance": "A", "start_time": None, "end_time": 1.0}]), "'start_time'"),
        (narration(traces=[[]]), "the trace is empty"),
        (narration(traces=[[{"x": math.nan, "y": 0.0, "t": 0.0}]]), "'x' is not a finite number"),
        (narration(traces=[[{"x": 0.1, "t": 0.0}]]), "'y' is not a finite number"),
        (narration("8"), "picture 000000000008.jpg is missing"),
        (narration("../7"), "is no number"),
    ],
)
def test_a_malformed_line_is_named_counted_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: Any, what: str
) -> None:
    write_picture(tmp_path / "images" / "000000000007.jpg")
    file = write_lines(tmp_path / "narrations.jsonl", [narration(), line, narration()])
    source = open_source(
        "localized_narratives", [file], tmp_path / "images", name="ln", losses={"text"}, max_skipped=0.5
    )
    with caplog.at_level(logging.WARNING):
        assert [sample.where for sample in source] == [f"{file}:1", f"{file}:3"]
    assert source.skipped == 1
    [record] = caplog.records
    assert record.getMessage().startswith(f"{file}:2: ") and what in record.getMessage()
    assert len(list(source)) == 2 and source.skipped == 1  # a second pass counts anew


def test_too_many_malformed_lines_end_the_reading_early(tmp_path: Path) -> None:
    write_picture(tmp_path / "images" / "000000000007.jpg")
    lines = [narration()] * 90 + ["?"] * 30 + [narration()] * 3000
    file = write_lines(tmp_path / "narrations.jsonl", lines)
    source = open_source("localized_narratives", [file], tmp_path / "images", name="ln", losses={"text"})
    seen = 0
    with pytest.raises(DataError, match=r"10 of 100 records are malformed.*1\.0%.*narrations.jsonl:91: not JSON"):
        for _ in source:
            seen += 1
    assert seen == 90


def test_the_end_judges_short_files_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 of 3 records"):
        read(tmp_path, [narration(), "?", narration()])
