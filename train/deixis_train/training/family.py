"""What the engine of training asks of a family of models, so that every one is trained by the same loop.

A family is a class with the members of `Begun`; `run.FAMILIES` knows them by the key `family` of a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deixis_train.training.recipe import SourceSpec, StageSpec


class Losses(Protocol):
    """terms: losses with their weights in them, so that their sum is descended. figures: scalars without gradient."""

    terms: dict[str, Tensor]
    figures: dict[str, Tensor]


class MicroBatch(Protocol):
    """What one forward and backward pass takes. source: what its losses are logged under, and averaged with."""

    source: str

    def to(self, device: torch.device) -> Any: ...


class Feed(Protocol):
    """Makes micro-batches, of one source or of several. Making one depends on its arguments only."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float:
        """How often a step takes it, where steps take one feed."""
        ...

    @property
    def pictures(self) -> int:
        """How many pictures a step takes of it, where steps take some of every feed."""
        ...

    def __len__(self) -> int:
        """Samples behind it."""
        ...

    def make(self, start: int, count: int) -> Any:
        """The samples at the places `start`.. of an endless row, as a `MicroBatch`."""
        ...


class StageObjective(Protocol):
    """The losses of a stage. It is called with micro-batches that lie on the model's device."""

    @property
    def model(self) -> nn.Module: ...

    def __call__(self, micro: Any, /) -> Losses: ...


class Begun(Protocol):
    """A run that has its model and tokenizer. helpers: modules that learn along and are left out of checkpoints."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def helpers(self) -> nn.Module: ...

    def feeds(self, stage: StageSpec, specs: Sequence[SourceSpec], seed: int, *, writer: bool) -> Sequence[Feed]:
        """Feeds of a stage, or of its held-out sources. writer: this process computes features that are missing."""
        ...

    def objective(self, stage: StageSpec) -> StageObjective: ...

    def prepare(self, stage: StageSpec, feeds: Sequence[Any]) -> None:
        """Called before a stage is trained on its own `feeds`."""
        ...

    def finished(self, stage: StageSpec) -> None:
        """Called when a stage is done, be it from before."""
        ...

    def write_checkpoint(self, folder: Path) -> None: ...
