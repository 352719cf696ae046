"""Comparisons of dense object captioning: the box decoder stage by stage, and every `e2e_densecap_*.npz`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from deixis_export.parity.backend import Caption, Floats, Ids
from deixis_export.parity.context import Context, as_floats, part, rows, scores_of_filled
from deixis_export.parity.report import CHAIN_TOLERANCE, EXACT, MODULE_TOLERANCE, Array, GoldenFile, Report
from deixis_train.models.box_decoder import BoxDecoder, DenseMaps, Detections, Proposals
from deixis_train.models.box_decoder.dense_captions import RankedBeams, rank_beams, score_with_caption
from deixis_train.models.box_decoder.proposals import clip_boxes, peaks, suppress
from deixis_train.models.box_decoder.roi import roi_align, roi_levels
from deixis_train.models.decoding import begin_tokens
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import corner_prompt

LEVELS = 5


def box_decoder(context: Context, file: GoldenFile, report: Report) -> None:
    """Every stage on the reference's output of the stage before it."""

    def decoder(model: PixelLLM) -> BoxDecoder:
        return part(model.box_decoder, "box decoder")

    def given(name: str) -> Tensor:
        return as_floats(file[name])

    def of_levels(name: str) -> Tensor:
        """Channels-last maps of all levels -> [B, T, C]."""
        return torch.cat([given(f"{name}{level}").flatten(1, 2) for level in range(LEVELS)], dim=1)

    def pyramid() -> list[Tensor]:
        return [given(f"fpn{level}").permute(0, 3, 1, 2) for level in range(LEVELS)]

    def maps() -> DenseMaps:
        return DenseMaps(pyramid(), of_levels("heatmap")[..., 0], of_levels("box_reg"))

    def on_level(flat: Tensor, name: str) -> Tensor:
        """The part [B, T, C] -> [B, h, w, C] that the array `name` holds of all levels."""
        level = int(name[-1])
        sizes = [file[f"{name[:-1]}{i}"].shape[1] * file[f"{name[:-1]}{i}"].shape[2] for i in range(LEVELS)]
        return flat.split(sizes, dim=1)[level].reshape(file[name].shape)

    def found(model: PixelLLM) -> Detections:
        proposals = Proposals(given("proposal_boxes_clipped"), given("proposal_scores"))
        return decoder(model).finish(proposals, given("roi_class_logits"), given("roi_box_deltas"))

    def check(name: str, compute: Callable[[PixelLLM], Tensor], tolerance: float = MODULE_TOLERANCE) -> None:
        report.check(file, name, context.in_torch(compute), tolerance)

    check("image_shape", lambda m: torch.full(file["image_shape"].shape, float(decoder(m).image_size)), EXACT)
    for level in range(LEVELS):
        name = f"fpn{level}"
        check(name, lambda m, level=level: decoder(m).pyramid(given("features"))[level].permute(0, 2, 3, 1))
    for level in range(LEVELS):
        name = f"heatmap{level}"
        check(name, lambda m, name=name: on_level(decoder(m).head(pyramid())[0][..., None], name))
        name = f"box_reg{level}"
        check(name, lambda m, name=name: on_level(decoder(m).head(pyramid())[1], name))

    def found_peaks(model: PixelLLM) -> tuple[Tensor, Tensor]:
        return peaks(decoder(model).boxes(maps()), maps().heatmap, decoder(model).config.pre_nms_test)

    check("peak_scores", lambda m: found_peaks(m)[1])
    check("peak_boxes", lambda m: as_floats(in_order_of(found_peaks(m)[0].numpy(), file["peak_boxes"])))

    def proposals(model: PixelLLM) -> Proposals:
        config = decoder(model).config
        return suppress(given("peak_boxes"), given("peak_scores"), config.proposal_iou, config.post_nms_test)

    check("proposal_boxes", lambda m: proposals(m).boxes)
    check("proposal_scores", lambda m: proposals(m).scores)
    check("proposal_boxes_clipped", lambda m: clip_boxes(given("proposal_boxes"), decoder(m).image_size))

    def first_boxes() -> Tensor:
        return given("proposal_boxes_clipped")[:, : file["roi_level_first6"].shape[1]]

    check("roi_level_first6", lambda m: roi_levels(first_boxes(), decoder(m).strides), EXACT)
    check(
        "roi_align_first6",
        lambda m: roi_align(pyramid(), first_boxes(), given("roi_level_first6").long(), decoder(m).strides),
    )
    check("roi_class_logits", lambda m: decoder(m).roi(pyramid(), given("proposal_boxes_clipped"))[0])
    check("roi_box_deltas", lambda m: decoder(m).roi(pyramid(), given("proposal_boxes_clipped"))[1])
    check("detection_boxes", lambda m: found(m).boxes)
    check("detection_scores", lambda m: found(m).scores)
    check("detection_classes", lambda m: torch.ones_like(found(m).scores), EXACT)  # there is one class
    check("num_detections", lambda m: found(m).num_detections, EXACT)


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
    """One run from pictures to described boxes, computed as far as it is asked for. Arrays are [B, N, ...].

    Exported graphs have no detector: there the reference's boxes prompt, and what depends on scores is torch-only.
    """

    def __init__(self, context: Context, file: GoldenFile) -> None:
        self._context, self._file = context, file
        self.shape = file["out_prompt_boxes"].shape[:2]
        self._joins_scores = "mult" in file.name
        self._beams = context.values.get("beam_size", 1) if "beam" in file.name else 1

    def grid(self, array: Array) -> Array:
        """[B * N, ...] -> [B, N, ...]."""
        return array.reshape(*self.shape, *array.shape[1:])

    @cached_property
    def found(self) -> Detections:
        features = self._context.images.features
        assert features is not None
        with torch.inference_mode():
            return part(self._context.model.box_decoder, "box decoder")(as_floats(features))

    @property
    def prompt_boxes(self) -> Floats:
        if self._context.backend.model is None:
            return self._file["out_prompt_boxes"]
        return self.found.boxes.numpy()

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
    def _ranked(self) -> RankedBeams | None:
        """What came of joining scores with those of beams; None where the order of the boxes stays."""
        if not self._joins_scores or self._beams == 1:
            return None
        return rank_beams(self.found.scores, as_floats(self.grid(self.caption.scores)), self.shape[1])

    def _picked(self, array: Array) -> Array:
        """Values of boxes [B, N, ...] in the order of the outcome."""
        if self._ranked is None:
            return array
        return array[np.arange(len(array))[:, None], self._ranked.box.numpy()]

    @property
    def visual(self) -> Array:
        return self._picked(self.grid(self._visual_rows))

    @property
    def tokens(self) -> Array:
        tokens = self._picked(self.grid(self.caption.tokens))
        if self._ranked is None:
            return tokens[:, :, -1]
        return np.take_along_axis(tokens, self._ranked.beam.numpy()[:, :, None, None], axis=2)[:, :, 0]

    @property
    def boxes(self) -> Array:
        return self._picked(self.found.boxes.numpy())

    @property
    def scores(self) -> Array:
        if self._ranked is not None:
            return self._ranked.scores.numpy()
        if self._joins_scores:
            return score_with_caption(self.found.scores, as_floats(self.grid(self.caption.scores)[:, :, 0])).numpy()
        return self.found.scores.numpy()


def dense_chain(context: Context, file: GoldenFile, report: Report) -> None:
    """Every output of one end-to-end file of dense captioning."""
    run = DenseChain(context, file)
    computed = {
        "out_prompt_boxes": (context.torch_only(lambda: run.prompt_boxes), CHAIN_TOLERANCE),
        "out_prompt_point_coords": (context.torch_only(lambda: run.corner_points), CHAIN_TOLERANCE),
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
