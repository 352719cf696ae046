"""Comparisons of the metrics. They say nothing about a backend: predictions come from the files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from deixis_export.parity.glamm.context import GlammContext
from deixis_export.parity.report import EXACT, MODULE_TOLERANCE, Absent, Array, GoldenFile, Report
from deixis_train.evaluation.captions import CaptionScores, caption_scores, overlap_scores, require_java, tokenized
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.gcg import (
    Grounded,
    coco_stats,
    gcg_metrics,
    greedy_iou,
    grounded_of_coco,
    iou_matrix,
    match_phrases,
)
from deixis_train.evaluation.masks import overlap
from deixis_train.evaluation.res import referring_metrics
from deixis_train.evaluation.similarity import word_overlap

COUNT_TOLERANCE = 1e-6  # the reference counts pixels in float32


def grounded_captions(context: GlammContext, file: GoldenFile, report: Report) -> None:
    truth, said, captions = (file.tree(name) for name in ("mask_gt", "mask_pred", "caption_gt"))
    images = [image["id"] for image in truth["images"]]
    wanted = grounded_of_coco(images, truth["annotations"], captions["annotations"])
    found = grounded_of_coco(images, said, file.tree("caption_pred"))

    def check(name: str, compute: Callable[[], Any], tolerance: float = MODULE_TOLERANCE) -> None:
        report.check(file, f"expected/{name}", context.torch_only(lambda: np.asarray(compute())), tolerance)

    @lru_cache(maxsize=1)
    def figures() -> Mapping[str, float]:
        return gcg_metrics(wanted, found, word_overlap)

    def stats() -> Array:
        return coco_stats([one.masks for one in wanted], [one.masks for one in found], images)

    check("coco_stats", stats)
    check("miou", lambda: figures()["mIoU"])
    check("recall", lambda: figures()["recall"])
    for number in range(len(images)):
        _picture(check, file, number, images, wanted[number], found[number])
    _captions(check, images, [one.caption for one in found], [[one.caption] for one in wanted])


def _picture(
    check: Callable[..., None], file: GoldenFile, number: int, images: list[str], wanted: Grounded, found: Grounded
) -> None:
    at = f"per_image/{number}"

    def ious() -> Array:
        return iou_matrix(wanted.masks, found.masks)

    def similarities() -> Array:
        return word_overlap(wanted.phrases, found.phrases)

    check(f"{at}/image_id", lambda: images[number], EXACT)
    check(f"{at}/iou_matrix_gt_by_pred", ious)
    check(f"{at}/text_sim", similarities)
    check(f"{at}/miou", lambda: greedy_iou(ious()))

    def matches() -> Array:
        pairs = match_phrases(ious(), similarities())
        return np.array(pairs) if pairs else np.zeros(0)

    check(f"{at}/matches", matches, EXACT)


def _captions(check: Callable[..., None], images: list[str], predicted: list[str], references: list[list[str]]) -> None:
    def with_java(compute: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            try:
                require_java()
            except EvaluationError as error:
                raise Absent(str(error)) from None
            return compute()

        return run

    @lru_cache(maxsize=1)
    def tokens() -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        return tokenized(predicted, references)

    @lru_cache(maxsize=1)
    def scores() -> CaptionScores:
        return caption_scores(predicted, references)

    @lru_cache(maxsize=1)
    def overlaps() -> Mapping[str, float]:
        return overlap_scores(predicted, references)

    for side, name in ((0, "pred"), (1, "gt")):
        for number, image in enumerate(images):
            words = with_java(lambda s=side, n=number: tokens()[s][n])
            check(f"tokenised/{name}/{image}", words, EXACT)
    check("bleu1_4", with_java(lambda: [overlaps()[f"BLEU-{n}"] for n in range(1, 5)]))
    check("rouge_l", with_java(lambda: overlaps()["ROUGE-L"]))
    for name in ("cider", "meteor"):
        check(name, with_java(lambda n=name: getattr(scores(), n)))
        check(f"{name}_per", with_java(lambda n=name: getattr(scores(), f"{n}s")))


def referring(context: GlammContext, file: GoldenFile, report: Report) -> None:
    numbers = sorted(int(match[1]) for name in file if (match := re.fullmatch(r"logits(\d+)", name)))

    @lru_cache(maxsize=1)
    def figures() -> Mapping[str, float]:
        pairs = [
            overlap(logits > 0, wanted > 0)
            for number in numbers
            for logits, wanted in zip(file[f"logits{number}"], file[f"gt{number}"], strict=True)
        ]
        return referring_metrics(*zip(*pairs, strict=True))

    for name, ours in (("giou", "gIoU"), ("ciou", "cIoU")):
        report.check(file, name, context.torch_only(lambda o=ours: np.asarray(figures()[o])), COUNT_TOLERANCE)


CASES: dict[str, Callable[[GlammContext, GoldenFile, Report], None]] = {
    "gcg_eval.json": grounded_captions,
    "res_eval.npz": referring,
}
