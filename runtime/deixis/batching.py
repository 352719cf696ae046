"""Many (scene, prompt) pairs in few graph runs: grouping, padding, limits."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from deixis.geometry import Geometry

T = TypeVar("T")
Floats = NDArray[np.float32]


@dataclass(eq=False)
class SceneFeatures:
    """What the image encoders gave for one picture.

    fused: [gh, gw, C1 + C2], semantic channels first. sam: [h, w, C2], for masks. whole_prefix: [Q, D], the visual
    prefix of the whole picture, which caption, refer and trace share; `Pipeline.prefix` sets it when first needed.
    """

    fused: Floats
    sam: Floats
    geometry: Geometry
    whole_prefix: Floats | None = None

    @property
    def nbytes(self) -> int:
        """Of the two maps. whole_prefix comes later and is not counted: a few dozen vectors beside thousands."""
        return self.fused.nbytes + self.sam.nbytes


def group_indices(keys: Iterable[Hashable]) -> list[list[int]]:
    """Indices of equal keys together, in the order in which the keys first came."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def chunk_rows(scenes: Sequence[object], rows: int, pictures: int) -> list[list[int]]:
    """Indices in runs of at most `rows`, of at most `pictures` different scenes each."""
    chunks: list[list[int]] = []
    seen: set[int] = set()
    for index, scene in enumerate(scenes):
        new = id(scene) not in seen
        if not chunks or len(chunks[-1]) >= rows or (new and len(seen) >= pictures):
            chunks.append([])
            seen = set()
        chunks[-1].append(index)
        seen.add(id(scene))
    return chunks


def stack_scenes(scenes: Sequence[T], get: Callable[[T], Floats]) -> tuple[Floats, NDArray[np.int64]]:
    """One map per different scene [B, ...], and which of them each row looks at [R]. A single scene is not copied."""
    groups = group_indices(id(scene) for scene in scenes)
    index = np.empty(len(scenes), np.int64)
    for number, rows in enumerate(groups):
        index[rows] = number
    maps = [get(scenes[rows[0]]) for rows in groups]
    return (maps[0][None] if len(maps) == 1 else np.stack(maps)), index


def pad_ids(rows: Sequence[Sequence[int]], length: int | None = None, pad_id: int = 0) -> NDArray[np.int64]:
    """Ids as one array [N, length]; `length` None = that of the longest row, at least 1."""
    width = max([1, *map(len, rows)]) if length is None else length
    array = np.full((len(rows), width), pad_id, np.int64)
    for row, ids in zip(array, rows, strict=True):
        row[: len(ids)] = ids
    return array


def pick(items: Sequence[T], indices: Iterable[int]) -> list[T]:
    return [items[i] for i in indices]
