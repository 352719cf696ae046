"""What a loader found in a file, and what it could not place."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, is not what it was taken for, or does not fit the model. One line."""


@dataclass(frozen=True)
class LoadReport:
    """Outcome of filling a model from named tensors.

    Attributes:
        missing: names the model needs and the file lacks (by the names of the file's format).
        unexpected: names of the file that no table mentions.
        misshapen: names present with another shape, each as `name: file (..), model (..)`. They were not loaded.
        ignored: names of the file left out on purpose (a classifier head, position buffers, ...).
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Every parameter of the model got its value. Unexpected names do not hinder that."""
        return not (self.missing or self.misshapen)

    def __add__(self, other: LoadReport) -> LoadReport:
        return LoadReport(
            self.missing + other.missing,
            self.unexpected + other.unexpected,
            self.misshapen + other.misshapen,
            self.ignored + other.ignored,
        )

    def __str__(self) -> str:
        parts = [
            f"{len(names)} {label} ({_shorten(names)})"
            for label in ("missing", "unexpected", "misshapen", "ignored")
            if (names := getattr(self, label))
        ]
        return "; ".join(parts) or "every name placed"

    def raise_if_incomplete(self, source: object = "checkpoint") -> LoadReport:
        """Return self when complete, else raise CheckpointError: one line with `source` and the names at fault."""
        if not self.complete:
            raise CheckpointError(f"{source}: does not fill the model: {self}")
        return self


def _shorten(names: tuple[str, ...], most: int = 4) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@torch.no_grad()
def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    names: Mapping[str, str],
    ignored: Iterable[str] = (),
    transposed: Collection[str] = (),
) -> LoadReport:
    """Copy tensors into a module's parameters and buffers.

    Args:
        module: the receiver; its `state_dict` names are the keys of `names`. Dtype and device of the receiver are kept.
        tensors: what the file holds, by the file's names, already in PyTorch layout.
        names: receiver name -> file name, for every tensor of the receiver.
        ignored: file names that are left out on purpose.
        transposed: receiver names whose matrix the file holds the other way round.
    """
    own = module.state_dict(keep_vars=True)
    missing, misshapen = [], []
    for target, source in names.items():
        if source not in tensors:
            missing.append(source)
            continue
        tensor = tensors[source]  # read once: the mapping may fetch from disk
        found, wanted = tuple(tensor.shape), tuple(own[target].shape)
        if target in transposed:
            tensor, wanted = tensor.mT if tensor.ndim > 1 else tensor, wanted[::-1]
        if found == wanted:
            own[target].copy_(tensor)
        else:
            misshapen.append(f"{source}: file {found}, model {wanted}")
    skipped = set(ignored)
    unexpected = sorted(set(tensors) - set(names.values()) - skipped)
    return LoadReport(tuple(missing), tuple(unexpected), tuple(misshapen), tuple(sorted(skipped & set(tensors))))
