"""Training rows of stage 3: what the text model is asked, what it should write, and where each token points."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from deixis_train.tabletop.cells import CellTargets, Names
from deixis_train.tabletop.scenes import read_shard, shards
from deixis_train.tabletop.tokenizer import END, PAD, encode_words

CAPTION = "a long image caption:"
REGION = "an object of"
REFER = "where is {text}"

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One sequence. `boxes`: a box per token (fractions of the real picture) or None. `thing`: the object meant.

    `things`: the object that each token points at, -1 for none.
    """

    task: str  # "caption", "region" or "refer"
    context: list[int]
    ids: list[int]
    boxes: list[Box | None]
    thing: int  # -1 for captions
    things: list[int]


@dataclass(frozen=True)
class SceneRows:
    width: int
    height: int
    boxes: list[Box]  # of the objects, px
    captions: list[Row]
    regions: list[Row]
    refers: list[Row]


def scene_rows(scene: dict[str, Any], tokenizer: Tokenizer) -> SceneRows:
    width, height = scene["width"], scene["height"]

    def context(text: str) -> list[int]:
        return [*tokenizer.encode(text, add_special_tokens=False).ids, END]

    def fraction(box: list[float] | None) -> Box | None:
        return None if box is None else (box[0] / width, box[1] / height, box[2] / width, box[3] / height)

    def row(task: str, words: list[str], boxes: list[list[float] | None], thing: int, asked: str) -> Row:
        ids, owner = encode_words(tokenizer, words)
        known = [thing["box"] for thing in scene["objects"]]
        things = [known.index(boxes[i]) if boxes[i] in known else -1 for i in owner]
        return Row(task, context(asked), ids, [fraction(boxes[i]) for i in owner], thing, things)

    def about(task: str, record: dict[str, Any], asked: str) -> Row:
        words = record["text"].split()
        box = scene["objects"][record["object"]]["box"]
        return row(task, words, [box] * len(words), record["object"], asked)

    return SceneRows(
        width,
        height,
        [tuple(thing["box"]) for thing in scene["objects"]],
        [row("caption", c["words"], c["boxes"], -1, CAPTION) for c in scene["captions"]],
        [about("region", record, REGION) for record in scene["regions"]],
        [about("refer", record, REFER.format(text=record["text"])) for record in scene["expressions"]],
    )


class SceneData:
    """Scenes with cached features: the input of stage 3."""

    def __init__(self, data: Path, cache: Path, tokenizer: Tokenizer, names: Names) -> None:
        paths = [p for p in shards(data) if all((cache / f"{p.stem}.{n}.npy").exists() for n in ("sam", "semantic"))]
        if not paths:
            raise ValueError(f"{cache} has no features of the scenes in {data}; run the stages before this one")
        scenes = [scene for p in paths for scene in read_shard(p)]
        self.scenes = [scene_rows(scene, tokenizer) for scene in scenes]
        self.semantic = np.concatenate([np.load(cache / f"{p.stem}.semantic.npy") for p in paths])
        self.sam = np.concatenate([np.load(cache / f"{p.stem}.sam.npy") for p in paths])
        self.owner = np.concatenate([np.load(cache / f"{p.stem}.owner.npy") for p in paths])
        self.cells = CellTargets(scenes, self.owner, names)

    def __len__(self) -> int:
        return len(self.scenes)

    def whole(self, index: np.ndarray) -> Tensor:
        """Boxes that mean the whole pictures [B, 4], px."""
        return torch.tensor([[0.0, 0.0, float(self.scenes[i].width), float(self.scenes[i].height)] for i in index])

    def features(self, index: np.ndarray) -> Tensor:
        """Fused features [B, g, g, C1 + C2] float32, semantic channels first."""
        fused = np.concatenate([self.semantic[index], self.sam[index]], axis=-1)
        return torch.from_numpy(fused).float()


def pad_ids(sequences: list[list[int]]) -> Tensor:
    """Ids [R, longest] int64, padded with 0."""
    length = max(map(len, sequences))
    return torch.tensor([ids + [PAD] * (length - len(ids)) for ids in sequences])


def decoder_arrays(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Decoder input [BOS, w1..wn, EOS, 0..] [R, L], a box per position [R, L, 4], and 1 where there is one [R, L]."""
    ids = pad_ids([[PAD, *row.ids, END] for row in rows])
    boxes, has_box = torch.zeros(*ids.shape, 4), torch.zeros(ids.shape)
    for r, row in enumerate(rows):
        for position, box in enumerate(row.boxes, start=1):
            if box is not None:
                boxes[r, position], has_box[r, position] = torch.tensor(box), 1.0
    return ids, boxes, has_box
