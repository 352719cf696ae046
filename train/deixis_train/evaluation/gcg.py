"""Grounded conversation generation judged as GLaMM's evaluation does it (GLaMM specification, section 11.1).

AP50 of masks through pycocotools, mIoU of greedily paired masks, recall of phrases with their masks. Captions are
judged by `captions`. Masks are COCO run lengths of the picture; `Similarity` says how alike two phrases are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deixis_train.data.samples import Rle

Floats = NDArray[np.float64]
Similarity = Callable[[Sequence[str], Sequence[str]], Floats]  # phrases a, b -> [len(a), len(b)]
Pair = tuple[int, int]  # index of the true mask, index of the predicted one

THRESHOLD = 0.5  # of IoU and of text similarity, both inclusive
AP50 = 1  # its place among COCO's twelve numbers
CATEGORY = 1


@dataclass(frozen=True)
class Grounded:
    """A caption of one picture with its phrases and masks, true or predicted.

    Phrase i goes with mask i. Nothing makes a model say as many phrases as it shows masks.
    """

    caption: str
    phrases: tuple[str, ...]
    masks: tuple[Rle, ...]


def gcg_metrics(truth: Sequence[Grounded], predicted: Sequence[Grounded], similarity: Similarity) -> dict[str, float]:
    """AP50, mIoU and recall of N pictures, each with its truth and one answer.

    Raises ValueError when there are none, when the numbers differ, or when no picture has a true mask.
    """
    if not truth or len(truth) != len(predicted):
        raise ValueError(f"{len(truth)} pictures with truth and {len(predicted)} answers cannot be judged")
    phrases = sum(len(one.phrases) for one in truth)
    if not phrases or not any(one.masks for one in truth):
        raise ValueError("no picture has phrases with masks, so nothing can be found")
    ious = [iou_matrix(t.masks, p.masks) for t, p in zip(truth, predicted, strict=True)]
    matched = 0
    for one, found, matrix in zip(truth, predicted, ious, strict=True):
        matched += len(match_phrases(matrix, similarity(one.phrases, found.phrases)))
    return {
        "AP50": float(coco_stats([t.masks for t in truth], [p.masks for p in predicted])[AP50]),
        "mIoU": float(np.mean([greedy_iou(matrix) for matrix in ious])),
        "recall": matched / phrases,
    }


def grounded_of_coco(
    images: Sequence[str], masks: Sequence[Mapping[str, Any]], captions: Sequence[Mapping[str, Any]]
) -> list[Grounded]:
    """What the published evaluation files say of each of the named images, in that order.

    masks: COCO annotations or results with `image_id` and `segmentation`. captions: records with `image_id`, `caption`
    and `labels`. Raises ValueError for an image without a caption.
    """
    texts = {record["image_id"]: record for record in captions}
    found: dict[str, list[Rle]] = {name: [] for name in images}
    for record in masks:
        found[record["image_id"]].append(record["segmentation"])
    if missing := [name for name in images if name not in texts]:
        raise ValueError(f"no caption of image {missing[0]}")
    return [Grounded(texts[i]["caption"], tuple(texts[i]["labels"]), tuple(found[i])) for i in images]


def iou_matrix(truth: Sequence[Rle], predicted: Sequence[Rle]) -> Floats:
    """IoU of every true mask with every predicted one, [T, P]."""
    if not truth or not predicted:
        return np.zeros((len(truth), len(predicted)))
    found: Any = list(predicted)  # pycocotools' types know less than its functions
    wanted: Any = list(truth)
    return np.asarray(coco_mask.iou(found, wanted, [0] * len(truth)), np.float64).T


def greedy_iou(ious: ArrayLike) -> float:
    """Mean IoU of masks paired best first, each used once; 0 when no two masks touch. ious: [T, P].

    Masks that find no partner do not count.
    """
    left = np.array(ious, np.float64)
    taken = []
    while left.size and left.max() > 0:
        row, column = np.unravel_index(left.argmax(), left.shape)
        taken.append(left[row, column])
        left[row, :] = left[:, column] = 0
    return float(np.mean(taken)) if taken else 0.0


def match_phrases(ious: ArrayLike, similarities: ArrayLike) -> list[Pair]:
    """Pairs of masks that count as found, best IoU first. ious: [T, P]; similarities: [true phrases, said phrases].

    As published, the search ends with the first pair that is not good enough, even if a later one would be. A picture
    whose best pair points at a mask without a phrase counts no match at all.
    """
    left, texts = np.array(ious, np.float64), np.array(similarities, np.float64)
    pairs: list[Pair] = []
    while left.size:
        row, column = (int(i) for i in np.unravel_index(left.argmax(), left.shape))
        if left[row, column] < THRESHOLD:
            break
        if row >= texts.shape[0] or column >= texts.shape[1]:
            return []
        if texts[row, column] < THRESHOLD:
            break
        pairs.append((row, column))
        left[row, :] = left[:, column] = 0
        texts[row, :] = texts[:, column] = 0
    return pairs


def coco_stats(
    truth: Sequence[Sequence[Rle]], predicted: Sequence[Sequence[Rle]], names: Sequence[str] | None = None
) -> Floats:
    """COCO's twelve numbers of N pictures' masks, all of one category and every prediction with score 1; -1 where there
    is nothing to average.

    With equal scores the order decides: pictures as `names` sort (default: as given), masks as they come.
    """
    ids = list(names) if names is not None else [f"{number:012d}" for number in range(len(truth))]
    annotations, results = [], []
    for name, wanted, found in zip(ids, truth, predicted, strict=True):
        for mask in wanted:
            annotations.append(_annotation(len(annotations) + 1, name, mask))
        results += [{"image_id": name, "category_id": CATEGORY, "segmentation": mask, "score": 1.0} for mask in found]
    ground_truth: Any = COCO()
    ground_truth.dataset = {
        "info": {},
        "images": [_image(name, [*wanted, *found]) for name, wanted, found in zip(ids, truth, predicted, strict=True)],
        "annotations": annotations,
        "categories": [{"id": CATEGORY, "name": "object"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        ground_truth.createIndex()
        if not results:
            return np.zeros(12)
        judge = COCOeval(ground_truth, ground_truth.loadRes(results), "segm")
        judge.params.catIds = [CATEGORY]
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return np.asarray(judge.stats, np.float64)


def _image(name: str, masks: Sequence[Rle]) -> dict[str, object]:
    height, width = masks[0]["size"] if masks else (0, 0)
    return {"id": name, "height": height, "width": width}


def _annotation(number: int, image: str, mask: Any) -> dict[str, object]:
    return {
        "id": number,
        "image_id": image,
        "category_id": CATEGORY,
        "segmentation": mask,
        "area": float(coco_mask.area(mask)),
        "bbox": [float(v) for v in coco_mask.toBbox(mask)],
        "iscrowd": 0,
    }
