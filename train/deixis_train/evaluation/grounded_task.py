"""Grounded captions and questions asked of a model (GLaMM specification, section 11.1)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from deixis.errors import PromptError
from deixis_train.data.samples import Rle, Row
from deixis_train.evaluation import masks as mask_metrics
from deixis_train.evaluation.captions import caption_scores, require_java
from deixis_train.evaluation.gcg import Grounded, Similarity, gcg_metrics, greedy_iou, iou_matrix, match_phrases
from deixis_train.evaluation.predictor import GroundedAnswer, Predictor
from deixis_train.evaluation.tasks import Asked, Item, Metrics, make_item

# How a question begins says what it asks about; the first that fits.
QUESTIONS = (
    ("colour", r"what colou?r\b"),
    ("kind", r"what (kind|is)\b"),
    ("count", r"how many\b"),
    ("place", r"where\b"),
    ("existence", r"(is|are) there\b"),
    ("relation", r"(is|are)\b"),
)
OTHER = "other"


class GroundedCaptions:
    """A caption whose phrases have masks, of each picture that has such a caption: AP50, mIoU, recall, CIDEr, METEOR.

    similarity: what makes two phrases the same for recall; `similarity_name` stands in the metric's name. Of a picture
    with several true captions each is held against the one answer, as a picture of its own.
    """

    name = "grounded-captions"

    def __init__(self, similarity: Similarity, similarity_name: str) -> None:
        self._similarity, self._similarity_name = similarity, similarity_name

    def check(self) -> None:
        require_java()

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        rows = [row for row in asked.rows if any(phrase.masks for phrase in row.phrases)]
        if not rows:
            return []
        said = _said(predictor.grounded_caption(asked.pixels))
        items = []
        for row in rows:
            wanted = _truth(row)
            ious = iou_matrix(wanted.masks, said.masks)
            matches = match_phrases(ious, self._similarity(wanted.phrases, said.phrases))
            scores = {"mIoU": greedy_iou(ious), "found": len(matches), "phrases": len(wanted.phrases)}
            items.append(make_item(self.name, asked, predictor, "", _values(said), _values(wanted), scores))
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        # A fixed order decides among masks that all have score 1.
        ordered = sorted(items, key=lambda item: item["image"])
        truth, said = ([_of_values(item[side]) for item in ordered] for side in ("truth", "predicted"))
        values = gcg_metrics(truth, said, self._similarity)
        captions = caption_scores([one.caption for one in said], [[one.caption] for one in truth])
        return {
            "grounded AP50": values["AP50"],
            "grounded mIoU": values["mIoU"],
            f"grounded recall ({self._similarity_name})": values["recall"],
            "grounded CIDEr": captions.cider,
            "grounded METEOR": captions.meteor,
        }


class Questions:
    """Questions with one right answer: the share that is answered with exactly its words, whatever case, punctuation
    and articles are; of all, and of each kind of question. A question that the model cannot take counts as wrong.
    """

    name = "questions"

    def check(self) -> None:
        pass

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        items = []
        for row in asked.rows:
            if not row.question:
                continue
            try:
                answer, error = predictor.answer(asked.pixels, row.question), None
            except PromptError as refused:
                answer, error = "", str(refused)
            scores = {"right": normalised(answer) == normalised(row.text)}
            truth = {"answer": row.text, "kind": kind_of_question(row.question)}
            item = make_item(self.name, asked, predictor, row.question, answer, truth, scores)
            items.append(item if error is None else item | {"error": error})
        return items

    def metrics(self, items: Sequence[Item]) -> Metrics:
        by_kind: dict[str, list[bool]] = {}
        for item in items:
            by_kind.setdefault(item["truth"]["kind"], []).append(item["scores"]["right"])
        order = [kind for kind, _ in QUESTIONS] + [OTHER]
        of_kinds = {f"answers right: {kind}": float(np.mean(by_kind[kind])) for kind in order if kind in by_kind}
        return {"answers right": float(np.mean([item["scores"]["right"] for item in items]))} | of_kinds


def kind_of_question(question: str) -> str:
    """What a question asks about: "colour", "kind", "count", "place", "existence", "relation" or "other"."""
    text = question.strip().lower()
    return next((kind for kind, start in QUESTIONS if re.match(start, text)), OTHER)


def normalised(answer: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    words = re.findall(r"[\w'-]+", answer.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _said(answer: GroundedAnswer) -> Grounded:
    """Masks with their phrases in order; masks of no phrase have an empty one; phrases without a mask come last."""
    shown = [(phrase, mask) for phrase, mask in answer.phrases if mask is not None]
    bare = [phrase for phrase, mask in answer.phrases if mask is None]
    masks = [mask for _, mask in shown] + list(answer.masks)
    phrases = [phrase for phrase, _ in shown] + [""] * len(answer.masks) + bare
    return Grounded(answer.text, tuple(phrases), tuple(mask_metrics.encode(mask) for mask in masks))


def _truth(row: Row) -> Grounded:
    """The phrases that have masks; a phrase that names several things has the union of theirs."""
    known = [phrase for phrase in row.phrases if phrase.masks]
    texts = tuple(row.text[phrase.start : phrase.end] for phrase in known)
    return Grounded(row.text, texts, tuple(_union(phrase.masks) for phrase in known))


def _union(masks: Sequence[Rle]) -> Rle:
    if len(masks) == 1:
        return masks[0]
    merged = coco_mask.merge([{"size": m["size"], "counts": m["counts"]} for m in masks])  # type: ignore[arg-type]
    counts: Any = merged["counts"]
    return {"size": list(merged["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}


def _values(one: Grounded) -> dict[str, Any]:
    return {"caption": one.caption, "phrases": list(one.phrases), "masks": list(one.masks)}


def _of_values(values: dict[str, Any]) -> Grounded:
    return Grounded(values["caption"], tuple(values["phrases"]), tuple(values["masks"]))
