"""Published texts of scenes: each layout says what the ground truth says, and the readers of real data read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from deixis_train.data.formats import open_source
from deixis_train.data.samples import Sample
from deixis_train.data.scenes.generate import generate
from deixis_train.data.scenes.publish import publish
from deixis_train.data.scenes.texts import texts_of

COUNT, SEED, SIZE = 5, 8_000_000, 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scenes")
    generate(out, SEED, COUNT, size=SIZE, workers=1, shard=3)
    return out


@pytest.fixture(scope="module")
def lines(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in sorted(data.glob("scenes-*.jsonl")) for line in path.read_text().splitlines()]


def load(data: Path, name: str) -> Any:
    text = (data / "annotations" / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def read(data: Path, kind: str, name: str, **options: Any) -> list[Sample]:
    source = open_source(
        kind, [data / "annotations" / name], data / "images", name=kind, losses=["text"], max_skipped=0.0, **options
    )
    samples = list(source)
    assert source.skipped == 0
    return samples


def boxes_of_utterances(record: dict[str, Any]) -> np.ndarray:
    """Least and greatest of 16 samples of the trace within each utterance, as fractions: [U, 4] XYXY."""
    path = np.array([(p["t"], p["x"], p["y"]) for segment in record["traces"] for p in segment])
    path = path[np.argsort(path[:, 0], kind="stable")]
    out = []
    for utterance in record["timed_caption"]:
        at = np.linspace(utterance["start_time"], utterance["end_time"], 16)
        x, y = np.interp(at, path[:, 0], path[:, 1]), np.interp(at, path[:, 0], path[:, 2])
        out.append((x.min(), y.min(), x.max(), y.max()))
    return np.array(out)


def test_narrations_trace_each_word_over_its_thing(data: Path, lines: list[dict[str, Any]]) -> None:
    said = [(line, words, 0) for line in lines for words in texts_of(line).captions[:1]]
    traced = [(line, words, k) for line in lines for k, words in enumerate(texts_of(line).traces, start=1)]
    assert len(traced) >= 3 * COUNT
    for name, expected in (("narrations.jsonl", said), ("traces.jsonl", traced)):
        for record, (line, words, annotator) in zip(load(data, name), expected, strict=True):
            assert record["image_id"] == Path(line["file"]).stem and record["annotator_id"] == annotator
            assert [u["utterance"] for u in record["timed_caption"]] == [word.text for word in words]
            assert record["caption"].replace(",", " ,").replace(".", " .").split() == [word.text for word in words]
            size = np.array([line["width"], line["height"]] * 2)
            truth = np.array([word.box for word in words]) / size
            np.testing.assert_allclose(boxes_of_utterances(record), truth, atol=1e-4)
            times = [t for u in record["timed_caption"] for t in (u["start_time"], u["end_time"])]
            assert times == sorted(times)


def test_the_reader_of_narrations_finds_the_same_boxes(data: Path, lines: list[dict[str, Any]]) -> None:
    for name in ("narrations.jsonl", "traces.jsonl"):
        records = load(data, name)
        samples = read(data, "localized_narratives", name)
        for sample, record in zip(samples, records, strict=True):
            found = np.array([u.box for u in sample.rows[0].utterances])
            np.testing.assert_allclose(found, boxes_of_utterances(record), atol=1e-4)
            centers = np.array([u.center for u in sample.rows[0].utterances])
            np.testing.assert_allclose(centers, (found[:, :2] + found[:, 2:]) / 2, atol=1e-4)


def test_instances_are_coco(data: Path, lines: list[dict[str, Any]]) -> None:
    coco = COCO(str(data / "annotations" / "instances.json"))
    for line in lines:
        found: Any = coco.loadAnns(coco.getAnnIds(imgIds=line["id"]))
        for annotation, thing in zip(found, line["objects"], strict=True):
            assert coco.cats[annotation["category_id"]]["name"] == thing["kind"]
            assert annotation["attributes"]["color"] == thing["color"]
            assert annotation["attributes"]["size"] == thing["size"]
            assert set(annotation["attributes"]) == {"color", "size", "variant", "material"}
            mask = coco.annToMask(annotation)
            assert mask.shape == (line["height"], line["width"]) and mask.sum() == annotation["area"]
            x, y, w, h = annotation["bbox"]
            assert [x, y, x + w, y + h] == thing["box"]
            assert mask[y : y + h, x : x + w].sum() == mask.sum()


def test_captions_are_five_per_picture(data: Path, lines: list[dict[str, Any]]) -> None:
    document = load(data, "captions.json")
    assert len({a["id"] for a in document["annotations"]}) == len(document["annotations"]) == 5 * COUNT
    narrations = [record["caption"] for record in load(data, "narrations.jsonl")]
    for sample, line, narration in zip(read(data, "coco_captions", "captions.json"), lines, narrations, strict=True):
        assert sample.image == data / line["file"]
        assert len({row.text for row in sample.rows}) == 5
        assert sample.rows[0].text == narration


def test_referring_expressions_come_with_box_and_mask(data: Path, lines: list[dict[str, Any]]) -> None:
    samples = read(data, "refer", "refer.json")
    for sample, line in zip(samples, lines, strict=True):
        found = {(row.text, row.box, json.dumps(row.mask)) for row in sample.rows}
        things = line["objects"]
        assert found == {
            (text, tuple(things[k]["box"]), json.dumps(things[k]["rle"])) for text, k in texts_of(line).expressions
        }


def test_regions_are_visual_genome(data: Path, lines: list[dict[str, Any]]) -> None:
    sizes = data / "annotations" / "image_data.json"
    samples = read(data, "visual_genome", "region_descriptions.json", sizes=sizes)
    for sample, line in zip(samples, lines, strict=True):
        assert (sample.width, sample.height) == (line["width"], line["height"])
        for row, thing in zip(sample.rows, line["objects"], strict=True):
            assert row.text.split()[1:] == [thing["size"], thing["color"], thing["kind"]]
            assert row.box == tuple(thing["box"])


def test_phrases_of_grounded_captions_have_the_masks_of_what_they_name(data: Path, lines: list[dict[str, Any]]) -> None:
    for record, line in zip(load(data, "grounded_captions.json"), lines, strict=True):
        found = []
        for phrase, grounding in record["groundings"].items():
            start, end = grounding["token_positives"]
            assert record["caption"][start:end] == phrase
            (mask,) = grounding["rle_masks"]
            (thing,) = [o for o in line["objects"] if o["rle"] == mask]
            assert phrase.split()[-2:] == [thing["color"], thing["kind"]]
            found.append(thing)
        assert len(found) == len(line["objects"])
    for sample, line in zip(read(data, "goldg", "goldg.json"), lines, strict=True):
        assert {row.box for row in sample.rows} == {tuple(o["box"]) for o in line["objects"]}
        for row in sample.rows:
            (thing,) = [o for o in line["objects"] if tuple(o["box"]) == row.box]
            assert row.text.split()[-2:] == [thing["color"], thing["kind"]]


def test_questions_and_pairs_are_read(data: Path, lines: list[dict[str, Any]]) -> None:
    asked = [(q, a) for line in lines for q, a in texts_of(line).questions]
    rows = [row for sample in read(data, "llava", "questions.json") for row in sample.rows]
    assert [row.text for row in rows] == [answer for _, answer in asked]
    assert all(question in row.context for row, (question, _) in zip(rows, asked, strict=True))
    pairs = read(data, "image_text", "image_text.jsonl")
    assert len(pairs) == sum(5 + len(texts_of(line).traces) for line in lines)


def test_ids_differ_within_a_file(data: Path) -> None:
    for name in ("instances", "captions", "refer", "goldg"):
        annotations = load(data, f"{name}.json")["annotations"]
        assert len({a["id"] for a in annotations}) == len(annotations) > COUNT
    sentences = [s for a in load(data, "refer.json")["annotations"] for s in a["sentences"]]
    assert len({s["sent_id"] for s in sentences}) == len(sentences)


def test_published_once_and_again_when_absent_or_outgrown(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(data, out)
    folder = out / "annotations"
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "questions.json").write_text("kept")
    assert generate(out, SEED, COUNT, size=SIZE, workers=1, shard=3) == 0
    assert (folder / "questions.json").read_text() == "kept"
    shutil.rmtree(folder)
    assert generate(out, SEED, COUNT, size=SIZE, workers=2, shard=3) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    # Texts about fewer scenes than there are now, as a run leaves them that is killed before it publishes again.
    assert publish(out, [out / "scenes-0000.jsonl"], anew=True)
    assert generate(out, SEED, COUNT, size=SIZE, workers=1, shard=3) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
