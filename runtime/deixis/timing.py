"""Where the time of a call goes: what `Model.timed` records.

Two things cost while recording: an engine that notes when each graph ran, and a look at the clock at both ends of
`encode` and of the tasks. Otherwise a call pays one comparison.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deixis.engines import Arrays, Engine

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T", bound="Timed")
Edge = Literal["preprocess", "postprocess"]


LOAD = "load "  # begins the name of a span in which a graph was loaded


class Span(NamedTuple):
    """Something that took time.

    name: a graph's role, for one run of it; "load ROLE", the load of a graph, which is not in the run that needed it;
    "preprocess", what `encode` did before its first graph, reading and hashing pictures included; "postprocess", what a
    task did behind its last graph. start: seconds of `time.perf_counter`. seconds: how long it took.
    """

    name: str
    start: float
    seconds: float

    @property
    def end(self) -> float:
        return self.start + self.seconds


class TimedEngine:
    """An engine that notes a span for every load and every run of a graph. See Engine for its members."""

    def __init__(self, engine: Engine, spans: list[Span]) -> None:
        self.engine = engine
        self.device = engine.device
        self.threads = engine.threads
        self._spans = spans
        self._known = set(engine.loaded())

    def run(self, role: str, inputs: Arrays) -> dict[str, NDArray[np.generic]]:
        self.load(role)
        with self._noted(role):
            return self.engine.run(role, inputs)

    def bind(self, role: str, inputs: Arrays, outputs: Arrays) -> Callable[[], None]:
        self.load(role)
        run = self.engine.bind(role, inputs, outputs)

        def timed() -> None:  # a step of decoding is short, so no context manager here
            start = time.perf_counter()
            try:
                run()
            finally:
                self._spans.append(Span(role, start, time.perf_counter() - start))

        return timed

    def load(self, role: str) -> None:
        if role not in self._known:
            with self._noted(LOAD + role):
                self.engine.load(role)
            self._known.add(role)

    def loaded(self) -> tuple[str, ...]:
        return self.engine.loaded()

    def close(self) -> None:
        self.engine.close()

    def __getattr__(self, name: str) -> Any:
        """What an engine has beside the members of the protocol."""
        return getattr(self.engine, name)

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spans.append(Span(name, start, time.perf_counter() - start))


class Timed(Protocol):
    """What has edges: a `Model`. `_spans` is None while nothing is recorded."""

    _spans: list[Span] | None


def edge(name: Edge) -> Callable[[Callable[Concatenate[T, P], R]], Callable[Concatenate[T, P], R]]:
    """Decorates a method of `Model` that runs graphs: while spans are recorded, what comes before its first graph
    ("preprocess") or behind its last ("postprocess") becomes one. A call that runs no graph is all edge.
    """

    def decorate(method: Callable[Concatenate[T, P], R]) -> Callable[Concatenate[T, P], R]:
        @functools.wraps(method)
        def call(self: T, *args: P.args, **kwargs: P.kwargs) -> R:
            spans = self._spans
            if spans is None:
                return method(self, *args, **kwargs)
            before, start = len(spans), time.perf_counter()
            result = method(self, *args, **kwargs)
            end, graphs = time.perf_counter(), spans[before:]
            if name == "preprocess":
                end = min((span.start for span in graphs), default=end)
            else:
                start = max((span.end for span in graphs), default=start)
            spans.append(Span(name, start, end - start))
            return result

        return call

    return decorate
