"""Judging a bundle on rendered scenes: what counts as right, and the command from end to end."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deixis
from deixis_bench.heldout import Tally, box_iou, main, named_things, read_scenes
from deixis_train.data.scenes.generate import generate

TINY = Path(__file__).parents[1] / "golden" / "tiny_bundle"
KINDS, COLOURS = {"mug", "ball"}, {"red", "blue"}


def test_box_iou_against_counted_pixels() -> None:
    random = np.random.default_rng(0)
    for _ in range(60):
        masks, boxes = np.zeros((2, 20, 20), bool), []
        for mask in masks:
            (x0, y0), (w, h) = random.integers(0, 12, 2), random.integers(1, 9, 2)
            mask[y0 : y0 + h, x0 : x0 + w] = True
            boxes.append((float(x0), float(y0), float(x0 + w), float(y0 + h)))
        wanted = (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()
        assert box_iou(boxes[0], boxes[1]) == pytest.approx(wanted, abs=1e-5)
    assert box_iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0
    assert box_iou((9, 9, 1, 1), (1, 1, 9, 9)) == 0  # a box inside out covers nothing


@pytest.mark.parametrize(
    ("text", "things"),
    [
        ("There is a Red mug, a blue ball and a red mug.", {("red", "mug"): 2, ("blue", "ball"): 1}),
        ("a red large mug", {}),  # colour and kind stand side by side
        ("a mug red ball", {("red", "ball"): 1}),
        ("a green mug, a red cat, redmug", {}),
        ("", {}),
    ],
)
def test_named_things(text: str, things: dict[tuple[str, str], int]) -> None:
    assert named_things(text, KINDS, COLOURS) == Counter(things)


class Answers:
    """Stands for model and scene: gives prepared answers, and remembers what was asked."""

    def __init__(self, groundings: Sequence[deixis.Grounding] = (), captions: Sequence[str] = ()) -> None:
        self.groundings, self.captions = list(groundings), list(captions)
        self.asked: list[Any] = []

    def refer_batch(self, requests: list[Any]) -> list[deixis.Grounding]:
        self.asked += [text for _, text in requests]
        return self.groundings[: len(requests)]

    def caption_batch(self, requests: list[Any]) -> list[deixis.Caption]:
        self.asked += [prompt.box for _, prompt in requests]
        return [deixis.Caption(text, ()) for text in self.captions]

    def caption(self) -> deixis.Caption:
        return deixis.Caption(self.captions[0], ())


def mask_of(left: int, right: int) -> deixis.Mask:
    """Columns `left` to `right` of a picture of 4 rows and 10 columns."""
    mask = np.zeros((4, 10), bool)
    mask[:, left:right] = True
    return deixis.Mask.from_array(mask)


def truth() -> dict[str, Any]:
    def thing(color: str, kind: str, left: int, right: int) -> dict[str, Any]:
        mask = mask_of(left, right).to_dict()
        return {"color": color, "kind": kind, "box": [left, 0, right, 4], "rle": mask}

    return {
        "objects": [thing("red", "mug", 0, 4), thing("blue", "ball", 6, 8)],
        "expressions": [{"text": f"number {k}", "object": k % 2} for k in range(4)],
    }


def test_tally_of_known_answers() -> None:
    tally, scene = Tally(), truth()
    found = Answers(
        [
            deixis.Grounding("number 0", (0.0, 0.0, 4.0, 4.0), mask_of(0, 4)),  # just right
            deixis.Grounding("number 1", (6.0, 0.0, 10.0, 4.0), mask_of(7, 10)),  # 1/2: not above 0.5
            deixis.Grounding("number 2", (8.0, 0.0, 10.0, 4.0)),  # beside it, and without a mask
        ]
    )
    tally.refer(found, object(), scene, limit=3)  # type: ignore[arg-type]
    assert found.asked == ["number 0", "number 1", "number 2"]
    tally.refer(found, object(), scene | {"expressions": []}, limit=3)  # type: ignore[arg-type]
    assert len(found.asked) == 3, "nothing is asked about a scene without expressions"
    tally.caption(Answers(captions=["a red mug, a red mug and a red ball"]), scene, KINDS, COLOURS)  # type: ignore[arg-type]
    regions = Answers(captions=["a large red mug", "a small red ball"])
    tally.regions(regions, object(), scene)  # type: ignore[arg-type]
    assert [tuple(box) for box in regions.asked] == [(0, 0, 4, 4), (6, 0, 8, 4)]
    metrics = tally.metrics()
    assert metrics == {
        "P@0.5": pytest.approx(1 / 3),
        "mean IoU": pytest.approx(0.5),
        "cIoU": pytest.approx((16 + 4) / (16 + 16)),
        "gIoU": pytest.approx((1 + 1 / 4) / 2),
        "caption recall": 1 / 2,  # a second red mug is not there
        "caption precision": 1 / 3,
        "region right": 1 / 2,
    }


def test_the_command_runs_a_bundle_over_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenes, report = tmp_path / "scenes", tmp_path / "report.json"
    generate(scenes, 7_000_000, 3, size=128, workers=1, shard=1)
    truths = list(read_scenes(scenes))
    assert [scene["seed"] for scene in truths] == [7_000_000, 7_000_001, 7_000_002]
    options = ["--limit", "2", "--expressions", "2", "--threads", "1", "--json", str(report)]
    monkeypatch.setattr(sys, "argv", ["heldout", str(TINY), "--scenes", str(scenes), *options])
    main()
    values = json.loads(report.read_text(encoding="utf-8"))
    assert values["data"] == {
        "scenes": 2,
        "first_seed": 7_000_000,
        "expressions": 4,
        "regions": sum(len(scene["objects"]) for scene in truths[:2]),
    }
    assert {"P@0.5", "mean IoU", "cIoU", "gIoU"} < set(values["metrics"])
    assert all(0 <= value <= 1 for value in values["metrics"].values())  # random weights: any answer will do
    assert values["bundle"]["name"] == "tiny"
    assert "caption recall" in capsys.readouterr().out


def test_a_folder_without_scenes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["heldout", str(TINY), "--scenes", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "holds no scenes" in capsys.readouterr().err
