"""A micro-batch: what one forward and backward pass takes, as tensors, and how it is made of samples.

Making one depends on its arguments only, so it can be done ahead of time, in any thread, and again after a restart.
Letters in shapes as in `models.pixelllm`; G = g * g cells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deixis_train.data.batches import Batch, Example, collate
from deixis_train.data.preparation.geometry import place_fitted
from deixis_train.data.samples import Sample
from deixis_train.localisation.coding import Localiser, say_examples
from deixis_train.models.prompt_encoder import BOX_BOTTOM_RIGHT, BOX_TOP_LEFT, NO_MASK, NOT_A_POINT, POSITIVE
from deixis_train.training.cells import Floats, Owners, cell_targets, meant_cells, same_thing
from deixis_train.training.features import FeatureStore
from deixis_train.training.recipe import SourceSpec, StageSpec

Prepare = Callable[[Sample, np.random.Generator], Example]


class Samples(Protocol):
    """Samples with random access."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass
class Micro:
    """Optional tensors are None where the stage does not ask for them."""

    source: str
    weight: float  # of its losses
    batch: Batch | None = None
    sam: Tensor | None = None  # cached [B, g, g, C2], float16
    semantic: Tensor | None = None  # cached [B, g, g, C1], float16
    small: Tensor | None = None  # semantic encoder's input [B, s, s, 3], uint8
    whole: Tensor | None = None  # boxes of the whole pictures [B, 4], px
    points: Tensor | None = None  # prompts of the rows that do not mean whole pictures: (x, y) px [K, P, 2]
    labels: Tensor | None = None  # [K, P]
    occupied: Tensor | None = None  # [B, g, g] bool
    targets: Tensor | None = None  # [B, g, g, 6], see `cell_targets`
    said: Tensor | None = None  # tokens of locations, and ends, where locations are said as tokens [R, L] bool
    look: Tensor | None = None  # cells that each token points at [R, L, G] bool
    meant: Tensor | None = None  # cells that a row's box means [R, G] bool

    def to(self, device: torch.device) -> Micro:
        """The same on a device; changes this object. Memory is pinned on the way to a GPU."""
        for holder in (self, self.batch):
            for spec in fields(holder) if holder is not None else ():
                value = getattr(holder, spec.name)
                if isinstance(value, Tensor) and value.device != device:
                    if device.type == "cuda":
                        value = value.pin_memory()
                    setattr(holder, spec.name, value.to(device, non_blocking=True))
        return self


@dataclass(frozen=True)
class Truth:
    """Owners of cells and things of a picture."""

    owner: Owners
    table: Floats


