"""`deixis eval` from end to end with the tiny bundle, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import deixis
from deixis_bench.eval import cli, table
from deixis_bench.eval.data import LAYOUT, files_of, read_pictures
from deixis_bench.eval.items import ItemFile
from deixis_export.presets import preset, random_model, random_tokenizer
from deixis_train.checkpoint import save_checkpoint
from deixis_train.data.scenes.generate import generate
from deixis_train.evaluation import boxes, masks
from deixis_train.evaluation.tasks import truth_of_words
from make_tiny_bundle import SEED, TINY_BUNDLE

WIDTH, HEIGHT = 96, 72
TEXTS = ("the red mug", "a blue cup on the left", "an orange pear")


def narration(image: str, words: str) -> dict[str, Any]:
    """Every word is an utterance; the mouse goes from left to right."""
    timed, trace = [], []
    for k, word in enumerate(words.split()):
        timed.append({"utterance": word, "start_time": float(k), "end_time": k + 0.5})
        trace += [{"x": 0.1 * k, "y": 0.2, "t": float(k)}, {"x": 0.1 * k + 0.2, "y": 0.6, "t": k + 0.5}]
    return {"dataset_id": "x", "image_id": image, "caption": words, "timed_caption": timed, "traces": [trace]}


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """Two pictures in the layout of rendered scenes: things with masks, expressions, narrations."""
    folder = tmp_path / "scenes"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    random = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(2):
        name = f"00000{number}.jpg"
        cv2.imwrite(str(folder / "images" / name), random.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for thing, text in enumerate(TEXTS[: 2 + number]):
            x, y, w, h = 5 + 25 * thing, 10, 20, 40
            mask = np.zeros((HEIGHT, WIDTH), bool)
            mask[y : y + h, x : x + w] = True
            annotations.append(
                {
                    "id": 10 * number + thing,
                    "image_id": number,
                    "category_id": 1,
                    "bbox": [x, y, w, h],
                    "segmentation": masks.encode(mask),
                    "attributes": {"color": "red"},
                    "sentences": [{"sent": text}],
                }
            )
    document = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "mug"}]}
    for name in ("refer", "instances"):
        (folder / "annotations" / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def write_narrations(folder: Path, name: str = "narrations") -> None:
    lines = [json.dumps(narration(f"00000{n}", "a red mug next to a plate")) for n in range(2)]
    (folder / "annotations" / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def evaluate(*arguments: object) -> int:
    return cli.main([str(TINY_BUNDLE), "--threads", "1", *map(str, arguments)])


def test_a_bundle_and_its_checkpoint_side_by_side(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = preset("tiny")
    save_checkpoint(tmp_path / "checkpoint", random_model(config, SEED), random_tokenizer(config.t5.vocab))
    report_file, items_file = tmp_path / "report.json", tmp_path / "items.jsonl"
    tasks = ["--task", "refer", "masks", "boxes", "--data", scenes]
    code = evaluate(*tasks, "--checkpoint", tmp_path / "checkpoint", "--json", report_file, "--items", items_file)
    assert code == 0
    report = json.loads(report_file.read_text(encoding="utf-8"))
    assert list(report) == ["metrics", "data", "bundle", "machine", "torch", "checkpoint"]
    assert report["data"] == {"folder": "scenes", "pictures": 2, "refer": 5, "boxes": 5}
    assert report["bundle"]["path"] == "tiny_bundle" and report["checkpoint"]["name"] == "tiny"
    assert set(report["metrics"]) == set(report["torch"])
    assert report["metrics"] == {name: pytest.approx(value, abs=0.02) for name, value in report["torch"].items()}

    items = [json.loads(line) for line in items_file.read_text(encoding="utf-8").splitlines()]
    assert len(items) == 20 and {item["by"] for item in items} == {"bundle", "torch"}
    found = [item for item in items if item["by"] == "bundle" and item["task"] == "refer"]
    assert [(item["image"], item["text"]) for item in found] == [
        ("000000.jpg", TEXTS[0]), ("000000.jpg", TEXTS[1]), *(("000001.jpg", text) for text in TEXTS)
    ]  # fmt: skip
    # The metrics are those of the answers in the file, and the answers are the bundle's.
    ious = [item["scores"]["IoU"] for item in found]
    assert report["metrics"]["mean box IoU"] == pytest.approx(np.mean(ious))
    with deixis.load(TINY_BUNDLE, device="cpu", threads=1) as model:
        grounding = model.encode(scenes / "images" / "000000.jpg").refer(TEXTS[0])
    assert found[0]["predicted"]["box"] == pytest.approx(grounding.box)
    assert ious[0] == pytest.approx(boxes.pair_iou([grounding.box], [(5, 10, 25, 50)])[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint", "items.jsonl", "report.json", "scenes"
    ]  # fmt: skip
    assert "P@0.5" in capsys.readouterr().out


def test_all_takes_what_the_data_has(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_narrations(scenes)
    write_narrations(scenes, "traces")
    report = tmp_path / "report.json"
    assert evaluate("--task", "all", "--data", scenes, "--limit", 1, "--expressions", 1, "--json", report) == 0
    values = json.loads(report.read_text(encoding="utf-8"))
    assert values["data"] == {"folder": "scenes", "pictures": 1, "refer": 1, "trace": 1, "free-trace": 1}
    assert values["metrics"]["LBM k=0"] == values["metrics"]["free-order LBM k=0"] > 0
    assert values["metrics"]["LBM k=2"] <= values["metrics"]["LBM k=1"] <= values["metrics"]["LBM k=0"]
    assert "captions.json is not there; caption is left out" in capsys.readouterr().err


def test_the_layout_is_that_of_rendered_scenes(tmp_path: Path) -> None:
    generate(tmp_path, 7_000_000, 1, size=128, workers=1, shard=1)
    files = {task: files_of(tmp_path, task) for task in LAYOUT}
    [picture], skipped = read_pictures(files, files["boxes"], None)
    assert skipped == {}
    assert set(picture.rows) == set(LAYOUT) and all(picture.rows[task] for task in LAYOUT if task != "boxes")
    assert len(picture.rows["caption"]) == 5
    assert {"color", "size"} <= set(picture.instances[0].attributes) and picture.instances[0].mask is not None
    for row in (*picture.rows["trace"], *picture.rows["free-trace"]):
        words = row.text.split()
        truth = truth_of_words(words, row.utterances, "text")
        assert truth.any(axis=1).all(), "every word of a rendered narration has a place"
        # Utterances are words and marks: the first of a word that has no mark is the word itself.
        assert truth[0] == pytest.approx(np.clip(row.utterances[0].box, 0, 1))


def test_bundles_are_measured_without_torch() -> None:
    modules = "bundle_predictor, data, dense, measure, report, table"
    code = f"import sys; from deixis_bench.eval import {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_other_data_is_named_by_kind(scenes: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--kind", "refer", "--files", scenes / "annotations" / "refer.json", "--images", scenes / "images"]
    assert evaluate("--task", "refer", *files, "--limit", 1) == 0
    captured = capsys.readouterr()
    assert "P@0.5" in captured.out and "cIoU" not in captured.out
    assert evaluate("--task", "refer", *files, "--option", "colour=red") == 1
    assert "has no option 'colour'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--task", "refer", "--data", "{scenes}/nowhere"], 1, "nowhere: no such folder"),
        (["--task", "caption", "--data", "{scenes}"], 1, "captions.json"),
        (["--task", "everything", "--data", "{scenes}"], 2, "invalid choice: 'everything'"),
        (["--task", "refer"], 2, "give --data DIR, or --kind"),
        (["--data", "{scenes}"], 2, "say what to measure: --task"),
        (["--task", "dense-captions", "--data", "{scenes}", "--detections", "x.json"], 2, "no model, no --items"),
        (["--task", "refer", "--data", "{scenes}", "--limit", "0"], 2, "whole number from 1 on"),
        (["--task", "refer", "--data", "{scenes}", "--json", "{scenes}/no/report.json"], 2, "no such folder"),
        (["--task", "refer", "--data", "{scenes}", "--checkpoint", "{scenes}"], 1, "this is not a checkpoint"),
    ],
)
def test_wrong_use_is_one_line(
    scenes: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    words = [word.format(scenes=scenes) for word in arguments]
    try:
        found = evaluate(*words)
    except SystemExit as stop:
        found = stop.code
    err = capsys.readouterr().err
    assert (found, err.count("\n")) == (code, 1), err
    assert err.startswith("deixis eval: error: ") and message in err


def test_empty_data_is_refused(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenes / "annotations" / "refer.json"
    path.write_text('{"images": [], "annotations": []}', encoding="utf-8")
    items = tmp_path / "items.jsonl"
    assert evaluate("--task", "refer", "--data", scenes, "--items", items) == 1
    assert "refer.json" in capsys.readouterr().err and not items.exists()


def test_without_java_nothing_is_run(
    scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (scenes / "annotations" / "captions.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("PATH", str(scenes))
    assert evaluate("--task", "caption", "--data", scenes) == 1
    assert "apt-get install default-jre-headless" in capsys.readouterr().err


def test_dense_captions_come_from_files(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    regions = [
        {"id": n, "regions": [{"x": 5, "y": 10, "width": 20, "height": 40, "phrase": f"a mug {n}"}]} for n in range(2)
    ]
    sizes = [{"image_id": n, "url": f"images/00000{n}.jpg", "width": WIDTH, "height": HEIGHT} for n in range(2)]
    (scenes / "annotations" / "region_descriptions.json").write_text(json.dumps(regions), encoding="utf-8")
    (scenes / "annotations" / "image_data.json").write_text(json.dumps(sizes), encoding="utf-8")
    found = [
        {"image_id": 0, "bbox": [5, 10, 20, 40], "score": 0.9, "caption": "a mug 0"},
        {"image_id": 0, "bbox": [60, 10, 20, 40], "score": 0.8, "caption": "nothing"},
        {"image_id": 1, "bbox": [5, 10, 20, 40], "score": 0.7, "caption": "a wrong text"},
    ]
    detections, report = tmp_path / "detections.json", tmp_path / "report.json"
    detections.write_text(json.dumps(found), encoding="utf-8")

    def meteor(captions: list[str], references: list[list[str]]) -> list[float]:
        return [float(caption in texts) for caption, texts in zip(captions, references, strict=True)]

    monkeypatch.setattr("deixis_bench.eval.dense.meteor_scores", meteor)
    arguments = ["--task", "dense-captions", "--data", str(scenes), "--detections", str(detections)]
    assert cli.main([*arguments, "--json", str(report)]) == 0
    values = json.loads(report.read_text(encoding="utf-8"))
    assert values["bundle"] is None
    assert values["data"] == {"folder": "scenes", "pictures": 2, "regions": 2, "detections": 3}
    assert values["metrics"]["mAP_detection"] == pytest.approx((51 + 49 * 2 / 3) / 100)  # at recall 0.5 and 1
    assert values["metrics"]["mAP"] == pytest.approx(0.51)  # one of two things, found first
    capsys.readouterr()
    detections.write_text(json.dumps([found[0] | {"image_id": 7}, found[0]]), encoding="utf-8")
    assert cli.main(arguments) == 1
    assert "picture 7, which has no annotations" in capsys.readouterr().err
    detections.write_text('[{"image_id": 0}]', encoding="utf-8")
    assert cli.main(arguments) == 1
    assert "detections.json:[0]: needs image_id" in capsys.readouterr().err


def test_items_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    with pytest.raises(KeyboardInterrupt), ItemFile(path) as file:
        file.add([{"a": 1}])
        assert (tmp_path / ".items.jsonl.tmp").read_text(encoding="utf-8") == '{"a": 1}\n'
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with ItemFile(path) as file:
        file.add([{"a": 1}])
        file.finish([{"a": 1, "b": 2}])
    assert path.read_text(encoding="utf-8") == '{"a": 1, "b": 2}\n' and list(tmp_path.iterdir()) == [path]


def test_the_table_of_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = {
        "metrics": {"P@0.5": 0.91, "LBM k=0": 0.09, "caption CIDEr": 1.6},
        "torch": {"P@0.5": 0.92, "LBM k=0": 0.07},
        "bundle": {"name": "x"},
    }
    other = {"metrics": {"mean IoU": 0.686}, "bundle": {"name": "x"}}
    alone = {"metrics": {"gIoU": 0.5}, "torch": {"gIoU": 0.5}, "bundle": None}
    paths = []
    for number, report in enumerate((both, other, alone)):
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps(report), encoding="utf-8")
    assert cli.main(["--table", *map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| metric | goal | torch | bundle |",
        "|---|---:|---:|---:|",
        "| P@0.5 | ≥ 90.0 % | 92.0 % | **91.0 %** |",
        "| LBM k=0 | ≤ 0.080 | 0.070 | 0.090 |",
        "| caption CIDEr | ≥ 1.500 |  | **1.600** |",
        "| mean IoU |  |  | 68.6 % |",
        "| gIoU |  | 50.0 % |  |",
    ]
    paths[0].write_text("[]", encoding="utf-8")
    assert table.main([str(paths[0])]) == 1
    assert "not a report of 'deixis eval'" in capsys.readouterr().err
    assert table.main([]) == 2
