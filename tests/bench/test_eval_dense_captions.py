"""Dense captions asked of a bundle and of its checkpoint: the same things found, the same words, one judgement."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

import deixis
from deixis_bench.eval import cli
from deixis_bench.eval.bundle_predictor import BundlePredictor
from deixis_export.export import export_bundle
from deixis_export.presets import preset, random_model, random_tokenizer
from deixis_train.checkpoint import load_checkpoint, save_checkpoint
from deixis_train.evaluation import dense_task
from deixis_train.evaluation.torch_predictor import TorchPredictor
from deixis_train.models.config import BoxDecoderConfig
from make_tiny_bundle import TINY_BUNDLE

SMALL = BoxDecoderConfig(
    up_channels=16, channels=64, tower_channels=64, fc_dims=(32, 32), post_nms_test=40, max_detections=12
)
CONFIG = dataclasses.replace(
    preset("tiny"), box_decoder=SMALL, point_predictor=None, mask_decoder=None, mask_adapter=None
)
SEED = 3
TASKS = {"dense_captions": {"max_length": 9, "score_threshold": 0.02, "max_detections": 10}}
SIZES = ((96, 128), (60, 45))  # heights and widths: as wide as the input of 128 px, and grown to it


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle with a detector, and the checkpoint of the same weights."""
    folder = tmp_path_factory.mktemp("dense")
    words = random_tokenizer(CONFIG.t5.vocab)
    save_checkpoint(folder / "checkpoint", random_model(CONFIG, SEED), words, TASKS, dtype="fp32")
    export_bundle(random_model(CONFIG, SEED), folder / "bundle", tokenizer_json=words, tasks=TASKS)
    return folder / "bundle", folder / "checkpoint"


@pytest.fixture(scope="module")
def model(folders: tuple[Path, Path]) -> Iterator[deixis.Model]:
    with deixis.load(folders[0], device="cpu", threads=1) as model:
        yield model


def pictures() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    coarse = [random.integers(0, 256, (4, 5, 3), np.uint8) for _ in SIZES]
    return [cv2.resize(c, size[::-1], interpolation=cv2.INTER_NEAREST) for c, size in zip(coarse, SIZES, strict=True)]


def write_regions(folder: Path, found: list[list[tuple[tuple[float, ...], str]]]) -> None:
    """A folder of scenes with region descriptions alone."""
    for name in ("images", "annotations"):
        (folder / name).mkdir(parents=True)
    regions, sizes = [], []
    for n, (pixels, things) in enumerate(zip(pictures(), found, strict=True)):
        cv2.imwrite(str(folder / "images" / f"{n}.png"), pixels[..., ::-1])
        sides = [(x, y, right - x, bottom - y, text) for (x, y, right, bottom), text in things]
        names = ("x", "y", "width", "height", "phrase")
        regions.append({"id": n, "regions": [dict(zip(names, side, strict=True)) for side in sides]})
        sizes.append({"image_id": n, "url": f"images/{n}.png", "width": pixels.shape[1], "height": pixels.shape[0]})
    (folder / "annotations" / "region_descriptions.json").write_text(json.dumps(regions), encoding="utf-8")
    (folder / "annotations" / "image_data.json").write_text(json.dumps(sizes), encoding="utf-8")


@pytest.mark.parametrize(("beams", "join"), [(1, False), (1, True), (3, False), (3, True)])
def test_a_checkpoint_finds_and_says_what_its_bundle_does(
    folders: tuple[Path, Path], model: deixis.Model, beams: int, join: bool
) -> None:
    checkpoint = load_checkpoint(folders[1])
    tasks = {"dense_captions": {**TASKS["dense_captions"], "beams": beams, "join_scores": join}}
    ours = TorchPredictor(dataclasses.replace(checkpoint, tasks=tasks))
    assert "dense_captions" in ours.abilities
    for picture in pictures():
        scene = model.encode(picture)
        wanted = scene.dense_captions(join_scores=join, options=deixis.DecodeOptions(beams=beams))
        found = ours.dense_captions(picture)
        assert [one.text for one in found] == [one.text for one in wanted] and len(found) > 2
        np.testing.assert_allclose([one.box for one in found], [one.box for one in wanted], atol=0.01)
        np.testing.assert_allclose([one.score for one in found], [one.score for one in wanted], atol=1e-4)


def test_both_side_by_side(
    folders: tuple[Path, Path], model: deixis.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [BundlePredictor(model).dense_captions(picture) for picture in pictures()]
    # True are the two surest of the first picture, the second with other words, and a corner where nothing is found.
    (first, second, *_), corner = found[0], (0.0, 0.0, 2.0, 2.0)
    write_regions(tmp_path / "scenes", [[(first.box, first.text), (second.box, "other")], [(corner, "corner")]])
    judged: list[int] = []

    def meteor(captions: list[str], references: list[list[str]]) -> list[float]:
        judged.append(len(captions))
        return [float(caption in texts) for caption, texts in zip(captions, references, strict=True)]

    monkeypatch.setattr(dense_task, "meteor_scores", meteor)
    monkeypatch.setattr(dense_task, "require_java", lambda: None)
    report_file, items_file = tmp_path / "report.json", tmp_path / "items.jsonl"
    arguments = [folders[0], "--checkpoint", folders[1], "--task", "dense-captions", "--data", tmp_path / "scenes"]
    arguments += ["--threads", "1", "--device", "cpu", "--json", report_file, "--items", items_file]
    assert cli.main([str(a) for a in arguments]) == 0
    assert len(judged) == 2, "one call for everything that a predictor found"
    report = json.loads(report_file.read_text(encoding="utf-8"))
    values, number = report["metrics"], sum(map(len, found))
    assert values == {name: pytest.approx(value, abs=1e-6) for name, value in report["torch"].items()}
    assert report["data"] == {"folder": "scenes", "pictures": 2, "dense-captions": 2}
    assert values["detection recall"] == pytest.approx(2 / 3)
    assert values["detection precision"] == pytest.approx(2 / number)
    assert values["detections per picture"] == number / 2
    assert 0 < values["mAP_iou0.7_meteor0.25"] < values["mAP_detection_iou0.7"] < 0.68

    items = [json.loads(line) for line in items_file.read_text(encoding="utf-8").splitlines()]
    assert [(item["task"], item["by"], item["image"]) for item in items] == [
        ("dense-captions", by, f"{n}.png") for by in ("bundle", "torch") for n in range(2)
    ]
    assert items[0]["predicted"] == [{"box": list(o.box), "caption": o.text, "score": o.score} for o in found[0]]
    assert items[0]["scores"] == {"regions": 2, "detections": len(found[0]), "found": 2}


def test_without_a_detector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_regions(tmp_path / "scenes", [[((1.0, 1.0, 9.0, 9.0), "a mug")]] * 2)
    monkeypatch.setattr(dense_task, "require_java", lambda: None)
    monkeypatch.setattr("deixis_train.evaluation.tasks.require_java", lambda: None)
    monkeypatch.setattr("deixis_train.evaluation.tasks.Regions.metrics", lambda self, items: {"regions": len(items)})
    arguments = [str(TINY_BUNDLE), "--threads", "1", "--data", str(tmp_path / "scenes")]
    assert cli.main([*arguments, "--task", "dense-captions"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("deixis eval: error: dense-captions: the bundle has no detector") and err.count("\n") == 1
    assert cli.main([*arguments, "--task", "all"]) == 0
    captured = capsys.readouterr()
    assert "the bundle has no detector; dense-captions is left out" in captured.err
    assert "regions" in captured.out and "mAP" not in captured.out
