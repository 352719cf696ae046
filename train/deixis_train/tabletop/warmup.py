"""Stage 2: the semantic encoder learns what lies in each cell of its grid, and the box of that thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.tabletop.losses import box_loss, iou
from deixis_train.tabletop.run import Stage, adamw, cosine, set_learning_rate
from deixis_train.tabletop.scenes import normalize_small, read_shard, shards

Names = dict[str, list[str]]  # "kinds" and "colours", in the order of the class numbers


class CellHeads(nn.Module):
    """Read-outs of the dense objective; they are thrown away afterwards."""

    def __init__(self, width: int, names: Names) -> None:
        super().__init__()
        self.sizes = (1 + len(names["kinds"]), len(names["colours"]), 4)
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Features [..., width] -> logits of (nothing, kinds), of colours, and box XYXY in fractions of the real picture."""
        return self.linear(x).split(self.sizes, dim=-1)


class CellData:
    """Small pictures and cell targets of every prepared shard, in memory."""

    def __init__(self, data: Path, cache: Path, names: Names) -> None:
        paths = [p for p in shards(data) if (cache / f"{p.stem}.owner.npy").exists()]
        self.small = np.concatenate([np.load(cache / f"{p.stem}.small.npy") for p in paths])
        self.owner = np.concatenate([np.load(cache / f"{p.stem}.owner.npy") for p in paths])
        scenes = [scene for p in paths for scene in read_shard(p)]
        size = max(max(scene["width"], scene["height"]) for scene in scenes)
        self.fills_width = np.array([scene["width"] == size for scene in scenes])
        most = max(len(scene["objects"]) for scene in scenes)
        self.objects = np.zeros((len(scenes), most + 1, 6), np.float32)  # the last row serves owner -1: nothing
        for rows, scene in zip(self.objects, scenes, strict=True):
            for row, thing in zip(rows, scene["objects"], strict=False):
                row[:] = _target(thing, scene, names)

    def __len__(self) -> int:
        return len(self.small)

    def batch(self, index: np.ndarray, rng: np.random.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        """Small pictures uint8 [B, s, s, 3], occupied [B, g, g] bool, targets [B, g, g, 6] (kind, colour, box).

        With a generator half of the pictures that fill the width (so that no padding moves) are mirrored.
        """
        small, owner = self.small[index], self.owner[index]
        targets = self.objects[index][np.arange(len(index))[:, None, None], owner]
        if rng is not None:
            mirror = self.fills_width[index] & (rng.random(len(index)) < 0.5)
            small[mirror], owner[mirror], targets[mirror] = (
                small[mirror, :, ::-1],
                owner[mirror, :, ::-1],
                targets[mirror, :, ::-1],
            )
            targets[mirror, ..., 2], targets[mirror, ..., 4] = 1 - targets[mirror, ..., 4], 1 - targets[mirror, ..., 2]
        return torch.from_numpy(small), torch.from_numpy(owner >= 0), torch.from_numpy(targets)


def _target(thing: dict[str, Any], scene: dict[str, Any], names: Names) -> list[float]:
    x0, y0, x1, y1 = thing["box"]
    width, height = scene["width"], scene["height"]
    kind, colour = names["kinds"].index(thing["kind"]), names["colours"].index(thing["color"])
    return [kind, colour, x0 / width, y0 / height, x1 / width, y1 / height]


def cell_losses(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Cross entropies of kind (nothing included) and colour, and the box loss; the last two on occupied cells only."""
    kinds, colours, boxes = (x.float() for x in outputs)
    weight = occupied.float()
    kind = torch.where(occupied, targets[..., 0].long() + 1, 0)
    colour = F.cross_entropy(colours.flatten(0, 2), targets[..., 1].long().flatten(), reduction="none")
    return {
        "kind": F.cross_entropy(kinds.flatten(0, 2), kind.flatten()),
        "colour": (colour * weight.flatten()).sum() / weight.sum().clamp(min=1),
        "box": box_loss(boxes, targets[..., 2:], weight),
    }


@torch.inference_mode()
def cell_figures(outputs: tuple[Tensor, ...], occupied: Tensor, targets: Tensor) -> dict[str, float]:
    """Shares of occupied cells whose kind, colour and box (IoU > 0.5) are right."""
    kinds, colours, boxes = (x.float()[occupied] for x in outputs)
    wanted = targets[occupied]
    return {
        "kind_right": (kinds[:, 1:].argmax(-1) == wanted[:, 0]).float().mean().item(),
        "colour_right": (colours.argmax(-1) == wanted[:, 1]).float().mean().item(),
        "box_right": (iou(boxes, wanted[:, 2:])[0] > 0.5).float().mean().item(),
    }


def warm_up(
    model: PixelLLM,
    data: Path,
    cache: Path,
    out: Path,
    names: Names,
    *,
    pictures: int,
    batch: int = 32,
    rate: float = 1e-3,
) -> None:
    """Train `model.semantic_encoder` on about `pictures` pictures; resumes from `out`."""
    encoder, heads = model.semantic_encoder, CellHeads(model.config.semantic.embed_dim, names)
    optimizer = adamw([encoder, heads], weight_decay=0.05)
    stage = Stage(out, "warmup", {"semantic_encoder": encoder, "heads": heads}, optimizer)
    total = pictures // batch
    first = stage.resume()
    if first >= total:
        return
    cells = CellData(data, cache, names)
    encoder.train()
    for step in range(first, total):
        rng = np.random.default_rng((7, step))  # a resumed run draws what an uninterrupted one would
        small, occupied, targets = cells.batch(rng.choice(len(cells), batch, replace=False), rng)
        set_learning_rate(optimizer, cosine(step, total, rate, warmup=200))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = heads(encoder(normalize_small(model, small)))
        losses = cell_losses(outputs, occupied, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_([*encoder.parameters(), *heads.parameters()], 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            values = {name: loss.item() for name, loss in losses.items()}
            stage.report(step + 1, total, values | cell_figures(outputs, occupied, targets))
        if (step + 1) % 200 == 0 or step + 1 == total:
            stage.save(step + 1)
