"""What a caller points at: checked, clipped, and turned into the points and labels the graphs take (section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis.bundle import PromptSpec
from deixis.errors import PromptError
from deixis.geometry import Geometry
from deixis.results import Box

PADDING, NOT_A_POINT, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = -2, -1, 1, 2, 3


@dataclass(frozen=True)
class Prompt:
    """A box or points in pixels of the picture; neither = the whole picture.

    box: (left, top, right, bottom). It is clipped to the picture. points: (x, y) each. labels: 1 = on the thing (the
    default), 0 = not on it, one per point. What makes no sense (no area, NaN, outside the picture) raises PromptError
    when it is used.
    """

    box: ArrayLike | None = None
    points: ArrayLike | None = None
    labels: Sequence[int] | NDArray[np.integer] | None = None

    @property
    def is_whole(self) -> bool:
        return self.box is None and self.points is None


@dataclass(frozen=True)
class Question:
    """A question about a picture, and the boxes (left, top, right, bottom) px that it names by `<bbox>`, [k, 4]."""

    text: str
    boxes: ArrayLike | None = None


@dataclass(frozen=True)
class PromptTokens:
    """What the graphs take.

    points: [P, 2] float32, pixels of the padded input. labels: [P] int64. box: the clipped box in original pixels, or
    None. is_whole: the whole picture was meant, so the tokens are the same for every such prompt of a scene.
    """

    points: NDArray[np.float32]
    labels: NDArray[np.int64]
    box: Box | None = None
    is_whole: bool = False


def prompt_tokens(prompt: Prompt, geometry: Geometry, spec: PromptSpec) -> PromptTokens:
    """For the prompt extractor. Raises PromptError."""
    if prompt.is_whole:
        _check_no_labels(prompt)
        height, width = geometry.valid
        return replace(region_tokens(np.array([0, 0, width, height], np.float64), None, spec), is_whole=True)
    if prompt.box is not None:
        box = check_box(prompt, geometry)
        return region_tokens(geometry.to_input(np.reshape(box, (2, 2))).ravel(), box, spec)
    return _points(prompt, geometry)


def mask_tokens(prompt: Prompt, geometry: Geometry) -> PromptTokens:
    """For the mask decoder.

    A box is its two corners, n points have one padding point behind them. Raises PromptError.
    """
    if prompt.is_whole:
        raise PromptError("say what to segment: give a box or points")
    if prompt.box is not None:
        box = check_box(prompt, geometry)
        return PromptTokens(*corner_tokens(geometry.to_input(np.reshape(box, (2, 2))).ravel()), box)
    return _points(prompt, geometry)


def corner_tokens(box: NDArray[np.floating]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A box [4] in input pixels as points [2, 2] and labels [2]."""
    return np.asarray(box, np.float32).reshape(2, 2), np.array([TOP_LEFT, BOTTOM_RIGHT], np.int64)


def check_box(prompt: Prompt, geometry: Geometry) -> Box:
    """The prompt's box, clipped to the picture, original pixels. Raises PromptError."""
    if prompt.points is not None:
        raise PromptError("give a box or points, not both")
    _check_no_labels(prompt)
    box = _numbers(prompt.box, (4,), "a box must be four numbers (left, top, right, bottom)")
    left, top, right, bottom = (float(v) for v in box)
    height, width = geometry.original
    text = f"box {_text(box)}"
    if right <= left or bottom <= top:
        raise PromptError(f"{text} has no area; the order is left, top, right, bottom")
    clipped = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
    if clipped[2] <= clipped[0] or clipped[3] <= clipped[1]:
        raise PromptError(f"{text} lies outside the picture of {width}x{height} pixels")
    return clipped


def region_tokens(box: NDArray[np.float64], original: Box | None, spec: PromptSpec) -> PromptTokens:
    """A box [4] in input pixels as the model was trained to see it; `original` is the same in pixels of the picture."""
    if spec.box_as == "corners":
        x0, y0, x1, y1 = box
        points = [(x0, y0), (x1, y0), (x0, y1), (x1, y1), (0, 0)]
        labels = [FOREGROUND] * 4 + [NOT_A_POINT]
        return PromptTokens(np.array(points, np.float32), np.array(labels, np.int64), original)
    points_, labels_ = corner_tokens(box)
    padding = np.zeros((spec.padding, 2), np.float32)
    return PromptTokens(
        np.concatenate([points_, padding]), np.concatenate([labels_, np.full(spec.padding, PADDING)]), original
    )


def _points(prompt: Prompt, geometry: Geometry) -> PromptTokens:
    expected = "points must be pairs of numbers (x, y)"
    points = np.atleast_2d(_numbers(prompt.points, None, expected))
    if points.ndim != 2 or points.shape[1] != 2 or not len(points):
        raise PromptError(f"{expected}, found an array of shape {list(points.shape)}")
    height, width = geometry.original
    for point in points:
        if not (0 <= point[0] <= width and 0 <= point[1] <= height):
            raise PromptError(f"point {_text(point)} lies outside the picture of {width}x{height} pixels")
    labels = np.ones(len(points), np.int64)
    if prompt.labels is not None:
        given = _numbers(prompt.labels, None, "labels must be 0 or 1, one per point").ravel()
        if len(given) != len(points):
            raise PromptError(f"{len(points)} points have {len(given)} labels; give one per point")
        if not np.isin(given, (0, 1)).all():
            raise PromptError(f"labels must be 0 (background) or 1 (foreground), found {_text(given)}")
        labels = given.astype(np.int64)
    inputs = np.concatenate([geometry.to_input(points), np.zeros((1, 2))]).astype(np.float32)
    return PromptTokens(inputs, np.append(labels, NOT_A_POINT))


def _check_no_labels(prompt: Prompt) -> None:
    if prompt.labels is not None:
        raise PromptError("labels belong to points; give points too, or leave the labels out")


def _numbers(value: ArrayLike | None, shape: tuple[int, ...] | None, expected: str) -> NDArray[np.float64]:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise PromptError(f"{expected}, found {str(value)[:60]!r}") from None
    if shape is not None and array.shape != shape:
        raise PromptError(f"{expected}, found an array of shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise PromptError(f"{expected}, found {_text(array.ravel())}")
    return array


def _text(values: NDArray[np.floating]) -> str:
    return "(" + ", ".join(f"{v:g}" for v in values) + ")"
