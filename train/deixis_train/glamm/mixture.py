"""Which samples a step of GLaMM's training takes (section 9.4), and the batches they become.

With mixing "types" there is a feed per type of task. For every place in it a source is drawn by its rate, then a sample
of that, with replacement, as the reference does. A feed of one source, or the walk through several ("walk"), goes
through all samples in random order, again and again. With "pictures" it goes through the pictures, and a row asks
everything that the sources know about one, in conversations that do not see each other. What a place holds follows from
seed and place alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch

from deixis_train.data.formats.errors import DataError
from deixis_train.glamm.batches import GlammBatch, expand_rows, share_beginning
from deixis_train.glamm.conversations import Labeller
from deixis_train.glamm.features import read_inputs
from deixis_train.glamm.items import Asking, Item, join_items, make_item
from deixis_train.glamm.looking import find_looks
from deixis_train.glamm.pictures import grounding_size
from deixis_train.glamm.pointing import find_pointed
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

    @cached_property
    def of_picture(self) -> Mapping[str, list[int]]:
        """Numbers of the samples about each picture."""
        found: dict[str, list[int]] = {}
        for index in range(len(self.samples)):
            found.setdefault(self.samples[index].key, []).append(index)
        return found

    def try_item(self, index: int, rng: np.random.Generator) -> Item | None:
        """Of that sample; of questions, with others about the same picture. None if there is nothing to ask for."""
        sample = self.samples[index]
        found = make_item(sample, self.asking, rng)
        if found is None or self.asking.task != "ask" or self.asking.most <= 1:
            return found
        others = [other for other in self.of_picture[sample.key] if other != index]
        chosen = [self.samples[others[k]] for k in rng.permutation(len(others))[: self.asking.most - 1]]
        return join_items([found, *(more for s in chosen if (more := make_item(s, self.asking, rng)) is not None)])

    def item(self, index: int, rng: np.random.Generator) -> Item:
        """Of that sample, or of another one if it has nothing to ask for. Raises DataError if none has."""
        for _ in range(TRIES):
            found = self.try_item(index, rng)
            if found is not None:
                return found
            index = int(rng.integers(len(self.samples)))
        raise DataError(
            f"source {self.spec.name!r}: {TRIES} samples in a row have nothing for the task {self.asking.task!r}"
        )


Chosen = list[tuple[ItemSource, Item]]  # what a row asks: its conversations and their sources


@dataclass
class ItemFeed:
    """See `training.family.Feed`. weight: how often a step takes it. factor: on its losses."""

    name: str
    model: Glamm
    labeller: Labeller
    sources: Sequence[ItemSource]
    order: Literal["draw", "walk", "pictures"]
    seed: int
    weight: float = 1.0
    factor: float = 1.0
    pictures: int = 0
    looks: bool = False  # batches say where states should look
    points: bool = False  # batches say where the things are
    most_masks: int = 0  # that are decoded of a picture; 0: all

    def __post_init__(self) -> None:
        if len({source.learns_masks for source in self.sources if TYPE_OF[source.spec.task] == "mask"}) > 1:
            raise DataError(
                f"sources of {self.name!r}: 'mask' in the losses of some, not of others; they mix in a batch"
            )
        self._rates = np.array([source.spec.weight for source in self.sources], float)
        self._ends = np.cumsum([len(source.samples) for source in self.sources])
        by_picture = [source.of_picture for source in self.sources] if self.order == "pictures" else []
        self._pictures = list(dict.fromkeys(name for pictures in by_picture for name in pictures))

    def __len__(self) -> int:
        return len(self._pictures) if self.order == "pictures" else int(self._ends[-1])

    def choose(self, start: int, count: int) -> list[tuple[ItemSource, Item]]:
        """The items at the places `start`.. and their sources; not for "pictures"."""
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

    def choose_rows(self, start: int, count: int) -> list[Chosen]:
        """What the rows at the places `start`.. ask. Raises DataError for a picture that nothing can be asked about."""
        if self.order != "pictures":
            return [[one] for one in self.choose(start, count)]
        rows = []
        for place, number in enumerate(shuffled(len(self), self.seed, start, count), start=start):
            rng, name = np.random.default_rng((self.seed, 2, place)), self._pictures[number]
            row: Chosen = []
            for source in self.sources:
                if name in source.of_picture:
                    item = source.try_item(int(rng.choice(source.of_picture[name])), rng)
                    row += [(source, item)] if item is not None else []
            if not row:
                raise DataError(f"sources of {self.name!r}: there is nothing to ask about {name}")
            rows.append(row)
        return rows

    def make(self, start: int, count: int) -> GlammMicro:
        chosen = self.choose_rows(start, count)
        batch, config = make_batch(chosen, self.model, self.labeller), self.model.config
        items = [[item for _, item in row] for row in chosen]
        if self.looks:
            batch.look = find_looks(items, batch.rows, config)
        if self.points:
            batch.pointed = find_pointed(items, batch.rows, config)
        if self.most_masks and batch.masks is not None:
            _draw_masks(batch, self.most_masks, config.ids.mask, np.random.default_rng((self.seed, 3, start)))
        return GlammMicro(self.name, self.factor, batch)

    def _place(self, number: int) -> tuple[int, int]:
        source = int(np.searchsorted(self._ends, number, side="right"))
        return source, number - (int(self._ends[source - 1]) if source else 0)


def make_batch(chosen: Sequence[Chosen], model: Glamm, labeller: Labeller) -> GlammBatch:
    """The batch of some rows. What frozen encoders see is taken from their stores, where there are any."""
    config = model.config
    said = [[labeller(item.turns, source.spec.text_length) for source, item in row] for row in chosen]
    together = [share_beginning([ids for ids, _ in row], [labels for _, labels in row]) for row in said]
    first = [row[0] for row in chosen]
    items = [join_items([item for _, item in row]) for row in chosen]
    picture = list(range(len(items)))
    counts = [len(item.boxes) for item in items]
    ways = [way for _, _, way in together] if any(len(row) > 1 for row in chosen) else None
    ids, labels = [ids for ids, _, _ in together], [labels for _, labels, _ in together]
    rows = expand_rows(ids, labels, picture, counts, config, len(items), ways)
    batch = GlammBatch(rows, torch.tensor(picture))
    # Of the sources of a row, one that learns masks has the stores for it.
    learning = [next((one for one in row if one[0].learns_masks), row[0]) for row in chosen]
    masked = any(source.learns_masks for source, _ in learning)
    stores = learning[0][0].stores
    reads_small, reads_grounding = "clip" not in stores, masked and "sam" not in stores
    if reads_small or reads_grounding:
        seen = [read_inputs(i.sample.image, model, small=reads_small, grounding=reads_grounding) for i in items]
        if reads_small:
            batch.global_images = torch.from_numpy(np.stack([s.small for s in seen if s.small is not None]))
        if reads_grounding:
            batch.grounding_images = torch.from_numpy(np.stack([s.grounding for s in seen if s.grounding is not None]))
    if "clip" in stores:
        levels = torch.from_numpy(_stored(first, "clip"))
        batch.levels = list(levels.unbind(1))
    if masked:
        if "sam" in stores:
            batch.sam = torch.from_numpy(_stored(learning, "sam"))
        sizes = [_valid(item, config.image_size) for item in items]
        batch.valid_hw = torch.tensor(sizes, dtype=torch.float32)
        batch.masks = [torch.from_numpy(_masks(item)) for item in items]
    if any(counts):
        sides = [np.array([[*item.boxes]], np.float32).reshape(-1, 4) / _frame(item) for item in items]
        batch.boxes = torch.from_numpy(np.concatenate(sides))
        batch.box_picture = torch.tensor([p for p, count in zip(picture, counts, strict=True) for _ in range(count)])
    return batch


def _draw_masks(batch: GlammBatch, most: int, mask_id: int, rng: np.random.Generator) -> None:
    """Leave at most so many of every picture's masks to be decoded. A row is a picture."""
    assert batch.masks is not None
    counts = (batch.rows.ids == mask_id).sum(1).tolist()
    drawn = [np.sort(rng.permutation(count)[:most]) for count in counts]
    before = np.cumsum([0, *counts[:-1]])
    batch.decoded = torch.from_numpy(np.concatenate([own + first for own, first in zip(drawn, before, strict=True)]))
    batch.masks = [masks[torch.from_numpy(own)] for masks, own in zip(batch.masks, drawn, strict=True)]


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
