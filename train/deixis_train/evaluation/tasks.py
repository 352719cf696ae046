"""One class per task: what is asked of a predictor about a picture, and the metrics of all its answers.

An item is one question with its answer, plain JSON values: task, by (the predictor), image, text (what was asked),
predicted, truth, scores. Metrics are computed from items alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deixis.errors import PromptError, TextTooLongError
from deixis_train.data.preparation.alignment import Alignment, align_by_text, boxes_of_words
from deixis_train.data.samples import Instance, Row, Utterance
from deixis_train.evaluation import masks as mask_metrics
from deixis_train.evaluation import things
from deixis_train.evaluation.boxes import iou_matrix, pair_iou, precision_at_half
from deixis_train.evaluation.captions import caption_scores, require_java
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.predictor import Box, Image, Predictor
from deixis_train.evaluation.trace import lbm, point_l1

Item = dict[str, Any]
Metrics = dict[str, float]

WINDOWS = (0, 1, 2)  # k of LBM
SAME = 0.9  # IoU from which a region and an instance are the same thing
COLOUR = "color"  # name of the attribute of rendered instances


@dataclass(frozen=True)
class Asked:
    """A picture and what one source says of it. `image`: its file name."""

    image: str
    pixels: Image
    rows: tuple[Row, ...]
    instances: tuple[Instance, ...] = ()


class Task(Protocol):
    """A task of `deixis eval`. `check` raises EvaluationError for what the machine lacks, before anything is run."""

    name: str

    def check(self) -> None: ...

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]: ...

    def metrics(self, items: Sequence[Item]) -> Metrics: ...


class Refer:
    """Boxes of referring expressions, and their masks where `with_masks`. An expression that the model cannot take
    counts as wrong.

    P@0.5, mean box IoU; cIoU, gIoU, share of masks with an IoU above 0.5, P@0.5 of the masks' own boxes (section 15).
    """

    name = "refer"

    def __init__(self, with_boxes: bool = True, with_masks: bool = True) -> None:
        self.with_boxes, self.with_masks = with_boxes, with_masks

    def check(self) -> None:
        pass

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        rows = [row for row in asked.rows if row.box is not None and (row.mask is not None or self.with_boxes)]
        answers = _accepted(asked.pixels, rows, predictor, self.with_masks)
        items = []
        for row, (box, mask, error) in zip(rows, answers, strict=True):
            assert row.box is not None
            scores: dict[str, Any] = {"IoU": 0.0 if box is None else float(pair_iou([box], [row.box])[0])}
            truth: dict[str, Any] = {"box": list(row.box)}
            predicted: dict[str, Any] = {"box": None if box is None else list(box)}
            if self.with_masks and row.mask is not None:
                wanted = mask_metrics.decode(row.mask)
                found = np.zeros_like(wanted) if mask is None else mask
                inter, union = mask_metrics.overlap(found, wanted)
                around = mask_metrics.box_of_mask(found)
                scores |= {
                    "intersection": inter,
                    "union": union,
                    "mask IoU": inter / max(1, union),
                    "IoU of mask box": float(pair_iou([around], [row.box])[0]),
                }
                truth["mask"], predicted["mask"] = row.mask, mask_metrics.encode(found)
            item = make_item(self.name, asked, predictor, row.text, predicted, truth, scores)
            items.append(item if error is None else item | {"error": error})
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        ious = [item["scores"]["IoU"] for item in items]
        values = {"P@0.5": precision_at_half(ious), "mean box IoU": float(np.mean(ious))} if self.with_boxes else {}
        if self.with_masks:
            masked = [item["scores"] for item in items if "union" in item["scores"]]
            if not masked:
                raise EvaluationError("masks: none of the expressions in the data has a mask")
            inter, union = ([scores[key] for scores in masked] for key in ("intersection", "union"))
            boxes = [scores["IoU of mask box"] for scores in masked]
            values |= {**mask_metrics.mask_metrics(inter, union), "mask box P@0.5": precision_at_half(boxes)}
        return values


class Trace:
    """Controlled traces: the model gets the narration's text, a box per word is compared with the narrated one.

    A word is what stands between white space; its box is the least around its pieces, on both sides, and is clipped to
    the picture. Words that the narration gives no place are left out on both sides. A text that is too long loses words
    at its end; one that the model cannot take at all is not counted.

    name: of the task. prefix: goes before the names of metrics. alignment: see `preparation.alignment`; "text" falls
    back on "rank" where the utterances do not spell the caption.
    """

    def __init__(self, name: str = "trace", prefix: str = "", alignment: Alignment = "rank") -> None:
        self.name, self.prefix = name, prefix
        self.alignment: Alignment = alignment

    def check(self) -> None:
        pass

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        height, width = asked.pixels.shape[:2]
        items = []
        for row in asked.rows:
            words = row.text.split()
            truth = truth_of_words(words, row.utterances, self.alignment)
            try:
                placed = _traced(asked.pixels, words, predictor)
            except PromptError as error:
                items.append(make_item(self.name, asked, predictor, row.text, None, None, {}) | {"error": str(error)})
                continue
            pairs = [
                (np.array(word.box) / [width, height, width, height], box)
                for word, box in zip(placed, truth, strict=False)
                if word.box is not None and box.any()
            ]
            predicted = np.array([a for a, _ in pairs]).reshape(-1, 4).clip(0, 1)
            wanted = np.array([b for _, b in pairs]).reshape(-1, 4)
            scores: dict[str, float | None] = {f"LBM k={k}": lbm(predicted, wanted, k) for k in WINDOWS}
            counts = np.ones(len(pairs), bool)
            scores["point L1"] = point_l1(predicted.reshape(-1, 2, 2), wanted.reshape(-1, 2, 2), counts)
            text = " ".join(words[: len(placed)])
            items.append(
                make_item(self.name, asked, predictor, text, predicted.tolist(), wanted.tolist(), scores)
                | ({"cut": True} if len(placed) < len(words) else {})
            )
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        counted = [item["scores"] for item in items if item["scores"] and None not in item["scores"].values()]
        if not counted:
            first = next((item["error"] for item in items if "error" in item), "no word has a place in the data")
            raise EvaluationError(f"{self.name}: none of {len(items)} texts could be measured: {first}")
        return {self.prefix + name: float(np.mean([s[name] for s in counted])) for name in counted[0]}


def truth_of_words(words: Sequence[str], utterances: Sequence[Utterance], alignment: Alignment) -> NDArray[np.float64]:
    """The narrated box of each word, float64 [W, 4] as fractions of the picture; zeros for a word without a place.

    With "text", a word made of several utterances ("mug" and its comma) has the least box around theirs, as the model's
    word has around its pieces'.
    """
    if alignment == "text":
        parts: list[int] = []  # the word of each part
        ends: list[int] = []
        start = 0
        for index, word in enumerate(words):
            for part in re.finditer(r"\w+|[^\w\s]+", word):
                parts.append(index)
                ends.append(start + part.end())
            start += len(word) + 1
        owners = align_by_text(" ".join(words), ends, utterances)
        if owners is not None:
            boxes = np.array([u.box for u in utterances], np.float64).clip(0, 1)
            truth = np.zeros((len(words), 4))
            for index in range(len(words)):
                own = [o for o, word in zip(owners.tolist(), parts, strict=True) if word == index and o >= 0]
                if own:
                    truth[index] = [*boxes[own, :2].min(0), *boxes[own, 2:].max(0)]
            return truth
    return boxes_of_words(words, utterances)


class Captions:
    """Captions of whole pictures: CIDEr and METEOR, and where instances have colours, how the things named agree with
    those that are there (each counted once).
    """

    name = "caption"

    def check(self) -> None:
        require_java()

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        references = [row.text for row in asked.rows]
        text = predictor.caption(asked.pixels)
        present = [[i.attributes[COLOUR], i.category] for i in asked.instances if COLOUR in i.attributes]
        return [make_item(self.name, asked, predictor, "", text, {"captions": references, "things": present}, {})]

    def metrics(self, items: Sequence[Item]) -> Metrics:
        values = _caption_metrics("caption ", items)
        colours = {colour for item in items for colour, _ in item["truth"]["things"]}
        kinds = {kind for item in items for _, kind in item["truth"]["things"]}
        if not colours:
            return values
        present = named = both = 0
        for item in items:
            there = Counter((colour, kind) for colour, kind in item["truth"]["things"])
            said = things.named_things(item["predicted"], colours, kinds)
            right = (there & said).total()
            item["scores"] |= {"things": there.total(), "named": said.total(), "right": right}
            present, named, both = present + there.total(), named + said.total(), both + right
        return values | {"caption recall": both / max(1, present), "caption precision": both / max(1, named)}


class Regions:
    """Captions of annotated boxes: METEOR, CIDEr, and for boxes of instances with a colour, the share of texts with
    colour and kind right. Descriptions of the same box are references of one text.
    """

    name = "regions"

    def check(self) -> None:
        require_java()

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        groups: dict[Box, list[str]] = {}
        for row in asked.rows:
            if row.box is not None:
                groups.setdefault(row.box, []).append(row.text)
        coloured = [i for i in asked.instances if COLOUR in i.attributes]
        texts = predictor.region_captions(asked.pixels, list(groups)) if groups else []
        items = []
        for (box, references), text in zip(groups.items(), texts, strict=True):
            truth: dict[str, Any] = {"box": list(box), "captions": references}
            scores: dict[str, Any] = {}
            ious = iou_matrix([box], [i.box for i in coloured])[0] if coloured else np.zeros(0)
            if len(ious) and ious.max() >= SAME:
                thing = coloured[int(ious.argmax())]
                truth["thing"] = [thing.attributes[COLOUR], thing.category]
                scores["right"] = things.names_thing(text, *truth["thing"])
            items.append(make_item(self.name, asked, predictor, "", text, truth, scores))
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        values = _caption_metrics("region ", items)
        right = [item["scores"]["right"] for item in items if "right" in item["scores"]]
        return values | ({"region right": float(np.mean(right))} if right else {})


class Boxes:
    """Masks of the true boxes of instances: mean and median IoU."""

    name = "boxes"

    def check(self) -> None:
        pass

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        known = [i for i in asked.instances if i.mask is not None]
        masks = predictor.segment(asked.pixels, [i.box for i in known]) if known else []
        items = []
        for instance, mask in zip(known, masks, strict=True):
            assert instance.mask is not None
            inter, union = mask_metrics.overlap(mask, mask_metrics.decode(instance.mask))
            truth = {"box": list(instance.box), "mask": instance.mask}
            predicted = {"mask": mask_metrics.encode(mask)}
            scores = {"IoU": inter / max(1, union)}
            items.append(make_item(self.name, asked, predictor, instance.category, predicted, truth, scores))
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        ious = [item["scores"]["IoU"] for item in items]
        return {"box-to-mask IoU": float(np.mean(ious)), "box-to-mask median IoU": float(np.median(ious))}


def make_item(
    task: str, asked: Asked, predictor: Predictor, text: str, predicted: Any, truth: Any, scores: dict[str, Any]
) -> Item:
    """An answer as it is written; see the head of this file."""
    return {
        "task": task,
        "by": predictor.name,
        "image": asked.image,
        "text": text,
        "predicted": predicted,
        "truth": truth,
        "scores": scores,
    }


def _accepted(
    pixels: Image, rows: Sequence[Row], predictor: Predictor, masks: bool
) -> list[tuple[Box | None, Any, str | None]]:
    """Box, mask and error of every expression; all at once, and one by one where one of them is not taken."""
    if not rows:
        return []
    try:
        boxes, found = predictor.refer(pixels, [row.text for row in rows], masks)
    except PromptError as error:
        if len(rows) == 1:
            return [(None, None, str(error))]
        return [answer for row in rows for answer in _accepted(pixels, [row], predictor, masks)]
    return [(box, mask, None) for box, mask in zip(boxes, found or [None] * len(boxes), strict=True)]


def _traced(pixels: Image, words: list[str], predictor: Predictor) -> list[Any]:
    """Places of as many words as the model takes; a text that is refused costs little."""
    count = len(words)
    while True:
        try:
            return predictor.trace(pixels, " ".join(words[:count]))
        except TextTooLongError:
            if count < 2:
                raise
            count = min(count - 1, count * 19 // 20)


def _caption_metrics(prefix: str, items: Sequence[Item]) -> Metrics:
    """CIDEr and METEOR of items whose truth has captions; each item's own values are noted in it."""
    scores = caption_scores([i["predicted"] for i in items], [i["truth"]["captions"] for i in items])
    for item, meteor, cider in zip(items, scores.meteors, scores.ciders, strict=True):
        item["scores"] |= {"METEOR": float(meteor), "CIDEr": float(cider)}
    return {f"{prefix}CIDEr": scores.cider, f"{prefix}METEOR": scores.meteor}
