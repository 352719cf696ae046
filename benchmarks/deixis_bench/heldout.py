"""How good is a bundle on rendered table scenes it was not trained on?

`python -m deixis_bench.heldout BUNDLE --scenes DIR` runs the exported bundle over the scenes that
`python -m deixis_train.data.scenes` wrote and reports

- referring: P@0.5 (share of expressions whose box has an IoU above 0.5), mean IoU, mask cIoU and gIoU (section 15);
- captions: of the things present (colour and kind), which share is named, and which share of those named is present;
- region captions of true boxes: share with colour and kind right.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

import deixis
from deixis_bench.report import finish

Scene = dict[str, Any]


def read_scenes(folder: Path) -> Iterator[Scene]:
    for shard in sorted(folder.glob("scenes-*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(0.0, width) * max(0.0, height)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter + 1e-6)


def named_things(text: str, kinds: set[str], colours: set[str]) -> Counter[tuple[str, str]]:
    """(colour, kind) pairs of neighbouring words."""
    words = re.findall(r"[a-z]+", text.lower())
    return Counter(pair for pair in pairwise(words) if pair[0] in colours and pair[1] in kinds)


class Tally:
    """Sums over scenes."""

    def __init__(self) -> None:
        self.box_ious: list[float] = []
        self.mask_inter: list[int] = []
        self.mask_union: list[int] = []
        self.present = self.named = self.both = 0
        self.region_right: list[bool] = []

    def refer(self, model: deixis.Model, scene: deixis.Scene, truth: Scene, limit: int) -> None:
        records = truth["expressions"][:limit]
        if not records:
            return
        found = model.refer_batch([(scene, record["text"]) for record in records])
        for record, grounding in zip(records, found, strict=True):
            thing = truth["objects"][record["object"]]
            self.box_ious.append(box_iou(grounding.box, tuple(thing["box"])))
            if grounding.mask is not None:
                mask, wanted = grounding.mask.array, deixis.Mask.from_rle(thing["rle"]).array
                self.mask_inter.append(int((mask & wanted).sum()))
                self.mask_union.append(int((mask | wanted).sum()))

    def caption(self, scene: deixis.Scene, truth: Scene, kinds: set[str], colours: set[str]) -> None:
        present = Counter((thing["color"], thing["kind"]) for thing in truth["objects"])
        named = named_things(scene.caption().text, kinds, colours)
        self.present += present.total()
        self.named += named.total()
        self.both += (present & named).total()

    def regions(self, model: deixis.Model, scene: deixis.Scene, truth: Scene) -> None:
        things = truth["objects"]
        captions = model.caption_batch([(scene, deixis.Prompt(box=thing["box"])) for thing in things])
        for thing, caption in zip(things, captions, strict=True):
            self.region_right.append({thing["color"], thing["kind"]} <= set(re.findall(r"[a-z]+", caption.text)))

    def metrics(self) -> dict[str, float]:
        ious, inter, union = np.array(self.box_ious), np.array(self.mask_inter), np.array(self.mask_union)
        referring = {"P@0.5": float((ious > 0.5).mean()), "mean IoU": float(ious.mean())} if len(ious) else {}
        return {
            **referring,
            **({"cIoU": float(inter.sum() / union.sum()), "gIoU": float((inter / union).mean())} if len(union) else {}),
            "caption recall": self.both / max(1, self.present),
            "caption precision": self.both / max(1, self.named),
            "region right": sum(self.region_right) / max(1, len(self.region_right)),
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m deixis_bench.heldout", description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--scenes", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100, help="scenes")
    parser.add_argument("--expressions", type=int, default=5, help="expressions per scene")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    truths = [scene for scene, _ in zip(read_scenes(options.scenes), range(options.limit), strict=False)]
    if not truths:
        parser.error(f"{options.scenes} holds no scenes-*.jsonl; render some with python -m deixis_train.data.scenes")
    kinds = {thing["kind"] for truth in truths for thing in truth["objects"]}
    colours = {thing["color"] for truth in truths for thing in truth["objects"]}
    tally = Tally()
    with deixis.load(options.bundle, threads=options.threads) as model:
        for truth in truths:
            scene = model.encode(options.scenes / truth["file"])
            tally.refer(model, scene, truth, options.expressions)
            tally.caption(scene, truth, kinds, colours)
            tally.regions(model, scene, truth)
        data = {
            "scenes": len(truths),
            "first_seed": truths[0]["seed"],
            "expressions": len(tally.box_ious),
            "regions": len(tally.region_right),
        }
        finish(tally.metrics(), data, model, options.json)


if __name__ == "__main__":
    main()
