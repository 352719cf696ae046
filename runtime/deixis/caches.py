"""Keys and values of the decoder, and the state of one generation.

SelfCache: self-attention, one row per hypothesis, written in place by the graph; it is allocated at its capacity, which
may grow.
CrossCache: the encoder's output as each decoder layer sees it, one row per prompt, computed once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import CacheSpec, Manifest
from deixis.decoding import Top
from deixis.engines import Arrays, Engine

Floats = NDArray[np.float32]

BLOCK = (
    64  # tokens by which a cache grows: the step attends to all of it, so it should not be much longer than the text
)
CANDIDATES = 16  # next ids that the step looks at in each row, at most


@dataclass(frozen=True)
class CrossCache:
    """keys, values: one [N, heads, E, head_dim] per layer. encoder_mask: [N, E], 1 where the encoder has something."""

    keys: tuple[Floats, ...]
    values: tuple[Floats, ...]
    encoder_mask: Floats

    @classmethod
    def from_outputs(cls, outputs: Arrays, layers: int) -> CrossCache:
        """From what the text encoder graph gives."""

        def arrays(name: str) -> tuple[Floats, ...]:
            return tuple(np.ascontiguousarray(outputs[f"{name}.{i}"]) for i in range(layers))  # type: ignore[misc]

        return cls(arrays("cross_key"), arrays("cross_value"), np.ascontiguousarray(outputs["encoder_mask"]))  # type: ignore[arg-type]

    @property
    def rows(self) -> int:
        return len(self.encoder_mask)

    def inputs(self) -> dict[str, Floats]:
        """By the logical names of the decoder graphs."""
        named = {f"cross_key.{i}": key for i, key in enumerate(self.keys)}
        named |= {f"cross_value.{i}": value for i, value in enumerate(self.values)}
        return {"encoder_mask": self.encoder_mask, **named}


class SelfCache:
    """Self-attention keys and values: one [rows, heads, capacity, head_dim] array each per layer.

    `position` tokens of every row are filled. What lies behind is never read (it is kept finite, for masked attention
    multiplies it by 0), so rewinding costs nothing.
    """

    def __init__(self, spec: CacheSpec, rows: int, capacity: int) -> None:
        shape = (rows, spec.heads, capacity, spec.head_dim)
        self.keys = tuple(np.zeros(shape, spec.dtype) for _ in range(spec.layers))
        self.values = tuple(np.zeros(shape, spec.dtype) for _ in range(spec.layers))
        self.rows = rows
        self.capacity = capacity
        self.position = 0

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` tokens in new arrays: what is bound to a graph has to be bound anew."""
        filled = self.position

        def larger(old: NDArray[np.generic]) -> NDArray[np.generic]:
            new = np.zeros((*old.shape[:2], capacity, old.shape[3]), old.dtype)
            new[:, :, :filled] = old[:, :, :filled]
            return new

        self.keys, self.values = tuple(map(larger, self.keys)), tuple(map(larger, self.values))
        self.capacity = capacity

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays())

    def advance(self, tokens: int = 1) -> None:
        """`tokens` more are filled. Raises ValueError beyond the capacity."""
        if self.position + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, {self.position + tokens} were asked for")
        self.position += tokens

    def rewind(self, position: int) -> None:
        """Forget everything from `position` on. Raises ValueError when that much was never filled."""
        if not 0 <= position <= self.position:
            raise ValueError(f"cannot rewind to {position}: {self.position} tokens are filled")
        self.position = position

    def reorder(self, rows: NDArray[np.int64]) -> None:
        """Row r becomes what row rows[r] was; rows [R]. Only rows that change and only their filled part are copied."""
        moved = np.flatnonzero(rows != np.arange(self.rows))
        if len(moved):
            for array in self._arrays():
                array[moved, :, : self.position] = array[rows[moved], :, : self.position]

    def inputs(self) -> dict[str, NDArray[np.generic]]:
        named = {f"self_key.{i}": key for i, key in enumerate(self.keys)}
        return named | {f"self_value.{i}": value for i, value in enumerate(self.values)}

    def outputs(self) -> dict[str, NDArray[np.generic]]:
        """The same arrays under the names of the graph's outputs."""
        named = {f"self_key_out.{i}": key for i, key in enumerate(self.keys)}
        return named | {f"self_value_out.{i}": value for i, value in enumerate(self.values)}

    def _arrays(self) -> Iterator[NDArray[np.generic]]:
        yield from self.keys
        yield from self.values


@dataclass
class DecodeState:
    """Everything a running generation has: N prompts, R = N * beams rows, `self_cache.position` tokens consumed."""

    cross: CrossCache
    self_cache: SelfCache

    @classmethod
    def start(cls, cross: CrossCache, spec: CacheSpec, beams: int, capacity: int) -> DecodeState:
        return cls(cross, SelfCache(spec, cross.rows * beams, capacity))


