"""Stage 2: the semantic encoder learns what lies in each cell of its grid, and the box of that thing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.tabletop.cells import CellHeads, CellTargets, Names, cell_figures, cell_losses
from deixis_train.tabletop.run import Stage, adamw, cosine, set_learning_rate
from deixis_train.tabletop.scenes import normalize_small, read_shard, shards


class CellData:
    """Small pictures and cell targets of every prepared shard, in memory."""

    def __init__(self, data: Path, cache: Path, names: Names) -> None:
        paths = [p for p in shards(data) if (cache / f"{p.stem}.owner.npy").exists()]
        scenes = [scene for p in paths for scene in read_shard(p)]
        self.small = np.concatenate([np.load(cache / f"{p.stem}.small.npy") for p in paths])
        self.targets = CellTargets(
            scenes, np.concatenate([np.load(cache / f"{p.stem}.owner.npy") for p in paths]), names
        )
        size = max(max(scene["width"], scene["height"]) for scene in scenes)
        self.fills_width = np.array([scene["width"] == size for scene in scenes])

    def __len__(self) -> int:
        return len(self.small)

    def batch(self, index: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Small pictures uint8 [B, s, s, 3], occupied [B, g, g] bool, targets [B, g, g, 6] (kind, colour, box).

        Half of the pictures that fill the width (so that no padding moves) are mirrored.
        """
        small, (occupied, targets) = self.small[index], self.targets[index]
        mirror = self.fills_width[index] & (rng.random(len(index)) < 0.5)
        for array in (small, occupied, targets):
            array[mirror] = array[mirror, :, ::-1]
        targets[mirror, ..., 2], targets[mirror, ..., 4] = 1 - targets[mirror, ..., 4], 1 - targets[mirror, ..., 2]
        return torch.from_numpy(small), torch.from_numpy(occupied), torch.from_numpy(targets)


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
        if (step + 1) % 25 == 0:
            values = {name: loss.item() for name, loss in losses.items()}
            stage.report(step + 1, total, values | cell_figures(outputs, occupied, targets))
        if (step + 1) % 100 == 0 or step + 1 == total:
            stage.save(step + 1)
