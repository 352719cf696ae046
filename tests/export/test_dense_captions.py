"""A detector through export and runtime: what comes out is what the PyTorch model finds and says."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from exporting import TINY

import deixis
from deixis.bundle import Bundle, open_bundle
from deixis.cli import main
from deixis.detection import Detections
from deixis.errors import ExportError
from deixis.image import prepare
from deixis.overlay import save_image
from deixis_export.cases import Sizes, example_picture, make_cases
from deixis_export.chain import lost_detections
from deixis_export.export import export_bundle
from deixis_export.graphs import graph_specs, run_torch
from deixis_export.manifest import detection_spec, task_table
from deixis_export.presets import random_model, random_tokenizer
from deixis_export.session import GraphSession, relative_error
from deixis_train.models.box_decoder import Detections as TorchDetections
from deixis_train.models.box_decoder.dense_captions import DenseCaptions, dense_captions
from deixis_train.models.config import BoxDecoderConfig
from deixis_train.models.pixelllm import PixelLLM

SMALL = BoxDecoderConfig(
    up_channels=16, channels=64, tower_channels=64, fc_dims=(32, 32), post_nms_test=40, max_detections=12
)
# Without a location head and masks: captions have to do without places, and the export is quicker.
CONFIG = dataclasses.replace(TINY, box_decoder=SMALL, point_predictor=None, mask_decoder=None, mask_adapter=None)
SEED = 3
TASKS = {"dense_captions": {"max_length": 9, "score_threshold": 0.02}}


def make_model() -> PixelLLM:
    """A random model that never says the padding: the uncached decoder of the reference then masks what is before."""
    model = random_model(CONFIG, SEED)
    words = model.text.decoder.logits_dense.weight
    with torch.no_grad():
        words[0] = words[2:].mean(dim=0)  # the mean logit is never the largest
    return model


@pytest.fixture(scope="module")
def detecting(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export_bundle(
        make_model(),
        tmp_path_factory.mktemp("dense") / "bundle",
        tokenizer_json=random_tokenizer(CONFIG.t5.vocab),
        tasks=TASKS,
    )


@pytest.fixture(scope="module")
def runtime(detecting: Bundle) -> Iterator[deixis.Model]:
    with deixis.load(detecting.path, device="cpu", threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Two that fill the input in one direction, and one that does not have to be resized."""
    blocks, _ = example_picture(CONFIG.image_size, 3, 5)
    whole = blocks.numpy().astype(np.uint8)
    return [whole[0][:96], whole[1][:, :80], np.ascontiguousarray(whole[2])]


def in_torch(runtime: deixis.Model, picture: np.ndarray, **options: object) -> DenseCaptions:
    model = make_model()
    assert model.box_decoder is not None
    threshold = TASKS["dense_captions"]["score_threshold"]
    model.box_decoder.config = dataclasses.replace(SMALL, score_threshold=threshold)
    image, geometry = prepare(picture, runtime.manifest.image)
    task = runtime.manifest.tasks["dense_captions"]
    context = torch.tensor(runtime.pipeline.context_ids(task))
    with torch.inference_mode():
        valid = torch.tensor([geometry.valid], dtype=torch.float32)
        features = model.features(model.encode_image(torch.from_numpy(image)[None].float(), valid))
        return dense_captions(model, features, context, task.max_length, **options)  # type: ignore[arg-type]


def words_of(tokens: np.ndarray) -> tuple[int, ...]:
    """Ids [L] up to the first EOS, without BOS and the last place."""
    ids = tokens[1:-1].tolist()
    return tuple(ids[: ids.index(CONFIG.end_token_id)] if CONFIG.end_token_id in ids else ids)


@pytest.mark.parametrize(("beams", "join"), [(1, False), (1, True), (3, False), (3, True)])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_described_objects_are_those_of_torch(
    runtime: deixis.Model, pictures: list[np.ndarray], which: int, beams: int, join: bool
) -> None:
    scene = runtime.encode(pictures[which])
    found = scene.dense_captions(join_scores=join, options=deixis.DecodeOptions(beams=beams))
    wanted = in_torch(runtime, pictures[which], beams=beams, join_scores=join)
    height, width = scene.size
    boxes = scene.geometry.to_original(wanted.boxes[0].numpy().reshape(-1, 2, 2)).clip((0, 0), (width, height))
    boxes, scores = boxes.reshape(-1, 4), wanted.scores[0].numpy()
    expected = [
        (boxes[i], scores[i], words_of(wanted.tokens[0, i].numpy()), float(wanted.log_probs[0, i]))
        for i in np.argsort(-scores, kind="stable")
        if scores[i] > 0 and (boxes[i, 2:] > boxes[i, :2]).all()
    ]
    # With joined beams `max_detections` pairs come out, here of boxes inside the picture only, there of all boxes.
    assert len(expected) > 3
    assert len(found) == (SMALL.max_detections if join and beams > 1 else len(expected))
    for mine, (box, score, ids, log_prob) in zip(found, expected, strict=False):
        np.testing.assert_allclose(mine.box, box, atol=1e-2)
        assert mine.score == pytest.approx(score, abs=1e-4) and mine.ids == ids
        assert mine.caption_score == pytest.approx(log_prob, abs=1e-3)
        assert all(word.points is None for word in mine.words)


