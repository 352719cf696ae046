"""Checked access to the fields of a parsed JSON record. Every function raises MalformedError naming the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from deixis_train.data.formats.errors import MalformedError
from deixis_train.data.samples import Box

MIN_INSIDE = 0.5  # share of a box that must lie in the picture; what hangs over by less is cut off


def record(value: Any, what: str = "record") -> dict[str, Any]:
    if not isinstance(value, dict):
        raise MalformedError(f"{what} is not an object with named fields")
    return value


def items(fields: dict[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        raise MalformedError(f"no list {name!r}")
    return value


def text(fields: dict[str, Any], name: str) -> str:
    """A text that says something, without the white space around it."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise MalformedError(f"no text {name!r}")
    if not value.strip():
        raise MalformedError(f"{name!r} is empty")
    return whole_characters(value, name).strip()


def whole_characters(value: str, name: str) -> str:
    """The text itself, if it can be written as UTF-8: JSON may hold half of a surrogate pair, tokenizers may not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MalformedError(f"{name!r} holds half a character") from None
    return value


def number(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    if not is_finite(value):
        raise MalformedError(f"{name!r} is not a finite number")
    return float(value)  # pyright: ignore[reportArgumentType]


def identifier(fields: dict[str, Any], name: str) -> int | str:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise MalformedError(f"no {name!r}")
    return value


def size(fields: dict[str, Any]) -> tuple[int, int] | None:
    """(width, height) px of the picture where the record says so, else None."""
    if "width" not in fields and "height" not in fields:
        return None
    width, height = number(fields, "width"), number(fields, "height")
    if width < 1 or height < 1 or width != int(width) or height != int(height):
        raise MalformedError(f"a picture of {width:g}x{height:g} px")
    return int(width), int(height)


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def box_from_xywh(values: Any, width: int, height: int) -> Box:
    """An XYXY box px from left, top, width, height px.

    Published boxes often hang over the picture's border by a pixel or two: they are cut off there. A box without area,
    or with less than half of it inside the picture, is malformed.
    """
    if not isinstance(values, Sequence) or len(values) != 4 or not all(is_finite(v) for v in values):
        raise MalformedError(f"box {values!r:.80} is not four finite numbers")
    x, y, w, h = (float(v) for v in values)
    if w <= 0 or h <= 0:
        raise MalformedError(f"box {values!r:.80} has no area")
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < MIN_INSIDE * w * h:
        raise MalformedError(f"box {values!r:.80} lies outside the picture of {width}x{height} px")
    return x0, y0, x1, y1
