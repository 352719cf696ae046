"""The detector of dense captioning: golden vectors, and its irregular parts against plain loops.

Stage by stage it is compared with the reference in `tests/parity/test_parity_boxes.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from box_decoders import GOLDEN, SMALL, STRIDES, close, golden, golden_model, small_decoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deixis_train.loaders.flax import load_flax, name_table, read_flax
from deixis_train.losses.boxes import encode_deltas, pairwise_iou
from deixis_train.models.box_decoder import BoxDecoder
from deixis_train.models.box_decoder.box_decoder import nominal_strides
from deixis_train.models.box_decoder.dense_captions import dense_captions, rank_beams, score_with_caption
from deixis_train.models.box_decoder.proposals import nms, peaks, suppress
from deixis_train.models.box_decoder.roi import apply_deltas, roi_align, roi_levels
from deixis_train.models.config import PRESETS, PixelLLMConfig
from deixis_train.models.decoding import begin_tokens, greedy
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import corner_prompt


@pytest.fixture(scope="module")
def model() -> PixelLLM:
    return golden_model()


@pytest.fixture(scope="module")
def decoder(model: PixelLLM) -> BoxDecoder:
    assert model.box_decoder is not None
    return model.box_decoder


@pytest.fixture(scope="module")
def features(model: PixelLLM) -> Tensor:
    pictures = golden("preprocess")
    with torch.no_grad():
        return model.features(model.encode_image(pictures["image"].float(), pictures["image_shape"]))


# ---- golden vectors


@torch.no_grad()
def test_features_to_detections(decoder: BoxDecoder) -> None:
    data = golden("box_decoder")
    found = decoder(data["features"])
    close(found.boxes, data["detection_boxes"])
    close(found.scores, data["detection_scores"])
    assert found.num_detections.tolist() == data["num_detections"].tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("greedy", {}),
        ("greedy_mult", {"join_scores": True}),
        ("beam_mult", {"join_scores": True, "beams": 3}),
    ],
)
def test_pictures_to_described_boxes(model: PixelLLM, features: Tensor, name: str, options: dict) -> None:
    data = golden(f"e2e_densecap_{name}")
    found = dense_captions(model, features, data["in_context_tokens"][0, 0].long(), 14, **options)
    assert torch.equal(found.tokens, data["out_text_tokens"].long())
    close(found.boxes, data["out_detection_boxes"], 2e-3)
    close(found.scores, data["out_detection_scores"], 2e-3)
    assert found.num_detections.tolist() == data["out_num_detections"].tolist()
    if "out_log_probs" in data:
        close(found.log_probs, data["out_log_probs"], 2e-3)


def test_every_parameter_has_a_published_name(model: PixelLLM) -> None:
    mine = {name for name in model.state_dict() if name.startswith("box_decoder.")}
    table = {e.target: e.sources for e in name_table(model) if e.target.startswith("box_decoder.")}
    assert set(table) == mine
    published = {name for name in read_flax(GOLDEN / "params.npz") if name.startswith("box_decoder/")}
    assert {source for sources in table.values() for source in sources} == published


def test_a_model_without_a_detector(model: PixelLLM) -> None:
    without = PixelLLM(dataclasses.replace(model.config, box_decoder=None))
    report = load_flax(without, read_flax(GOLDEN / "params.npz"))
    assert report.complete and not report.unexpected
    assert report.ignored and all(name.startswith("box_decoder/") for name in report.ignored)
    with pytest.raises(ValueError, match="no box decoder"):
        without.detect(torch.zeros(1, 9, 9, 96))


def test_a_detector_changes_no_other_start_value() -> None:
    torch.manual_seed(5)
    without = PixelLLM(PRESETS["tiny"]).state_dict()
    torch.manual_seed(5)
    state = PixelLLM(dataclasses.replace(PRESETS["tiny"], box_decoder=SMALL)).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in without.items())


@pytest.mark.parametrize(
    ("image_size", "grid", "finest"), [(384, 27, 8), (128, 9, 8), (512, 36, 8), (512, 32, 8), (512, 16, 16)]
)
def test_strides_fit_the_grid(image_size: int, grid: int, finest: int) -> None:
    strides = nominal_strides(image_size, grid)
    assert strides == tuple(finest << level for level in range(5))
    assert image_size <= strides[1] * grid < 1.5 * image_size  # the places reach over the whole picture


def test_configuration_survives_json() -> None:
    config = dataclasses.replace(PRESETS["tiny"], box_decoder=SMALL)
    assert PixelLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# ---- peaks and suppression


def brute_force_nms(boxes: list[list[int]], threshold: float, limit: int) -> list[int]:
    kept: list[int] = []
    for i, (ax, ay, bx, by) in enumerate(boxes):
        if max(ax, ay, bx, by) <= 0 or len(kept) == limit:
            continue
        for j in kept:
            cx, cy, dx, dy = boxes[j]
            shared = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
            union = (bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - shared
            if shared / (union + 1e-8) >= threshold:
                break
        else:
            kept.append(i)
    return kept


# No ratio of small whole numbers comes near these, so rounding decides nothing; ties have a test of their own.
THRESHOLDS = [math.pi / 24, 1 / math.pi, math.pi / 6, math.sqrt(math.pi) / 2]
corner = st.integers(-6, 12)
side = st.integers(0, 12)
box = st.tuples(corner, corner, side, side).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])


@given(st.lists(box, min_size=1, max_size=24), st.sampled_from(THRESHOLDS), st.integers(1, 24))
@settings(max_examples=100, deadline=None)
def test_nms_is_the_plain_loop(boxes: list[list[int]], threshold: float, limit: int) -> None:
    kept = nms(torch.tensor(boxes, dtype=torch.float32), threshold, limit)
    assert kept.tolist() == brute_force_nms(boxes, threshold, limit)
    chosen = torch.tensor(boxes, dtype=torch.float32)[kept]
    overlap = pairwise_iou(chosen, chosen).fill_diagonal_(0)
    assert bool((overlap < threshold).all())


def test_iou_at_the_threshold_is_suppressed() -> None:
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2]])  # IoU exactly 1/2
    assert nms(boxes, 0.5, 2).tolist() == [0]
    assert nms(boxes, 0.51, 2).tolist() == [0, 1]


def test_slots_that_no_box_fills() -> None:
    boxes = torch.tensor([[[0.0, 0, 4, 4], [0, 0, 4, 4], [6, 6, 9, 9], [0, 1, 4, 4]]])
    found = suppress(boxes, torch.tensor([[0.9, 0.8, 0.7, 0.6]]), 0.7, 4)
    assert found.boxes[0].tolist() == [[0, 0, 4, 4], [6, 6, 9, 9], [0, 1, 4, 4], [0, 1, 4, 4]]
    torch.testing.assert_close(found.scores, torch.tensor([[0.9, 0.7, 0.0, 0.0]]))


def test_peaks_take_one_place_less_than_there_are_and_earlier_ones_on_ties() -> None:
    boxes = torch.arange(5.0)[None, :, None].expand(2, -1, 4)
    found, scores = peaks(boxes, torch.tensor([[0.0, 2, 0, -1, 2], [1, 1, 1, 1, 1]]), 1000)
    assert found[..., 0].tolist() == [[1, 4, 0, 2], [0, 1, 2, 3]]
    torch.testing.assert_close(scores[1], torch.tensor([1.0] * 4).sigmoid())


# ---- the second stage


def brute_force_roi_align(features: np.ndarray, box: np.ndarray) -> np.ndarray:
    """features [D, h, w], box in pixels of that map -> [7, 7, D]: every sample, every neighbour."""
    _, height, width = features.shape
    out = np.zeros((7, 7, len(features)))
    for row in range(7):
        for column in range(7):
            for sample in range(4):
                y = box[1] + (box[3] - box[1]) * (row + 0.25 + 0.5 * (sample // 2)) / 7 - 0.5
                x = box[0] + (box[2] - box[0]) * (column + 0.25 + 0.5 * (sample % 2)) / 7 - 0.5
                for j in (math.floor(y), math.floor(y) + 1):
                    for i in (math.floor(x), math.floor(x) + 1):
                        if 0 <= j < height and 0 <= i < width:
                            out[row, column] += features[:, j, i] * (1 - abs(y - j)) * (1 - abs(x - i)) / 4
    return out


def test_roi_align_is_the_plain_loop() -> None:
    rng = np.random.default_rng(3)
    maps = [rng.normal(size=(2, 3, side, side)).astype(np.float32) for side in (18, 9, 4, 2, 1)]
    corners = rng.uniform(-20, 150, (2, 12, 2, 2)).astype(np.float32)
    boxes = np.concatenate([corners.min(axis=2), corners.max(axis=2)], axis=-1)
    boxes[0, 0] = 0  # empty
    boxes[0, 1] = [0, 0, 128, 128]  # reaches past the map's last centre
    levels = rng.integers(3, 8, (2, 12))
    pyramid = [torch.from_numpy(m) for m in maps]
    found = roi_align(pyramid, torch.from_numpy(boxes), torch.from_numpy(levels), STRIDES)
    for picture in range(2):
        for i, level in enumerate(levels[picture]):
            want = brute_force_roi_align(maps[level - 3][picture], boxes[picture, i].astype(float) / 2**level)
            np.testing.assert_allclose(found[picture, i].numpy(), want, atol=2e-5)


def test_levels_follow_the_size_of_the_box() -> None:
    sides = torch.tensor([0.0, 3, 111, 113, 223, 225, 450, 900, 5000])
    boxes = torch.stack([torch.zeros_like(sides), torch.zeros_like(sides), sides, sides], dim=-1)
    assert roi_levels(boxes, STRIDES).tolist() == [3, 3, 3, 3, 3, 4, 5, 6, 7]
    assert torch.equal(roi_levels(2 * boxes, tuple(2 * stride for stride in STRIDES)), roi_levels(boxes, STRIDES))


@given(st.lists(st.floats(1, 100), min_size=8, max_size=8))
def test_deltas_and_back(values: list[float]) -> None:
    x = torch.tensor(values, dtype=torch.float64).reshape(2, 4)
    boxes = torch.cat([x[:, :2], x[:, :2] + x[:, 2:]], dim=1)
    if float((boxes[1, 2:] - boxes[1, :2]).div(boxes[0, 2:] - boxes[0, :2]).max()) < 60:  # growth is capped
        moved = apply_deltas(boxes[:1], encode_deltas(boxes[:1], boxes[1:]))
        torch.testing.assert_close(moved, boxes[1:], rtol=1e-5, atol=1e-4)


def test_growth_is_capped() -> None:
    moved = apply_deltas(torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[0.0, 0, 1000, 5 * math.log(3)]]))
    torch.testing.assert_close(moved, torch.tensor([[1 - 62.5, -2, 1 + 62.5, 4]]))


# ---- the whole


@torch.no_grad()
def test_a_batch_is_as_good_as_one_at_a_time() -> None:
    decoder = small_decoder(score_threshold=0.0)
    torch.nn.init.normal_(decoder.head.heatmap.weight, std=0.5)
    torch.nn.init.normal_(decoder.head.regression.weight, std=0.3)
    pictures = torch.randn(3, 9, 9, 8, generator=torch.Generator().manual_seed(1))
    together = decoder(pictures)
    assert int(together.num_detections.min()) > 3
    for i in range(3):
        alone = decoder(pictures[i : i + 1])
        torch.testing.assert_close(together.boxes[i], alone.boxes[0], rtol=0, atol=1e-2)
        torch.testing.assert_close(together.scores[i], alone.scores[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_boxes_that_score_too_little_and_empty_slots(decoder: BoxDecoder) -> None:
    data = golden("box_decoder")
    strict = BoxDecoder(dataclasses.replace(decoder.config, score_threshold=0.7, max_detections=70), 96, 128, 9)
    strict.load_state_dict(decoder.state_dict())
    found = strict(data["features"])
    enough = (data["detection_scores"] > 0.7).sum(dim=1)
    assert found.num_detections.tolist() == enough.tolist()
    for boxes, scores, count in zip(found.boxes, found.scores, enough, strict=True):
        assert bool((scores[:count] > 0.7).all())
        low, empty = scores[count:] == -1, scores[count:] == 0
        assert bool((low | empty).all()) and bool(low.any()) and bool(empty.any())
        assert bool((boxes[count:][empty] == 0).all()) and bool((boxes[count:][low].amax(dim=1) > 0).all())


@torch.no_grad()
def test_empty_slots_are_point_prompts(model: PixelLLM, decoder: BoxDecoder, features: Tensor) -> None:
    more_slots = dataclasses.replace(decoder.config, post_nms_test=3, max_detections=5)
    wide = PixelLLM(dataclasses.replace(model.config, box_decoder=more_slots)).eval()
    wide.load_state_dict(model.state_dict())
    found = dense_captions(wide, features[:1], None, 14)
    assert int((found.boxes[0].amax(dim=1) == 0).sum()) >= 2

    visual = wide.extract_prompt(features[:1], torch.zeros(1, dtype=torch.int64), *corner_prompt(torch.zeros(1, 4)))
    encoded, valid = wide.text.encode(visual)

    def logits(tokens: Tensor, position: int) -> Tensor:
        out, _ = wide.text.decode(tokens, encoded, valid)
        assert out is not None
        return out[:, position]

    tokens, log_probs = greedy(logits, begin_tokens(1, 14))
    assert torch.equal(found.tokens[0, 3:], tokens.expand(2, -1))
    torch.testing.assert_close(found.log_probs[0, 3:], log_probs.expand(2))


def test_scores_of_captions_join() -> None:
    scores = torch.tensor([[0.81, 0.25, -1.0]])
    joined = score_with_caption(scores, torch.tensor([[0.0, math.log(0.25), 0.0]]))
    torch.testing.assert_close(joined, torch.tensor([[0.9, 0.25, 0.0]]))


@given(st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_ranked_beams_are_the_best_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, beams = rng.integers(-1, 4, (1, 4)) / 4, np.log(rng.integers(1, 5, (1, 4, 3)) / 4)
    ranked = rank_beams(torch.tensor(scores), torch.tensor(beams), 7)
    pairs = [(-max(scores[0, i], 0) * np.exp(beams[0, i, k]), i, k) for i in range(4) for k in range(3)]
    want = sorted(pairs, key=lambda pair: (round(pair[0], 9), pair[1:]))[:7]
    np.testing.assert_allclose(ranked.scores[0].square(), [-value for value, _, _ in want], atol=1e-9)
    assert len({*zip(ranked.box[0].tolist(), ranked.beam[0].tolist(), strict=True)}) == 7


# ---- fit for export


class Dense(torch.nn.Module):
    def __init__(self, decoder: BoxDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        maps = self.decoder.dense(features)
        return (*maps.pyramid, maps.heatmap, maps.regression)


class Roi(torch.nn.Module):
    def __init__(self, decoder: BoxDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, p3: Tensor, p4: Tensor, p5: Tensor, p6: Tensor, p7: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        return self.decoder.roi([p3, p4, p5, p6, p7], boxes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_both_networks_are_graphs_of_standard_operators(decoder: BoxDecoder, tmp_path: Path) -> None:
    """Traced at one number of pictures and boxes, run at another, in plain onnxruntime."""
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")

    def through_graph(module: torch.nn.Module, example: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> list:
        path = tmp_path / f"{type(module).__name__}.onnx"
        names = [f"in{i}" for i in range(len(example))]
        axes = {name: {0: "B", 1: "N"} if x.ndim == 3 else {0: "B"} for name, x in zip(names, example, strict=True)}
        options = {"dynamo": False, "opset_version": 17, "input_names": names, "dynamic_axes": axes}
        torch.onnx.export(module, example, path, **options)
        graph = onnx.load(path)
        assert {node.domain for node in graph.graph.node} == {""}
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})

    data = golden("box_decoder")
    with torch.no_grad():
        found = through_graph(Dense(decoder), (data["features"],), (data["features"][:1],))
        maps = decoder.dense(data["features"])
        for got, want in zip(found, (*maps.pyramid, maps.heatmap, maps.regression), strict=True):
            close(torch.from_numpy(got), want[:1])

        boxes = data["proposal_boxes_clipped"]
        single = [level[:1] for level in maps.pyramid]
        found = through_graph(Roi(decoder), (*maps.pyramid, boxes), (*single, boxes[:1, :10]))
        close(torch.from_numpy(found[0]), data["roi_class_logits"][:1, :10])
        close(torch.from_numpy(found[1]), data["roi_box_deltas"][:1, :10])