def test_several_pictures_equal_one_at_a_time(runtime: deixis.Model, pictures: list[np.ndarray]) -> None:
    scenes = runtime.encode(pictures)
    for options in (deixis.DecodeOptions(), deixis.DecodeOptions(beams=2)):
        together = runtime.dense_captions_batch(scenes, join_scores=True, options=options)
        for scene, many in zip(scenes, together, strict=True):
            one = scene.dense_captions(join_scores=True, options=options)
            assert [c.ids for c in many] == [c.ids for c in one]
            np.testing.assert_allclose([c.box for c in many], [c.box for c in one], atol=1e-2)
            np.testing.assert_allclose([c.score for c in many], [c.score for c in one], atol=1e-5)


def test_the_manifest_says_how_to_detect(detecting: Bundle) -> None:
    manifest = open_bundle(detecting.path).manifest
    assert manifest.format.version == "1.3"
    spec, task = manifest.detection, manifest.tasks["dense_captions"]
    assert spec is not None and (spec.proposals, spec.max_detections, spec.join_scores) == (40, 12, False)
    assert spec.score_threshold == 0.02 and task.max_length == 9
    assert task.instruction == "an object of " and task.beams == 1
    assert {"graph/box_proposals", "graph/box_refine", "chain/detections"} <= set(manifest.parity)
    assert manifest.parity["chain/detections"].error == 0
    first, second = manifest.graphs["box_proposals"], manifest.graphs["box_refine"]
    levels = ["p3", "p4", "p5", "p6", "p7"]
    assert set(first.outputs) == {*levels, "heatmap", "boxes"} and set(second.inputs) == {*levels, "boxes"}
    assert all(first.outputs[level].shape == second.inputs[level].shape for level in levels)
    places = sum(int(first.outputs[level].shape[2]) ** 2 for level in levels)
    assert first.outputs["boxes"].shape == ("B", places, 4)
    assert second.inputs["boxes"].shape == ("B", "O", 4) and manifest.dims["O"].max == 40


def test_the_command_line(
    detecting: Bundle, pictures: list[np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_image(tmp_path / "picture.png", pictures[0])
    on_cpu = ("--bundle", str(detecting.path), "--device", "cpu")
    drawn = tmp_path / "drawn.png"
    line = ["dense-caption", str(tmp_path / "picture.png"), *on_cpu, "--limit", "4", "--json", "-", "--overlay", drawn]
    assert main([str(word) for word in line]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 4 and drawn.stat().st_size > 1000
    assert main(["verify", str(detecting.path), "--device", "cpu"]) == 0
    assert "box_refine deltas" in capsys.readouterr().out


def test_settings_of_a_checkpoint() -> None:
    chosen = {"dense_captions": {"join_scores": True, "max_detections": 7, "beams": 2}}
    assert task_table(CONFIG, chosen)["dense_captions"].beams == 2
    spec = detection_spec(CONFIG, chosen)
    assert spec is not None and spec.join_scores and spec.max_detections == 7 and spec.proposals == 40
    with pytest.raises(ExportError, match=r"task 'dense_captions': unknown field 'nms'; known are .*join_scores"):
        task_table(CONFIG, {"dense_captions": {"nms": 1}})
    with pytest.raises(ExportError, match="task 'caption': unknown field 'join_scores'"):
        task_table(CONFIG, {"caption": {"join_scores": True}})


def test_without_a_detector_nothing_changes() -> None:
    assert detection_spec(TINY) is None
    with pytest.raises(ExportError, match="'dense_captions', which this model has not"):
        task_table(TINY, {"dense_captions": {}})


def test_lost_detections_are_counted_on_both_sides() -> None:
    boxes = torch.tensor([[[10.0, 10, 50, 50], [60, 60, 90, 90], [0, 0, 0, 0]]])
    scores = torch.tensor([[0.9, 0.5, 0.0]])
    wanted = TorchDetections(boxes, scores, (scores > 0).sum(dim=1))
    same = [Detections(boxes[0].numpy(), scores[0].numpy())]
    assert lost_detections(same, wanted, 100) == 0
    moved = boxes[0].numpy().copy()
    moved[1, 0] += 5
    assert lost_detections([Detections(moved, scores[0].numpy())], wanted, 100) == 0.5
    assert lost_detections([Detections(moved * 0, scores[0].numpy() * 0)], wanted, 100) == 1


def test_graphs_are_standard_and_take_any_number_of_boxes(detecting: Bundle) -> None:
    model = make_model()
    specs = graph_specs(model)
    for sizes in (Sizes(1, 1, 1, 2, 3, 1, 2, 3, position=1, O=1), Sizes(3, 1, 1, 2, 3, 1, 2, 3, position=1, O=40)):
        cases = make_cases(model, sizes, seed=4)
        for role in ("box_proposals", "box_refine"):
            expected = {name: value.numpy() for name, value in run_torch(specs[role], model, cases[role]).items()}
            path = detecting.file(detecting.manifest.graphs[role].file)
            assert {node.domain for node in onnx.load(path).graph.node} == {""}
            with GraphSession(path, threads=1) as session:
                found = session.run({name: value.numpy() for name, value in cases[role].items()})
            assert relative_error(found, expected) < 1e-4, role
