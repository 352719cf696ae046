"""A bundle in the runtime, for parity: what is compared with the PyTorch model is what a user gets."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from deixis import Model, load
from deixis.base_pipeline import BasePipeline
from deixis_export.session import Arrays

P = TypeVar("P", bound=BasePipeline)
L = TypeVar("L", bound="LoadedBundle[Any]")


class LoadedBundle(Generic[P]):
    """A bundle whose pipeline is of the class `kind`. A context manager; graphs are loaded when first needed."""

    def __init__(self, bundle: Path, kind: type[P]) -> None:
        self._path = bundle
        self._kind = kind
        self._model: Model | None = None

    def __enter__(self: L) -> L:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def pipeline(self) -> P:
        if self._model is None:
            self._model = load(self._path, device="cpu", verify=False)
        assert isinstance(self._model.pipeline, self._kind), f"{self._path} is of another family"
        return self._model.pipeline

    def release(self) -> None:
        """Free the graphs loaded so far; large ones need not all be in memory at once."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def run(self, role: str, inputs: Arrays) -> Arrays:
        """Run one graph."""
        return self.pipeline.engine.run(role, inputs)