@dataclass(frozen=True)
class StepHead:
    """What the step graph gives of the next id: logits over `vocabulary` ids, and the likeliest `candidates` of them.

    reduced: the graph finds the candidates; that of a bundle before 1.3 does not.
    """

    vocabulary: int
    candidates: int
    reduced: bool

    @classmethod
    def of(cls, manifest: Manifest) -> StepHead:
        vocabulary, own = manifest.tokenizer.vocab_size, manifest.reductions
        return cls(vocabulary, min(CANDIDATES, vocabulary) if own is None else own.candidates, own is not None)


class StepGraph:
    """The decoder-step graph tied to a self cache, for `width` ids a row at once: 1 when generating, more to prefill.

    All arrays are bound once; a run writes ids, position and bans in place. `given`: the graph's other inputs; `more`:
    the outputs wanted beside those of the head, which every run overwrites. `with_logits`: they are wanted too.
    """

    def __init__(
        self,
        engine: Engine,
        cache: SelfCache,
        width: int,
        head: StepHead,
        given: Arrays,
        more: Arrays,
        with_logits: bool,
    ) -> None:
        rows = cache.rows
        self.cache = cache
        self._head = head
        self._ids = np.zeros((rows, width), np.int64)
        self._position = np.zeros(1, np.int64)
        self._banned = np.full(rows, -1, np.int64)
        logits = np.zeros((rows, head.vocabulary), np.float32) if with_logits or not head.reduced else None
        kept = (rows, head.candidates)
        self._top = Top(np.zeros(kept, np.int64), np.zeros(kept, np.float32), logits)
        inputs = {"ids": self._ids, "position": self._position, **given, **cache.inputs()}
        outputs = {**more, **cache.outputs()}
        if head.reduced:
            inputs["banned"] = self._banned
            outputs |= {"top_ids": self._top.ids, "top_log_probs": self._top.log_probs}
        if logits is not None:
            outputs["logits"] = logits
        self._run = engine.bind("decoder_step", inputs, outputs)

    def run(self, ids: NDArray[np.int64], banned: NDArray[np.int64] | None = None) -> Top:
        """Consume ids [R, width]. Returns what may follow the last; the next run overwrites it. `banned` [R] is an id
        that shall not, -1 or None for none.

        Raises ValueError when the cache is full. A run that raises has consumed nothing.
        """
        position = self.cache.position
        self.cache.advance(self._ids.shape[1])
        self._ids[...] = ids
        self._position[0] = position
        self._banned[...] = -1 if banned is None else banned
        try:
            self._run()
        except BaseException:
            self.cache.rewind(position)
            raise
        if self._head.reduced:
            return self._top
        assert self._top.logits is not None
        return Top.of_logits(self._top.logits, banned, self._head.candidates)


class StepDecoder:
    """The decoder-step graph tied to a DecodeState, as search wants it (`decoding.Decoder`).

    capacity: most tokens of a row; the cache grows to it by blocks. None: it stays as it is. with_logits: steps give
    them too, which search over several beams needs anyway.
    """

    def __init__(
        self,
        engine: Engine,
        state: DecodeState,
        head: StepHead,
        points: int,
        capacity: int | None = None,
        with_logits: bool = False,
    ) -> None:
        self.state = state
        # Beams of one prompt compete, and may do so beyond the candidates of each: then logits decide.
        self._with_logits = with_logits or state.self_cache.rows > state.cross.rows
        self._engine, self._head = engine, head
        self._capacity = state.self_cache.capacity if capacity is None else capacity
        self._locations = np.zeros((state.self_cache.rows, 1, points, 2), np.float32)
        self._graph = self._bind()

    def step(self, ids: NDArray[np.int64], banned: NDArray[np.int64] | None = None) -> tuple[Top, Floats]:
        """Consume ids [R]. Returns what may follow, and locations [R, points, 2]; the next step overwrites both."""
        cache = self.state.self_cache
        if cache.position == cache.capacity < self._capacity:
            cache.grow(min(self._capacity, cache.capacity + BLOCK))
            self._graph = self._bind()
        return self._graph.run(ids[:, None], banned), self._locations[:, 0]

    def reorder(self, rows: NDArray[np.int64]) -> None:
        self.state.self_cache.reorder(rows)

    def _bind(self) -> StepGraph:
        cache, cross = self.state.self_cache, self.state.cross
        # Without a location head the graph has none.
        places = {"locations": self._locations} if self._locations.size else {}
        return StepGraph(self._engine, cache, 1, self._head, cross.inputs(), places, self._with_logits)
