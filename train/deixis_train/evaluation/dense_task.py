"""Dense captions asked of a model: it finds things by itself and describes them (section 15)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deixis_train.evaluation.captions import meteor_scores, require_java
from deixis_train.evaluation.dense_captions import Detections, Truth, count_found, dense_caption_map, detection_shares
from deixis_train.evaluation.predictor import Predictor
from deixis_train.evaluation.tasks import Asked, Item, Metrics, make_item


class DenseCaptions:
    """mAP and mAP_detection of what a model finds in a picture without being asked, held against described regions.

    A picture without regions is not asked about: it is one that nobody has described. An item is a picture.
    """

    name = "dense-captions"

    def check(self) -> None:
        require_java()

    def ask(self, asked: Asked, predictor: Predictor) -> list[Item]:
        truth = [{"box": list(row.box), "caption": row.text} for row in asked.rows if row.box is not None]
        if not truth:
            return []
        predicted = [
            {"box": list(one.box), "caption": one.text, "score": one.score}
            for one in predictor.dense_captions(asked.pixels)
        ]
        item = make_item(self.name, asked, predictor, "", predicted, truth, {})
        item["scores"] |= dict(zip(("regions", "detections", "found"), count_found(*_pair(item)), strict=True))
        return [item]

    def metrics(self, items: Sequence[Item]) -> Metrics:
        pairs = [_pair(item) for item in items]
        return {**dense_caption_map(pairs, meteor_scores), **detection_shares(pairs)}


def _pair(item: Item) -> tuple[Truth, Detections]:
    truth, found = (
        (np.array([one["box"] for one in side], np.float64).reshape(-1, 4), tuple(one["caption"] for one in side))
        for side in (item["truth"], item["predicted"])
    )
    scores = np.array([one["score"] for one in item["predicted"]], np.float64)
    return Truth(*truth), Detections(found[0], scores, found[1])
