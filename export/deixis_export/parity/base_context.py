"""What the contexts of all families share: a golden directory, its files, and the thing that is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from deixis_export.parity.report import Absent, Array, GoldenFile, TorchOnly

M_co = TypeVar("M_co", bound=nn.Module, covariant=True)


class BadDirectory(Exception):
    """The directory cannot be used at all. The message is one line."""


class RunsModel(Protocol[M_co]):
    """What runs a model. `model` is the PyTorch model when exactly that runs, so that values inside it can be compared;
    otherwise None.
    """

    @property
    def model(self) -> M_co | None: ...


M = TypeVar("M", bound=nn.Module)
B = TypeVar("B", bound=RunsModel)


class BaseContext(Generic[B, M]):
    """params: the file whose absence leaves nothing to check."""

    params: str

    def __init__(self, directory: Path, backend: B | None) -> None:
        self.directory = directory
        self._backend = backend
        self._files: dict[str, GoldenFile] = {}

    def open(self, name: str) -> GoldenFile:
        if name not in self._files:
            self._files[name] = GoldenFile(self.directory / name)
        return self._files[name]

    @property
    def backend(self) -> B:
        if self._backend is None:
            raise Absent(f"no file {self.params}")
        return self._backend

    @property
    def model(self) -> M:
        """The PyTorch model; raises TorchOnly when something else is being checked."""
        model = self.backend.model
        if model is None:
            raise TorchOnly
        return model

    def in_torch(self, compute: Callable[[M], torch.Tensor]) -> Callable[[], Array]:
        """A value from inside the PyTorch model, for `Report.check`."""

        def run() -> Array:
            with torch.inference_mode():
                return compute(self.model).numpy()

        return run

    def torch_only(self, compute: Callable[[], Array]) -> Callable[[], Array]:
        """A value that says nothing about a backend, computed only where PyTorch is checked."""

        def run() -> Array:
            _ = self.model
            return compute()

        return run
