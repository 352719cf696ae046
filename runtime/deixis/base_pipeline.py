"""What the pipelines of all families share: an opened bundle on an engine, its limits, and which tasks it can do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from deixis.bundle import Bundle, TaskSpec
from deixis.engines import Engine
from deixis.errors import BundleFormatError, PromptError, TaskError
from deixis.geometry import Geometry
from deixis.tokenizer import TextTokenizer


class Features(Protocol):
    """What the image encoders of a family gave for one picture. `nbytes`: what keeping it costs."""

    @property
    def geometry(self) -> Geometry: ...

    @property
    def nbytes(self) -> int: ...


class BasePipeline:
    """One opened bundle on one engine. Has no state of its own but the graphs: safe to use from several threads.

    Raises BundleFormatError when the bundle is of another family, PromptError when `cache_capacity` is outside what it
    allows.
    """

    family: ClassVar[str]
    graphs_of_task: ClassVar[Mapping[str, tuple[str, ...]]]
    without_spec: ClassVar[frozenset[str]] = frozenset()  # tasks that the manifest says nothing about

    def __init__(self, bundle: Bundle, engine: Engine, cache_capacity: int | None = None) -> None:
        manifest = bundle.manifest
        if manifest.model.family != self.family:
            raise BundleFormatError(
                f"{bundle.path}: this runs models of the family {self.family!r}, not {manifest.model.family!r}; "
                "use deixis.load, which chooses"
            )
        self.bundle = bundle
        self.manifest = manifest
        self.engine = engine
        self.tokenizer = TextTokenizer(bundle.file(manifest.tokenizer.file), manifest.tokenizer)
        self.capacity = manifest.caches.default_capacity if cache_capacity is None else cache_capacity
        least, most = self.range("T")
        if not max(2, least) <= self.capacity <= most:
            raise PromptError(
                f"cache_capacity {self.capacity} is not within {max(2, least)}..{most}, which the bundle allows"
            )

    def range(self, dim: str) -> tuple[int, int]:
        """Smallest and largest size of a symbolic dimension."""
        limits = self.manifest.dims.get(dim)
        return (1, 1 << 30) if limits is None else (limits.min, limits.max)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks that this bundle can do."""
        return tuple(task for task in self.graphs_of_task if not self.missing(task))

    def missing(self, task: str) -> list[str]:
        """What the bundle lacks for a task: names of graphs, and the task's own entry."""
        lacking = [f"graph {role}" for role in self.graphs_of_task[task] if role not in self.manifest.graphs]
        has_spec = task in self.without_spec or task in self.manifest.tasks
        return lacking if has_spec else [*lacking, f"task {task}"]

    def require(self, task: str) -> None:
        """Raise TaskError when the bundle cannot do a task."""
        if lacking := self.missing(task):
            raise TaskError(f"bundle {self.manifest.model.name!r} cannot {_what(task)}: no {', '.join(lacking)}")

    def task(self, name: str) -> TaskSpec:
        self.require(name)
        return self.manifest.tasks[name]

    def encode(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Features]:
        """RGB pictures uint8 [H, W, 3] of any sizes to features, as many at once as the bundle allows."""
        raise NotImplementedError


def _what(task: str) -> str:
    """A task as a verb."""
    nouns = {"dense_captions": "make dense captions", "grounded_caption": "make grounded captions"}
    return nouns.get(task, task.replace("_", " "))
