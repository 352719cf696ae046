"""Lines of the Flax name tables: which arrays fill a tensor, and how each is turned (section 16.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np


class Entry(NamedTuple):
    """One tensor of ours: its state-dict name, the Flax arrays it is made of, and how each is turned."""

    target: str
    sources: tuple[str, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    stacked: bool = False  # each source fills one row of the target


def same(array: np.ndarray) -> np.ndarray:
    return array


def dense(kernel: np.ndarray) -> np.ndarray:
    """[in, out] -> [out, in]."""
    return kernel.T


def conv(kernel: np.ndarray) -> np.ndarray:
    """Convolution [kh, kw, in, out] -> [out, in, kh, kw].

    The transposed convolutions of the mask decoder are stored [kh, kw, out, in] and become [in, out, kh, kw] without a
    flip: the same permutation (section 16.1).
    """
    return kernel.transpose(3, 2, 0, 1)


def flipped_conv(kernel: np.ndarray) -> np.ndarray:
    """Transposed convolution stored as Flax applies it, [kh, kw, in, out], both axes reversed -> [in, out, kh, kw]."""
    return np.ascontiguousarray(kernel[::-1, ::-1].transpose(2, 3, 0, 1))


def linear(ours: str, theirs: str, bias: bool = True) -> Iterator[Entry]:
    """Kernel and, where there is one, bias of a linear layer."""
    yield Entry(f"{ours}.weight", (f"{theirs}/kernel",), dense)
    if bias:
        yield Entry(f"{ours}.bias", (f"{theirs}/bias",), same)


def conv2d(ours: str, theirs: str, bias: bool = True) -> Iterator[Entry]:
    """The same of a convolution."""
    yield Entry(f"{ours}.weight", (f"{theirs}/kernel",), conv)
    if bias:
        yield Entry(f"{ours}.bias", (f"{theirs}/bias",), same)


def norm(ours: str, theirs: str, bias: bool = True) -> Iterator[Entry]:
    """Scale and, where there is one, bias of a norm."""
    yield Entry(f"{ours}.weight", (f"{theirs}/scale",), same)
    if bias:
        yield Entry(f"{ours}.bias", (f"{theirs}/bias",), same)
