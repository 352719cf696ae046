"""Comparisons of the metrics, and of the traces that they are held against. They say nothing about a backend:
predictions come from the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from deixis_export.parity.backend import Floats
from deixis_export.parity.context import Context
from deixis_export.parity.report import EXACT, MODULE_TOLERANCE, Array, GoldenFile, Report
from deixis_train.data.formats.localized_narratives import trace_of_utterances
from deixis_train.evaluation.boxes import pair_iou, precision_at_half, to_picture
from deixis_train.evaluation.dense_captions import Detections, Truth, dense_caption_map, merge_truth
from deixis_train.evaluation.masks import box_of_mask, mask_metrics, mask_of_logits, overlap
from deixis_train.evaluation.trace import lbm, lbm_chunks, point_l1

REFERRING_VALUES = {"out_seg_cIoU": "cIoU", "out_seg_gIoU": "gIoU", "out_seg_AP": "mask P@0.5"}


class _Checker:
    """`report.check` for values that are computed where PyTorch is checked, and only there."""

    def __init__(self, context: Context, file: GoldenFile, report: Report) -> None:
        self._context, self._file, self._report = context, file, report

    def __call__(self, name: str, compute: Callable[[], ArrayLike], tolerance: float = MODULE_TOLERANCE) -> None:
        run = self._context.torch_only(lambda: np.asarray(compute()))
        self._report.check(self._file, name, run, tolerance)


def local_bipartite_matching(context: Context, file: GoldenFile, report: Report) -> None:
    check = _Checker(context, file, report)
    for name in file:
        if match := re.fullmatch(r"(case\d+)/lbm_k(\d+)(_segments)?", name):
            score = lbm_chunks if match[3] else lbm
            case, k = match[1], int(match[2])
            check(name, lambda s=score, c=case, k=k: _number(s(file[f"{c}/pred"], file[f"{c}/gt"], k)))


def metrics(context: Context, file: GoldenFile, report: Report) -> None:
    check = _Checker(context, file, report)
    _referring(file, check)
    check("point/out_point_l1", lambda: _point_l1(file))
    _dense_captions(file, check)

    def to_original() -> Array:
        return _xywh(to_picture(file["boxes/in"], _pair(file["boxes/size"]), _pair(file["boxes/orig"])))

    check("boxes/out_xywh", to_original)

    def traces(index: int) -> Array:
        return trace_of_utterances(file["ln/trace_xyt"], file["ln/utt_start_end"])[index]

    for index, name in enumerate(("ln/out_center", "ln/out_bbox", "ln/out_points")):
        check(name, lambda index=index: traces(index))
    check("boxes/mask_to_box", lambda: box_of_mask(file["boxes/mask"] > 0))


def _referring(file: GoldenFile, check: _Checker) -> None:
    """P@0.5 of boxes, of masks and of the boxes around masks, over all expressions of all pictures."""
    pictures = sorted({name.split("_")[0] for name in file if name.startswith("ref/img")})

    def masks_of(picture: str) -> dict[int, Array]:
        sizes = _pair(file[f"{picture}_size"]), int(file["ref/padded_size"][0]), _pair(file[f"{picture}_orig_size"])
        logits = file[f"{picture}_det_masks"]
        return {int(i): mask_of_logits(one, *sizes) for i, one in zip(file[f"{picture}_ids"], logits, strict=True)}

    def boxes_of(picture: str) -> Floats:
        sizes = _pair(file[f"{picture}_size"]), _pair(file[f"{picture}_orig_size"])
        return to_picture(file[f"{picture}_det_boxes"], *sizes).astype(np.float32)

    def true_boxes() -> Floats:
        return _xyxy(np.concatenate([file[f"{picture}_gt_boxes_xywh_orig"] for picture in pictures]))

    def pairs_of_masks() -> list[tuple[Array, Array]]:
        found = {number: mask for picture in pictures for number, mask in masks_of(picture).items()}
        return [(mask, file[f"ref/gt_mask_{number}"] > 0) for number, mask in found.items()]

    def of_boxes(boxes: Sequence[ArrayLike]) -> float:
        return precision_at_half(pair_iou(np.concatenate([np.reshape(b, (-1, 4)) for b in boxes]), true_boxes()))

    for picture in pictures:
        for index, number in enumerate(int(i) for i in file[f"{picture}_ids"]):
            check(f"ref/pred_mask_{number}", lambda p=picture, n=number: masks_of(p)[n], EXACT)
            check(f"ref/pred_box_xywh_{number}", lambda p=picture, i=index: _xywh(boxes_of(p)[i]))
    check("ref/out_box_Precision@1", lambda: of_boxes([boxes_of(picture) for picture in pictures]))
    check("ref/out_seg_box_Precision@1", lambda: of_boxes([box_of_mask(mask) for mask, _ in pairs_of_masks()]))
    for name, ours in REFERRING_VALUES.items():
        check(
            f"ref/{name}",
            lambda ours=ours: mask_metrics(*zip(*(overlap(*pair) for pair in pairs_of_masks()), strict=True))[ours],
        )


def _point_l1(file: GoldenFile) -> ArrayLike:
    """The texts of the file are of one picture."""
    size = file["point/size_hw"][::-1]
    return _number(point_l1(file["point/pred"] / size, file["point/gt"] / size, file["point/tokens"] > 0))


def _dense_captions(file: GoldenFile, check: _Checker) -> None:
    """The file gives METEOR of each detection instead of captions: the value itself stands in as caption."""

    def pictures() -> list[tuple[Truth, Detections]]:
        gt, pred = file["densecap/gt"], file["densecap/pred"]
        both = []
        for number in np.unique(gt[:, 0]):
            truth, found = gt[gt[:, 0] == number], pred[pred[:, 0] == number]
            both.append(
                (
                    Truth(_xyxy(truth[:, 1:5]), ("words",) * len(truth)),
                    Detections(_xyxy(found[:, 1:5]), found[:, 5], tuple(map(str, found[:, 6]))),
                )
            )
        return both

    def meteor(captions: list[str], references: list[list[str]]) -> list[float]:
        return [float(caption) for caption in captions]

    def merged() -> Array:
        rows = []
        for number, (truth, _) in zip(np.unique(file["densecap/gt"][:, 0]), pictures(), strict=True):
            boxes, captions = merge_truth(truth)
            rows += [[number, *_xywh(box), len(texts)] for box, texts in zip(boxes, captions, strict=True)]
        return np.array(rows)

    def count_before() -> int:
        return sum(len(truth.boxes) for truth, _ in pictures())

    check("densecap/num_gt_before", count_before, EXACT)
    check("densecap/num_gt_after_merge", lambda: len(merged()), EXACT)
    check("densecap/merged_gt", merged)
    for name in file:
        if match := re.fullmatch(r"densecap/out_(nometeor_)?(mAP.*)", name):
            judge = None if match[1] else meteor
            check(name, lambda judge=judge, value=match[2]: dense_caption_map(pictures(), judge)[value])


def _pair(size: Array) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def _xywh(boxes: Array) -> Array:
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def _xyxy(boxes: Array) -> Array:
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def _number(score: ArrayLike | None) -> ArrayLike:
    """NaN, which fails every comparison, where nothing could be scored."""
    return float("nan") if score is None else score


CASES: dict[str, Callable[[Context, GoldenFile, Report], None]] = {
    "lbm.npz": local_bipartite_matching,
    "metrics.npz": metrics,
}
