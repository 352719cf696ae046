"""The language model over one conversation, or several in lockstep: ids in, next ids and states out (GLaMM section 5).

Positions are those of the expanded sequence, where a picture takes as many as it has features. Every position is
computed once: its keys and values stay in the cache, its state is kept for the masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import CacheSpec, ConversationSpec
from deixis.caches import SelfCache, StepGraph, StepHead
from deixis.conversation import IMAGE_ID, REGION
from deixis.decoding import Top
from deixis.engines import Engine
from deixis.errors import PromptError, TextTooLongError

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]

BLOCK = 256  # positions by which the cache grows, so that a step costs what the text is long, not what it may become


class LanguageSession:
    """R rows that consume the same number of ids at a time. For one thread; comes from `GlammPipeline.session`.

    pictures: features [T0, D] of each row's picture. capacity: most positions. expect: positions to make room for.
    widest: most positions of one graph run.
    """

    def __init__(
        self,
        engine: Engine,
        conversation: ConversationSpec,
        cache: CacheSpec,
        head: StepHead,
        pictures: Sequence[Floats],
        capacity: int,
        expect: int,
        widest: int,
    ) -> None:
        self._engine = engine
        self._spec = conversation
        self._head = head
        self._pictures = list(pictures)
        self._widest = widest
        self.capacity = capacity
        self._cache = SelfCache(cache, len(pictures), self._block(expect))
        self._width = pictures[0].shape[1]
        self._states = np.zeros((len(pictures), self._cache.capacity, self._width), np.float32)
        self._step_state = np.zeros((len(pictures), 1, self._width), np.float32)
        self._step: StepGraph | None = None

    @property
    def rows(self) -> int:
        return len(self._pictures)

    @property
    def position(self) -> int:
        """Positions consumed by every row, those of pictures included."""
        return self._cache.position

    @property
    def states(self) -> Floats:
        """States [R, position, D] after the final norm. What follows position p is predicted by states[:, p]: a mask
        whose id stands at p belongs to the state at p - 1 (section 6.1).
        """
        return self._states[:, : self.position]

    @property
    def nbytes(self) -> int:
        return self._cache.nbytes + self._states.nbytes

    def feed(
        self, ids: Ids, visual: Sequence[Floats | None] | None = None, banned: Ids | None = None
    ) -> tuple[Top, Floats]:
        """Consume ids [R, S]; each IMAGE_ID stands for the features of the row's picture.

        visual: for each row the vectors [k, D] of its region ids, in their order; None where a row has none.
        banned: [R], an id that shall not follow, -1 for none.
        Returns what may follow, logits included, and states [R, S', D] of what was consumed, S' with the pictures
        expanded. Raises TextTooLongError when it does not fit; PromptError when a row has not as many vectors as region
        ids; ValueError for rows of different lengths. What raises has consumed nothing.
        """
        expanded, index, vectors = self._splice(np.asarray(ids, np.int64), visual or [None] * self.rows)
        start, count = self.position, expanded.shape[1]
        self._make_room(start + count)
        try:
            top = self._feed_parts(expanded, index, vectors, banned)
        except BaseException:
            self._cache.rewind(start)
            raise
        return top, self._states[:, start : start + count]

    def step(self, ids: Ids, banned: Ids | None = None) -> tuple[Top, Floats]:
        """Consume one id per row, ids [R]. Returns what may follow, as `feed` does, which the next step overwrites, and
        states [R, D].

        Raises TextTooLongError when the cache is full.
        """
        position = self.position
        self._make_room(position + 1)
        if self._step is None:
            given = {
                "visual": np.zeros((1, self._width), np.float32),
                "embed_index": np.full((self.rows, 1), -1, np.int64),
            }
            more = {"states": self._step_state}
            self._step = StepGraph(self._engine, self._cache, 1, self._head, given, more, True)
        top = self._step.run(ids[:, None], banned)
        self._states[:, position] = self._step_state[:, 0]
        return top, self._states[:, position]

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on; costs nothing. Raises ValueError when that much was never consumed."""
        self._cache.rewind(position)

    def _feed_parts(self, ids: Ids, index: Ids, vectors: Floats, banned: Ids | None) -> Top:
        """Run what is spliced, as wide as the bundle allows. Returns what may follow the last id."""
        top: Top | None = None
        for begin in range(0, ids.shape[1], self._widest):
            part = ids[:, begin : begin + self._widest]
            width, place = part.shape[1], self.position
            states = np.empty((self.rows, width, self._width), np.float32)
            given = {"visual": vectors, "embed_index": np.ascontiguousarray(index[:, begin : begin + width])}
            graph = StepGraph(self._engine, self._cache, width, self._head, given, {"states": states}, True)
            top = graph.run(part, banned)
            self._states[:, place : self.position] = states
        assert top is not None, "there is always an id to feed"
        return top

    def _block(self, positions: int) -> int:
        """Whole blocks that hold so many positions, the capacity at most."""
        return min(self.capacity, -(-max(positions, 1) // BLOCK) * BLOCK)

    def _make_room(self, positions: int) -> None:
        if positions > self.capacity:
            raise TextTooLongError(
                f"the conversation has {positions} tokens, the picture's included; at most {self.capacity} fit: "
                "ask less, start a new one, or load the model with a larger cache_capacity"
            )
        if positions <= self._cache.capacity:
            return
        self._cache.grow(self._block(positions))
        states = np.zeros((self.rows, self._cache.capacity, self._width), np.float32)
        states[:, : self.position] = self.states
        self._states, self._step = states, None

    def _splice(self, ids: Ids, visual: Sequence[Floats | None]) -> tuple[Ids, Ids, Floats]:
        """Expanded ids [R, S'], which vector stands at each place [R, S'] (-1: the embedding of the id), and the
        vectors [V, D] (section 5.4).
        """
        if ids.ndim != 2 or len(ids) != self.rows or not ids.shape[1]:
            raise ValueError(f"ids must be [{self.rows}, S], found {list(ids.shape)}")
        if len(visual) != self.rows:
            raise ValueError(f"{len(visual)} rows of vectors for {self.rows} rows of ids")
        if len({int((row == IMAGE_ID).sum()) for row in ids}) > 1:
            raise ValueError("rows in lockstep must have equally many pictures")
        vectors: list[Floats] = []
        starts: dict[int, int] = {}
        total = 0

        def add(array: Floats) -> int:
            """The place of an array's first row; rows that show the same picture share it."""
            nonlocal total
            if id(array) not in starts:
                starts[id(array)] = total
                vectors.append(array)
                total += len(array)
            return starts[id(array)]

        every_id, every_index = [], []
        for row, picture, regions in zip(ids, self._pictures, visual, strict=True):
            repeats = np.where(row == IMAGE_ID, len(picture), 1)
            expanded = np.repeat(row, repeats)
            index = np.full(len(expanded), -1, np.int64)
            in_picture = expanded == IMAGE_ID
            if in_picture.any():
                index[in_picture] = add(picture) + np.arange(in_picture.sum()) % len(picture)
                expanded[in_picture] = 0  # any id of the vocabulary: it is not looked at
            named = np.zeros(len(row), bool) if self._spec.region_id is None else row == self._spec.region_id
            count = 0 if regions is None else len(regions)
            if count != named.sum():
                raise PromptError(f"the text names {named.sum()} regions by {REGION}, and {count} boxes were given")
            if regions is not None and count:
                index[np.repeat(named, repeats)] = add(regions) + np.arange(count)
            every_id.append(expanded)
            every_index.append(index)
        if not vectors:
            vectors.append(np.zeros((1, self._width), np.float32))  # the graph wants one
        return np.stack(every_id), np.stack(every_index), np.ascontiguousarray(np.concatenate(vectors), np.float32)
