"""Comparisons of dense object captioning: the box decoder stage by stage, and every `e2e_densecap_*.npz`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property

import numpy as np
from torch import Tensor

from deixis_export.parity.backend import Caption, Detector, Floats, Ids
from deixis_export.parity.context import Context, as_floats, as_ids, part, rows, scores_of_filled
from deixis_export.parity.report import CHAIN_TOLERANCE, EXACT, MODULE_TOLERANCE, Array, GoldenFile, Report
from deixis_train.losses.detection import STRIDES, locations
from deixis_train.models.box_decoder import BoxDecoder
from deixis_train.models.box_decoder.roi import roi_align, roi_levels
from deixis_train.models.decoding import begin_tokens
from deixis_train.models.prompt_encoder import corner_prompt

LEVELS = 5


def detector_of(context: Context) -> Detector:
    return part(context.backend.detector, "box decoder")


def box_decoder(context: Context, file: GoldenFile, report: Report) -> None:
    """Every stage on the reference's output of the stage before it; the head on what our pyramid gives.

    What graphs keep inside is compared in PyTorch only: RoIAlign, and the level of each box.
    """

    def given(name: str) -> Floats:
        return file[name].astype(np.float32)

    def sizes() -> list[tuple[int, int]]:
        return [file[f"heatmap{level}"].shape[1:3] for level in range(LEVELS)]

    def pyramid() -> list[Floats]:
        return [np.ascontiguousarray(np.moveaxis(given(f"fpn{level}"), 3, 1)) for level in range(LEVELS)]

    def of_levels(name: str) -> Floats:
        """Channels-last maps of all levels -> [B, A, C]."""
        maps = [given(f"{name}{level}") for level in range(LEVELS)]
        return np.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in maps], axis=1)

    def on_level(flat: Floats, name: str) -> Floats:
        """The part [B, A, C] -> [B, h, w, C] that the array `name` holds of all levels."""
        level, ends = int(name[-1]), np.cumsum([height * width for height, width in sizes()])
        start = ends[level - 1] if level else 0
        return flat[:, start : ends[level]].reshape(file[name].shape)

    strides = context.values.get("box_decoder", {}).get("strides", STRIDES)
    places, steps, _ = (x.numpy() for x in locations(sizes(), strides))
    steps = steps[:, None]

    def boxes_of(regression: Floats) -> Floats:
        """Distances [B, A, 4] in strides -> boxes [B, A, 4]."""
        return np.concatenate([places - regression[..., :2] * steps, places + regression[..., 2:] * steps], axis=-1)

    def regression_of(boxes: Floats) -> Floats:
        reach: Floats = np.concatenate([places - boxes[..., :2], boxes[..., 2:] - places], axis=-1)
        return (reach / steps).astype(np.float32)

    def check(name: str, compute: Callable[[Detector], Array], tolerance: float = MODULE_TOLERANCE) -> None:
        report.check(file, name, lambda: compute(detector_of(context)), tolerance)

    def in_torch(name: str, compute: Callable[[BoxDecoder], Tensor], tolerance: float = MODULE_TOLERANCE) -> None:
        report.check(
            file, name, context.in_torch(lambda model: compute(part(model.box_decoder, "box decoder"))), tolerance
        )

    far = np.full((1, 4), np.inf, np.float32)
    check("image_shape", lambda d: np.full(file["image_shape"].shape, d.clip(far)[0, 0]), EXACT)
    first = cache(lambda: detector_of(context).dense(given("features")))
    for level in range(LEVELS):
        name = f"fpn{level}"
        check(name, lambda _, level=level: np.moveaxis(first()[0][level], 1, 3))
    for level in range(LEVELS):
        name = f"heatmap{level}"
        check(name, lambda _, name=name: on_level(first()[1][..., None], name))
        name = f"box_reg{level}"
        check(name, lambda _, name=name: on_level(regression_of(first()[2]), name))

    def found_peaks(detector: Detector) -> tuple[Floats, Floats]:
        return detector.peaks(boxes_of(of_levels("box_reg")), of_levels("heatmap")[..., 0])

    check("peak_scores", lambda d: found_peaks(d)[1])
    check("peak_boxes", lambda d: in_order_of(found_peaks(d)[0], file["peak_boxes"]))
    check("proposal_boxes", lambda d: d.propose(given("peak_boxes"), given("peak_scores"))[0])
    check("proposal_scores", lambda d: d.propose(given("peak_boxes"), given("peak_scores"))[1])
    check("proposal_boxes_clipped", lambda d: d.clip(given("proposal_boxes")))

    def first_boxes() -> Tensor:
        return as_floats(file["proposal_boxes_clipped"])[:, : file["roi_level_first6"].shape[1]]

    def aligned(decoder: BoxDecoder) -> Tensor:
        levels = as_ids(file["roi_level_first6"])
        return roi_align([as_floats(x) for x in pyramid()], first_boxes(), levels, decoder.strides)

    in_torch("roi_level_first6", lambda d: roi_levels(first_boxes(), d.strides), EXACT)
    in_torch("roi_align_first6", aligned)
    judged = cache(lambda: detector_of(context).refine(pyramid(), given("proposal_boxes_clipped")))
    check("roi_class_logits", lambda _: judged()[0])
    check("roi_box_deltas", lambda _: judged()[1])

    def found(detector: Detector) -> tuple[Floats, Floats]:
        proposals = given("proposal_boxes_clipped"), given("proposal_scores")
        return detector.finish(*proposals, given("roi_class_logits"), given("roi_box_deltas"))

    check("detection_boxes", lambda d: found(d)[0])
    check("detection_scores", lambda d: found(d)[1])
    check("detection_classes", lambda d: np.ones_like(found(d)[1]), EXACT)  # there is one class
    check("num_detections", lambda d: (found(d)[1] > 0).sum(axis=1), EXACT)


def in_order_of(boxes: Array, reference: Array) -> Array:
    """Boxes [B, N, 4] in the order of the nearest ones of a reference [B, N, 4].

    Boxes of nearly equal scores may swap, so they are compared as a set. Where the nearest ones are no permutation,
    the order stays as it was, and the comparison fails.
    """
    if boxes.shape != reference.shape:
        return boxes
    out = boxes.copy()
    for picture, wanted in enumerate(reference):
        nearest = np.abs(boxes[picture][None] - wanted[:, None]).max(axis=2).argmin(axis=1)
        if len(set(nearest)) == len(nearest):
            out[picture] = boxes[picture][nearest]
    return out


class DenseChain:
    """One run from pictures to described boxes, computed as far as it is asked for. Arrays are [B, N, ...]."""

    def __init__(self, context: Context, file: GoldenFile) -> None:
        self._context, self._file = context, file
        self.shape = file["out_prompt_boxes"].shape[:2]
        self._joins_scores = "mult" in file.name
        self._beams = context.values.get("beam_size", 1) if "beam" in file.name else 1

    def grid(self, array: Array) -> Array:
        """[B * N, ...] -> [B, N, ...]."""
        return array.reshape(*self.shape, *array.shape[1:])

    @cached_property
    def _found(self) -> tuple[Floats, Floats]:
        """Boxes [B, N, 4] and scores [B, N] of the detector, in its own order."""
        features = self._context.images.features
        assert features is not None
        return detector_of(self._context).detect(features)

    @property
    def prompt_boxes(self) -> Floats:
        return self._found[0]

    @property
    def corner_points(self) -> Array:
        return self.grid(corner_prompt(as_floats(rows_of(self.prompt_boxes)))[0][:, :4].numpy())

    @property
    def context_ids(self) -> Ids:
        """The instruction of each box, [B, N, C]: of the rows given, as many as there are boxes."""
        return self._file["in_context_tokens"][:, : self.shape[1]]

    @property
    def begin(self) -> Array:
        decoding = self._context.decoding(1)
        length = self._file["out_begin_tokens"].shape[-1]
        return self.grid(
            begin_tokens(self.shape[0] * self.shape[1], length, decoding.begin_id, decoding.end_id).numpy()
        )

    @cached_property
    def _visual_rows(self) -> Floats:
        image_index = np.repeat(np.arange(self.shape[0]), self.shape[1])
        as_points = self._context.values.get("prompt_use_box_rate", 1.0) <= 0
        return self._context.backend.extract_prompts(
            self._context.images, image_index, rows_of(self.prompt_boxes), as_points
        )

    @cached_property
    def caption(self) -> Caption:
        length = self._file["out_text_tokens"].shape[-1]
        decoding = self._context.decoding(self._beams)
        return self._context.backend.caption(self._visual_rows, rows(self.context_ids), length, decoding)

    @cached_property
    def _ranked(self) -> tuple[Floats, Ids, Ids] | None:
        """What came of joining scores with those of beams; None where the order of the boxes stays."""
        if not self._joins_scores or self._beams == 1:
            return None
        return detector_of(self._context).rank(self._found[1], self.grid(self.caption.scores), self.shape[1])

    def _picked(self, array: Array) -> Array:
        """Values of boxes [B, N, ...] in the order of the outcome."""
        if self._ranked is None:
            return array
        return array[np.arange(len(array))[:, None], self._ranked[1]]

    @property
    def visual(self) -> Array:
        return self._picked(self.grid(self._visual_rows))

    @property
    def tokens(self) -> Array:
        tokens = self._picked(self.grid(self.caption.tokens))
        if self._ranked is None:
            return tokens[:, :, -1]
        return np.take_along_axis(tokens, self._ranked[2][:, :, None, None], axis=2)[:, :, 0]

    @property
    def boxes(self) -> Array:
        return self._picked(self.prompt_boxes)

    @property
    def scores(self) -> Array:
        if self._ranked is not None:
            return self._ranked[0]
        if self._joins_scores:
            return detector_of(self._context).join(self._found[1], self.grid(self.caption.scores)[:, :, 0])
        return self._found[1]


def dense_chain(context: Context, file: GoldenFile, report: Report) -> None:
    """Every output of one end-to-end file of dense captioning."""
    run = DenseChain(context, file)
    computed = {
        "out_prompt_boxes": (lambda: run.prompt_boxes, CHAIN_TOLERANCE),
        "out_prompt_point_coords": (lambda: run.corner_points, CHAIN_TOLERANCE),
        "out_context_tokens": (context.torch_only(lambda: run.context_ids), EXACT),
        "out_begin_tokens": (context.torch_only(lambda: run.begin), EXACT),
        "out_visual_features": (lambda: run.visual, CHAIN_TOLERANCE),
        "out_text_tokens": (lambda: run.tokens, EXACT),
        "out_log_probs": (lambda: run.grid(run.caption.scores)[:, :, -1], CHAIN_TOLERANCE),
        "out_beam_text_tokens": (lambda: run.grid(run.caption.tokens), EXACT),
        "out_beam_log_probs": (lambda: run.grid(run.caption.scores), CHAIN_TOLERANCE),
        "out_detection_boxes": (lambda: run.boxes, CHAIN_TOLERANCE),
        "out_detection_scores": (lambda: run.scores, CHAIN_TOLERANCE),
        "out_detection_classes": (lambda: np.ones_like(run.scores), EXACT),
        "out_num_detections": (lambda: (run.scores > 0).sum(axis=1), EXACT),
    }
    for name in file:
        if name in computed:
            compute, tolerance = computed[name]
            view = scores_of_filled if name == "out_beam_log_probs" else None
            report.check(file, name, compute, tolerance, view)


def rows_of(boxes: Floats) -> Floats:
    """[B, N, 4] -> [B * N, 4]."""
    return boxes.reshape(-1, 4)


CASES = {"box_decoder.npz": box_decoder, "e2e_densecap_*.npz": dense_chain}
