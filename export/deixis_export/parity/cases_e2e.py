"""Comparisons of the whole chain, picture to words with pixels: every `e2e_*.npz` but dense captioning.

What a file asks for follows from its arrays and its name: `in_text_tokens` is a teacher-forced run; `in_boxes` is
location captioning, which reads no points; `pointprompt` gives boxes as corner points; `referring` reads the position
before EOS.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from deixis_export.parity.backend import Caption, Floats, Ids, TextPass
from deixis_export.parity.context import Context, as_floats, as_ids, emitted, rows, scores_of_filled
from deixis_export.parity.report import CHAIN_TOLERANCE, EXACT, Array, GoldenFile, Report
from deixis_train.models.decoding import begin_tokens, zero_after_end
from deixis_train.models.point_head import points_to_box, to_pixels, valid_tokens
from deixis_train.models.prompt_encoder import corner_prompt
from deixis_train.tasks import REFER_RULE, TRACE_RULE

Compute = Callable[[], Array]


class Chain:
    """One end-to-end run, computed as far as it is asked for. Arrays are [B * N, ...] unless said otherwise."""

    def __init__(self, context: Context, file: GoldenFile) -> None:
        self._context, self._file = context, file
        self.teacher_forced = "in_text_tokens" in file
        self.reads_points = "out_point_coords" in file
        self._refers = "referring" in file.name
        self._begin, self._end = context.decoding(1).begin_id, context.decoding(1).end_id

    @property
    def box_grid(self) -> Floats:
        """[B, N, 4]."""
        return self._file["in_boxes" if "in_boxes" in self._file else "in_prompt_boxes"]

    def grid(self, array: Array) -> Array:
        """[B * N, ...] -> [B, N, ...]."""
        return array.reshape(*self.box_grid.shape[:2], *array.shape[1:])

    @property
    def boxes(self) -> Floats:
        return self.box_grid.reshape(-1, 4)

    @property
    def image_index(self) -> Ids:
        images, prompts = self.box_grid.shape[:2]
        return np.repeat(np.arange(images), prompts)

    @property
    def context_ids(self) -> Ids | None:
        return rows(self._file["in_context_tokens"]) if "in_context_tokens" in self._file else None

    @cached_property
    def visual(self) -> Floats:
        as_points = "pointprompt" in self._file.name or self._context.values.get("prompt_use_box_rate", 1.0) <= 0
        return self._context.backend.extract_prompts(self._context.images, self.image_index, self.boxes, as_points)

    @cached_property
    def caption(self) -> Caption:
        length = self._file["out_text_tokens"].shape[-1]
        beams = self._file["out_beam_text_tokens"].shape[2] if "out_beam_text_tokens" in self._file else 1
        per_node = re.search(r"pnb(\d+)", self._file.name)
        decoding = self._context.decoding(beams, int(per_node[1]) if per_node else None)
        return self._context.backend.caption(self.visual, self.context_ids, length, decoding)

    @cached_property
    def tokens(self) -> Ids:
        """[B * N, L]; zeroed behind the first EOS where points are read."""
        if self.teacher_forced:
            return rows(self._file["in_text_tokens"])
        best = self.caption.tokens[:, -1]
        return zero_after_end(as_ids(best), self._end).numpy() if self.reads_points else best

    @cached_property
    def text_pass(self) -> TextPass:
        return self._context.backend.text_pass(self.visual, self.context_ids, self.tokens)

    def pixels(self, fractions: Floats | None) -> Floats:
        """Points [B * N, L, P, 2] as fractions -> pixels of the padded input."""
        size = self._context.valid_hw[self.image_index]
        return to_pixels(as_floats(emitted(fractions)), as_floats(size)).numpy()

    @cached_property
    def valid(self) -> Array:
        """Positions whose points count [B * N, L] bool."""
        rule = REFER_RULE if self._refers else TRACE_RULE
        return valid_tokens(as_ids(self.tokens), rule, self._begin, self._end).numpy()

    @cached_property
    def detection_boxes(self) -> Floats:
        if not self.reads_points:
            return self.boxes
        points = as_floats(self.pixels(self.text_pass.points))
        return points_to_box(points, torch.tensor(self.valid)).numpy()

    @cached_property
    def masks(self) -> tuple[Floats, Floats]:
        return self._context.backend.masks(
            self._context.images, self.image_index, self.detection_boxes, self.visual, self.text_pass.features
        )

    @property
    def corner_points(self) -> Array:
        """The boxes as corner points [B * N, 4, 2]."""
        return corner_prompt(as_floats(self.boxes))[0][:, :4].numpy()

    @property
    def begin(self) -> Array:
        length = self._file["out_begin_tokens"].shape[-1]
        return begin_tokens(len(self.boxes), length, self._begin, self._end).numpy()


def chain(context: Context, file: GoldenFile, report: Report) -> None:
    """Every output of one end-to-end file."""
    run = Chain(context, file)
    # What a file repeats of its inputs, or follows from them without the model: it says nothing about exported graphs.
    given: dict[str, tuple[Compute, float]] = {
        "out_begin_tokens": (lambda: run.begin, EXACT),
        "out_context_tokens": (lambda: rows(file["in_context_tokens"]), EXACT),
        "out_prompt_point_coords": (lambda: run.corner_points, CHAIN_TOLERANCE),
        "out_detection_scores": (lambda: np.ones(len(run.boxes)), CHAIN_TOLERANCE),  # given boxes, not detected ones
    }
    computed: dict[str, tuple[Compute, float]] = {
        "out_visual_features": (lambda: run.visual, CHAIN_TOLERANCE),
        "out_text_tokens": (lambda: run.tokens, EXACT),
        "out_log_probs": (lambda: run.caption.scores[:, -1], CHAIN_TOLERANCE),
        "out_beam_text_tokens": (lambda: run.caption.tokens, EXACT),
        "out_beam_log_probs": (lambda: run.caption.scores, CHAIN_TOLERANCE),
        "out_point_coords": (lambda: run.pixels(run.text_pass.points), CHAIN_TOLERANCE),
        "out_point_logits": (lambda: emitted(run.text_pass.spare), CHAIN_TOLERANCE),
        "out_point_valid_mask": (lambda: run.valid, EXACT),
        "out_detection_boxes": (lambda: run.detection_boxes, CHAIN_TOLERANCE),
        "out_detection_masks": (lambda: run.masks[0], CHAIN_TOLERANCE),
        "out_iou_predictions": (lambda: run.masks[1], CHAIN_TOLERANCE),
    }
    if run.teacher_forced:
        given |= {name: computed.pop(name) for name in ("out_text_tokens", "out_point_valid_mask")}
    if not run.reads_points:
        given["out_detection_boxes"] = computed.pop("out_detection_boxes")

    for name in file:
        view = scores_of_filled if name == "out_beam_log_probs" else None
        if name in computed:
            compute, tolerance = computed[name]
            report.check(file, name, lambda compute=compute: run.grid(compute()), tolerance, view)
        elif name in given:
            compute, tolerance = given[name]
            report.check(file, name, context.torch_only(lambda compute=compute: run.grid(compute())), tolerance)
    if run.reads_points and not run.teacher_forced and "out_point_valid_mask" in file:
        words = file["out_point_valid_mask"] > 0
        report.check(
            file,
            "out_point_coords",
            lambda: run.grid(run.pixels(run.caption.points)),
            CHAIN_TOLERANCE,
            view=lambda array: array[words],
            label=" (while decoding)",
        )


CASES: dict[str, Callable[[Context, GoldenFile, Report], None]] = {
    "e2e_caption_*.npz": chain,
    "e2e_pointprompt_*.npz": chain,
    "e2e_loca_*.npz": chain,
    "e2e_referring*.npz": chain,
    "e2e_trace_*.npz": chain,
}
