"""Which samples a step of GLaMM's training takes (section 9.4), and the batches they become.

With mixing "types" there is a feed per type of task. For every place in it a source is drawn by its rate, then a sample
of that, with replacement, as the reference does. A feed of one source, or the walk through several ("walk"), goes
through all samples in random order, again and again. What a place holds follows from seed and place alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from deixis_train.data.formats.errors import DataError
from deixis_train.glamm.batches import GlammBatch, expand_rows
from deixis_train.glamm.conversations import Labeller
from deixis_train.glamm.features import read_inputs
from deixis_train.glamm.items import Asking, Item, make_item
from deixis_train.glamm.looking import find_looks
from deixis_train.glamm.pictures import grounding_size
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.training.features import FeatureStore
from deixis_train.training.micro import Samples, shuffled
from deixis_train.training.recipe import TYPE_OF, SourceSpec

TRIES = 100  # samples that may have nothing to ask for, one after the other


@dataclass
class GlammMicro:
    """A batch, what it is logged under, and the factor on its losses."""

    source: str
    weight: float
    batch: GlammBatch

    def to(self, device: torch.device) -> GlammMicro:
        return replace(self, batch=self.batch.to(device))


@dataclass(frozen=True)
class ItemSource:
    """A source with its samples and the features of its pictures."""

    spec: SourceSpec
    samples: Samples
    asking: Asking
    stores: Mapping[str, FeatureStore]

    @property
    def learns_masks(self) -> bool:
        return "mask" in self.spec.losses

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """Of that sample, or of another one if it has nothing to ask for. Raises DataError if none has."""
        for _ in range(TRIES):
            found = make_item(self.samples[index], self.asking, rng)
            if found is not None:
                return found
            index = int(rng.integers(len(self.samples)))
        raise DataError(
            f"source {self.spec.name!r}: {TRIES} samples in a row have nothing for the task {self.asking.task!r}"
        )


@dataclass
class ItemFeed:
    """See `training.family.Feed`. weight: how often a step takes it. factor: on its losses."""

    name: str
    model: Glamm
    labeller: Labeller
    sources: Sequence[ItemSource]
    order: Literal["draw", "walk"]
    seed: int
    weight: float = 1.0
    factor: float = 1.0
    pictures: int = 0
    looks: bool = False  # batches say where states should look

    def __post_init__(self) -> None:
        if len({source.learns_masks for source in self.sources if TYPE_OF[source.spec.task] == "mask"}) > 1:
            raise DataError(
                f"sources of {self.name!r}: 'mask' in the losses of some, not of others; they mix in a batch"
            )
        self._rates = np.array([source.spec.weight for source in self.sources], float)
        self._ends = np.cumsum([len(source.samples) for source in self.sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def choose(self, start: int, count: int) -> list[tuple[ItemSource, Item]]:
        """The items at the places `start`.. and their sources."""
        draws = [np.random.default_rng((self.seed, 2, start + k)) for k in range(count)]
        if self.order == "walk":
            places = [self._place(n) for n in shuffled(len(self), self.seed, start, count)]
        else:
            places = []
            for rng in draws:
                number = int(rng.choice(len(self.sources), p=self._rates / self._rates.sum()))
                places.append((number, int(rng.integers(len(self.sources[number].samples)))))
        chosen = []
        for (number, index), rng in zip(places, draws, strict=True):
            source = self.sources[number]
            chosen.append((source, source.item(index, rng)))
        return chosen

    def make(self, start: int, count: int) -> GlammMicro:
        chosen = self.choose(start, count)
        batch = make_batch(chosen, self.model, self.labeller)
        if self.looks:
            batch.look = find_looks([item for _, item in chosen], batch.rows, self.model.config)
        return GlammMicro(self.name, self.factor, batch)

    def _place(self, number: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._ends, number, side="right"))
        return source, number - (int(self._ends[source - 1]) if source else 0)


def make_batch(chosen: Sequence[tuple[ItemSource, Item]], model: Glamm, labeller: Labeller) -> GlammBatch:
    """The batch of some items. What frozen encoders see is taken from their stores, where there are any."""
    config, items = model.config, [item for _, item in chosen]
    said = [labeller(item.turns, source.spec.text_length) for source, item in chosen]
    picture = list(range(len(items)))
    counts = [len(item.boxes) for item in items]
    rows = expand_rows([i for i, _ in said], [labels for _, labels in said], picture, counts, config, len(items))
    batch = GlammBatch(rows, torch.tensor(picture))
    masked = any(source.learns_masks for source, _ in chosen)
    stores = chosen[0][0].stores
    reads_small, reads_grounding = "clip" not in stores, masked and "sam" not in stores
    if reads_small or reads_grounding:
        seen = [read_inputs(i.sample.image, model, small=reads_small, grounding=reads_grounding) for i in items]
        if reads_small:
            batch.global_images = torch.from_numpy(np.stack([s.small for s in seen if s.small is not None]))
        if reads_grounding:
            batch.grounding_images = torch.from_numpy(np.stack([s.grounding for s in seen if s.grounding is not None]))
    if "clip" in stores:
        levels = torch.from_numpy(_stored(chosen, "clip"))
        batch.levels = list(levels.unbind(1))
    if masked:
        if "sam" in stores:
            batch.sam = torch.from_numpy(_stored(chosen, "sam"))
        sizes = [_valid(item, config.image_size) for item in items]
        batch.valid_hw = torch.tensor(sizes, dtype=torch.float32)
        batch.masks = [torch.from_numpy(_masks(item)) for item in items]
    if any(counts):
        sides = [np.array([[*item.boxes]], np.float32).reshape(-1, 4) / _frame(item) for item in items]
        batch.boxes = torch.from_numpy(np.concatenate(sides))
        batch.box_picture = torch.tensor([p for p, count in zip(picture, counts, strict=True) for _ in range(count)])
    return batch


def _stored(chosen: Sequence[tuple[ItemSource, Item]], what: str) -> np.ndarray:
    return np.concatenate([source.stores[what].get([item.sample.key]) for source, item in chosen])


def _masks(item: Item) -> np.ndarray:
    if item.masks is not None:
        return item.masks
    return np.zeros((0, item.sample.height, item.sample.width), np.uint8)


def _frame(item: Item) -> np.ndarray:
    return np.array([item.sample.width, item.sample.height] * 2, np.float32)


def _valid(item: Item, size: int) -> tuple[int, int]:
    return grounding_size((item.sample.height, item.sample.width), size)