@dataclass
class Feed:
    """Makes micro-batches of one source. `truth` by picture name, where the stage needs cells."""

    stage: StageSpec
    source: SourceSpec
    samples: Samples
    prepare: Prepare
    stores: Mapping[str, FeatureStore]  # of the folder of the source's pictures
    truth: Mapping[str, Truth]
    image_size: int
    seed: int
    localiser: Localiser | None = None  # says locations as tokens, if the recipe wants them so

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def weight(self) -> float:
        return self.source.weight

    @property
    def pictures(self) -> int:
        return self.source.pictures

    @property
    def factor(self) -> float:
        """On the losses."""
        return self.source.weight if self.stage.mixing == "all" else 1.0

    def __len__(self) -> int:
        return len(self.samples)

    def indices(self, start: int, count: int) -> list[int]:
        """Samples at the places start.. of an endless row of epochs, each in an order of its own."""
        return shuffled(len(self.samples), self.seed, start, count)

    def make(self, start: int, count: int) -> Micro:
        """The pictures at the places `start`.. of the source; every picture's draws depend on its place alone."""
        chosen = [self.samples[i] for i in self.indices(start, count)]
        names = [sample.key for sample in chosen]
        if self.stage.objective == "grid":
            return self._grid(chosen, names, np.random.default_rng((self.seed, 1, start)))
        stored = {what: torch.from_numpy(self.stores[what].get(names)) for what in self.stage.cache}
        micro = Micro(self.source.name, self.factor, **stored)  # pyright: ignore[reportArgumentType]
        wants_cells = self.stage.objective == "prompt_grid" or self.stage.auxiliary.cells > 0
        if wants_cells:
            truth = [self.truth[name] for name in names]
            occupied, targets = cell_targets([t.owner for t in truth], [t.table for t in truth])
            micro.occupied, micro.targets = torch.from_numpy(occupied), torch.from_numpy(targets)
        if self.stage.objective == "prompt_grid":
            sizes = [place_fitted((s.height, s.width), self.image_size).valid for s in chosen]
            micro.whole = torch.tensor([[0.0, 0.0, width, height] for height, width in sizes])
            return micro
        draws = [np.random.default_rng((self.seed, 2, start + i)) for i in range(count)]
        examples = [self.prepare(sample, rng) for sample, rng in zip(chosen, draws, strict=True)]
        if self.localiser is not None:
            examples, said = say_examples(examples, self.localiser)
            micro.said = torch.from_numpy(said)
        # Pictures are stacked below, as bytes: `collate` would make floats of them.
        micro.batch = batch = collate(examples, self.source.name, frozenset(self.source.losses), _NOTHING)
        batch.features = None
        if "mask" in batch.losses:  # the mask adapter reads the padding too
            lacking = max(0, self.source.text_length - batch.text.shape[1])
            batch.text, batch.points = F.pad(batch.text, (0, lacking)), F.pad(batch.points, (0, 0, 0, lacking))
        micro.whole = torch.tensor([[0.0, 0.0, e.valid_hw[1], e.valid_hw[0]] for e in examples])
        if self.stage.sees_pictures:
            batch.images = torch.from_numpy(np.stack([e.image for e in examples if e.image is not None]))
        self._cells_of_text(micro, examples, names)
        as_click = np.random.default_rng((self.seed, 3, start)).random() < self.source.point_prompts
        self._prompts(micro, examples, names, draws, as_click)
        return micro

    def _grid(self, chosen: Sequence[Sample], names: Sequence[str], rng: np.random.Generator) -> Micro:
        """Half of the pictures that fill the width (so that no padding moves) are mirrored."""
        small = self.stores["small"].get(names)
        truth = [self.truth[name] for name in names]
        occupied, targets = cell_targets([t.owner for t in truth], [t.table for t in truth])
        fills = np.array([sample.width >= sample.height for sample in chosen])
        mirror = fills & (rng.random(len(chosen)) < 0.5)
        for array in (small, occupied, targets):
            array[mirror] = array[mirror, :, ::-1]
        targets[mirror, ..., 2], targets[mirror, ..., 4] = 1 - targets[mirror, ..., 4], 1 - targets[mirror, ..., 2]
        return Micro(
            self.source.name,
            self.factor,
            small=torch.from_numpy(small),
            occupied=torch.from_numpy(occupied),
            targets=torch.from_numpy(targets),
        )

    def _cells_of_text(self, micro: Micro, examples: Sequence[Example], names: Sequence[str]) -> None:
        auxiliary, batch = self.stage.auxiliary, micro.batch
        assert batch is not None
        if not (auxiliary.look or auxiliary.match):
            return
        length, grid = batch.text.shape[1], self.truth[names[0]].owner.shape[0]
        look = np.zeros((len(batch.text), length, grid * grid), bool)
        meant = np.zeros((len(batch.text), grid * grid), bool)
        row = 0
        for example, name in zip(examples, names, strict=True):
            owner, rows = self.truth[name].owner, len(example.text)
            boxes = np.concatenate([example.points[:, :length].reshape(-1, 4), example.boxes])
            # The same few boxes stand at many positions.
            unique, place = np.unique(boxes, axis=0, return_inverse=True)
            cells = meant_cells(unique, example.instances, owner, self.image_size)[place.reshape(-1)]
            own = cells[:-rows].reshape(rows, -1, grid * grid)
            look[row : row + rows, : own.shape[1]] = own
            meant[row : row + rows] = cells[-rows:]
            row += rows
        micro.look = torch.from_numpy(look) if auxiliary.look else None
        if auxiliary.match and bool((batch.boxes.amax(-1) > 0).any()):
            micro.meant = torch.from_numpy(meant)

    def _prompts(
        self,
        micro: Micro,
        examples: Sequence[Example],
        names: Sequence[str],
        draws: Sequence[np.random.Generator],
        as_click: bool,
    ) -> None:
        """Points and labels of the prompts that mean a part of the picture. A batch asks one way: its prompts have
        equally many tokens."""
        points, labels = [], []
        for example, name, rng in zip(examples, names, draws, strict=True):
            for k in np.flatnonzero(~example.whole):
                if as_click:
                    box = example.boxes[k] if example.boxes[k].any() else example.prompts[k]
                    owner = self.truth[name].owner if self.truth else None
                    points.append([_inside(box, example.instances, owner, self.image_size, rng), (0.0, 0.0)])
                    labels.append([POSITIVE, NOT_A_POINT])
                else:
                    x0, y0, x1, y1 = (float(v) for v in example.prompts[k])
                    points.append([(x0, y0), (x1, y1), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)])
                    labels.append([BOX_TOP_LEFT, BOX_BOTTOM_RIGHT, NO_MASK, NO_MASK, NO_MASK])
        if points:
            micro.points, micro.labels = torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def shuffled(total: int, seed: int, start: int, count: int) -> list[int]:
    """The places `start`.. of an endless row of epochs, each of all numbers below `total` in an order of its own."""
    epochs = range(start // total, (start + count - 1) // total + 1)
    orders = np.concatenate([np.random.default_rng((seed, epoch)).permutation(total) for epoch in epochs])
    offset = start - epochs[0] * total
    return [int(i) for i in orders[offset : offset + count]]


_NOTHING = torch.empty(0)


def _inside(
    box: Floats, instances: Floats, owner: Owners | None, size: int, rng: np.random.Generator
) -> tuple[float, float]:
    """A place on the thing that a box means, px: in one of its cells and in the box; else the middle of the box."""
    thing = same_thing(box[None], instances)[0]
    found = np.argwhere(owner == thing) if owner is not None and thing >= 0 else np.zeros((0, 2))
    if not len(found) or owner is None:
        return float(box[0] + box[2]) / 2, float(box[1] + box[3]) / 2
    cell = size / owner.shape[0]
    row, column = found[rng.integers(len(found))]
    x, y = (column + rng.random()) * cell, (row + rng.random()) * cell
    return float(np.clip(x, box[0], box[2])), float(np.clip(y, box[1], box[3]))
