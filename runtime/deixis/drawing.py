"""The pens behind `deixis.overlay`: a canvas, colours, text, smooth paths, tags. cv2 and numpy only; all pictures are
RGB.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

Color = tuple[int, int, int]
Rect = tuple[float, float, float, float]  # left, top, right, bottom, px of the canvas

SMALLEST_PX, LARGEST_PX, NARROWEST_PX = 800, 1600, 480
INK: Color = (18, 20, 26)  # panels, halos
PAPER: Color = (236, 238, 242)  # text without a place
FAINT: Color = (134, 140, 152)
TAG_PAD, TAG_HEIGHT = 0.45, 1.6  # of tags, in heights of the text
_LEAST_LABEL = 9  # labels may be so wide, in heights of the text, however narrow their box is
_SHIFT = 4  # fractional bits of cv2's fixed-point coordinates


@dataclass
class Canvas:
    """A picture at a size at which text and lines are readable, and what has been written on it.

    pixels: uint8 [h, w, 3]. scale: canvas px per original px. taken: places of tags, which later ones avoid.
    """

    pixels: NDArray[np.uint8]
    scale: float
    taken: list[Rect] = field(default_factory=list)

    @classmethod
    def of(cls, image: NDArray[np.uint8]) -> Canvas:
        """Small pictures grow and large ones shrink until the longest side lies between 800 and 1600 px."""
        longest = max(image.shape[:2])
        scale = min(max(1.0, SMALLEST_PX / longest), max(LARGEST_PX / longest, 1e-9))
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        same = size == image.shape[1::-1]
        pixels = np.array(image if same else cv2.resize(image, size, interpolation=method), np.uint8)
        return cls(pixels, scale)

    @property
    def unit(self) -> float:
        """Thickness of a fine line, px."""
        return max(1.0, max(self.pixels.shape[:2]) / 600)

    @property
    def text_px(self) -> int:
        return round(12.5 * self.unit)

    def at(self, point: Sequence[float]) -> tuple[float, float]:
        """Original pixels to canvas pixels, kept inside the picture."""
        height, width = self.pixels.shape[:2]
        x, y = (v * self.scale if math.isfinite(v) else 0.0 for v in point)
        return min(max(x, 0.0), float(width)), min(max(y, 0.0), float(height))


def gradient(count: int) -> list[Color]:
    """Colours from blue through green and yellow to pink, equally bright, in the order of reading."""
    hues = np.interp(np.linspace(0, 1, max(count, 2)), [0, 0.3, 0.55, 0.8, 1], [255, 165, 95, 45, 0])
    return [oklch(0.8, 0.15, hue) for hue in hues[:count]]


def palette(index: int) -> Color:
    """Colour number `index` for things that have no order; neighbours differ well."""
    return oklch(0.76, 0.17, (25 + 137.5 * index) % 360)


def oklch(lightness: float, chroma: float, hue: float) -> Color:
    """OKLCH (hue in degrees) to sRGB: a space in which equal lightness looks equally bright. Out-of-gamut values are
    clipped.
    """
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    cone = np.array(
        [
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ]
    )
    matrix = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(matrix @ cone**3, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    red, green, blue = (round(float(v) * 255) for v in srgb)
    return red, green, blue


# Text: OpenCV 5 has a real variable font built in; before, only the stroke fonts, which are drawn anti-aliased.
_FACE = cv2.FontFace("sans") if hasattr(cv2, "FontFace") else None


def text_width(text: str, size_px: int, weight: int = 500) -> int:
    """Advance of `text` in px, without the space after it."""
    if _FACE is not None:
        x, _, width, _ = cv2.getTextSize((1 << 15, 1 << 10), text, (0, 0), _FACE, size_px, weight, 0)
        return x + width
    return cv2.getTextSize(text, cv2.FONT_HERSHEY_DUPLEX, size_px / 30, 1)[0][0]


def write(
    pixels: NDArray[np.uint8], text: str, at: tuple[float, float], size_px: int, color: Color, weight: int = 500
) -> None:
    """Write one line with its baseline starting at `at` (x, y)."""
    origin = round(at[0]), round(at[1])
    if _FACE is not None:
        wide = (0, 1 << 15)  # never wrap here: lines are broken by the caller
        cv2.putText(pixels, text, origin, color, _FACE, size_px, weight, 0, wide)
    else:
        cv2.putText(pixels, text, origin, cv2.FONT_HERSHEY_DUPLEX, size_px / 30, color, 1, cv2.LINE_AA)


def write_haloed(pixels: NDArray[np.uint8], text: str, at: tuple[float, float], size_px: int, color: Color) -> None:
    """Write with a dark rim, readable on any picture."""
    reach = max(1, round(size_px / 9))
    for step in range(12):
        angle = step * math.pi / 6
        write(pixels, text, (at[0] + reach * math.cos(angle), at[1] + reach * math.sin(angle)), size_px, INK, 700)
    write(pixels, text, at, size_px, color, 700)


def shorten(text: str, size_px: int, room_px: float, weight: int = 500) -> str:
    """`text`, cut with dots when it is wider than `room_px`."""
    if text_width(text, size_px, weight) <= room_px:
        return text
    while text and text_width(text + "...", size_px, weight) > room_px:
        text = text[:-1]
    return text.rstrip() + "..."


def _fixed(points: Sequence[tuple[float, float]] | NDArray[np.float64]) -> NDArray[np.int32]:
    """Continuous pixels to cv2's fixed-point pixel centres."""
    return np.round((np.asarray(points, np.float64) - 0.5) * (1 << _SHIFT)).astype(np.int32)


def line(pixels: NDArray[np.uint8], a: tuple[float, float], b: tuple[float, float], color: Color, width: float) -> None:
    first, second = _fixed([a, b])
    thickness = max(1, round(width))
    cv2.line(pixels, first.tolist(), second.tolist(), color, thickness, cv2.LINE_AA, _SHIFT)


def disc(pixels: NDArray[np.uint8], at: tuple[float, float], radius: float, color: Color, rim: float = 0.0) -> None:
    """A filled disc, with a dark rim of `rim` px outside it."""
    (center,) = _fixed([at]).tolist()
    if rim:
        cv2.circle(pixels, center, round((radius + rim) * (1 << _SHIFT)), INK, -1, cv2.LINE_AA, _SHIFT)
    cv2.circle(pixels, center, round(radius * (1 << _SHIFT)), color, -1, cv2.LINE_AA, _SHIFT)


def rectangle(pixels: NDArray[np.uint8], rect: Rect, color: Color, width: float, dashed: bool = False) -> None:
    """An outline with a dark rim; dashed for what the user gave."""
    left, top, right, bottom = rect
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    for pen, thickness in ((INK, width + 2 * max(1.0, width / 2)), (color, width)):
        for a, b in itertools.pairwise(corners):
            length = math.dist(a, b)
            dashes = max(1, round(length / (7 * width))) if dashed and pen != INK else 1
            for i in range(dashes):
                ends = [i / dashes, (i + 0.55) / dashes] if dashes > 1 else [0.0, 1.0]
                p, q = ((a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t) for t in ends)
                line(pixels, p, q, pen, thickness)


def smooth_path(points: Sequence[tuple[float, float]], steps: int = 24) -> NDArray[np.float64]:
    """Catmull-Rom curve through `points`: float64 [(n - 1) * steps + 1, 2]; slack where points are far, no overshoot
    to speak of.
    """
    p = np.asarray(points, np.float64)
    padded = np.concatenate([p[:1], p, p[-1:]])
    t = (np.arange(steps) / steps)[:, None]
    pieces = []
    for before, a, b, after in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        reach = float(np.linalg.norm(b - a))
        ma, mb = (_limited(v, reach) for v in ((b - before) / 2, (after - a) / 2))
        pieces.append(
            (2 * t**3 - 3 * t**2 + 1) * a + (t**3 - 2 * t**2 + t) * ma + (3 * t**2 - 2 * t**3) * b + (t**3 - t**2) * mb
        )
    return np.concatenate([*pieces, p[-1:]])


def _limited(tangent: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """A tangent no longer than the piece it bends: otherwise short pieces beside long ones make loops."""
    length = float(np.linalg.norm(tangent))
    return tangent * min(1.0, reach / length) if length else tangent


def fill(pixels: NDArray[np.uint8], rect: Rect, color: Color, opacity: float = 1.0, radius: float = 0.0) -> None:
    """Fill a rectangle with round corners, translucent below opacity 1."""
    left, top, right, bottom = (round(v) for v in rect)
    height, width = pixels.shape[:2]
    x0, y0, x1, y1 = max(0, left), max(0, top), min(width, right), min(height, bottom)
    if x1 <= x0 or y1 <= y0:
        return
    x, y = np.arange(x0, x1) + 0.5, np.arange(y0, y1) + 0.5
    radius = min(radius, (right - left) / 2, (bottom - top) / 2)
    dx = np.maximum(np.maximum(left + radius - x, x - (right - radius)), 0)
    dy = np.maximum(np.maximum(top + radius - y, y - (bottom - radius)), 0)
    cover = np.clip(radius - np.hypot(dx[None], dy[:, None]) + 0.5, 0, 1) if radius else np.ones((len(y), len(x)))
    alpha = (cover * opacity)[..., None]
    part = pixels[y0:y1, x0:x1]
    part[:] = np.round(part * (1 - alpha) + np.array(color) * alpha).astype(np.uint8)


def overlaps(rect: Rect, others: Sequence[Rect]) -> bool:
    return any(rect[0] < o[2] and o[0] < rect[2] and rect[1] < o[3] and o[1] < rect[3] for o in others)


def place_tag(rect: Rect, size: tuple[float, float], area: tuple[float, float], taken: Sequence[Rect]) -> Rect | None:
    """A free place for a tag of `size` (width, height) at a box: around it first, then inside.

    Tried are the tag's positions along the box's upper and lower edge, outside, then inside, then beside its right and
    left edge.

    Args:
        rect: the box, inside the area.
        size: (width, height) of the tag.
        area: (width, height) that the tag must lie in.
        taken: places that it may not overlap.

    Returns:
        The first place that is free, or None. All in px of the canvas.
    """
    (wide, high), (left, top, right, bottom) = size, rect
    edge = max(area[0] - wide, 0.0)
    columns = [min(max(x, 0.0), edge) for x in (left, right - wide, (left + right - wide) / 2)]
    places = [(x, y) for y in (top - high, bottom, top, bottom - high) for x in columns]
    places += [(x, y) for x in (right, left - wide) for y in (top, bottom - high, (top + bottom - high) / 2)]
    for x, y in places:
        place = (x, y, x + wide, y + high)
        inside = x >= 0 and y >= 0 and place[2] <= area[0] and place[3] <= area[1]
        if inside and not overlaps(place, taken):
            return place
    return None


def place_labels(
    canvas: Canvas, rects: Sequence[Rect], texts: Sequence[Sequence[str]]
) -> list[tuple[Rect, str] | None]:
    """Where the label of every box goes, and which of its texts it is: the first that finds a free place.

    A text that is much wider than its box is shortened. Places overlap neither each other nor what the canvas has
    already taken, and lie inside the picture; they are taken from then on.
    """
    height, width = canvas.pixels.shape[:2]
    size = canvas.text_px
    placed: list[tuple[Rect, str] | None] = []
    for rect, of_box in zip(rects, texts, strict=True):
        room = min(max(rect[2] - rect[0], _LEAST_LABEL * size), width) - 2 * TAG_PAD * size
        found = None
        for text in of_box:
            text = shorten(text, size, room, 600)
            extent = text_width(text, size, 600) + 2 * TAG_PAD * size, TAG_HEIGHT * size
            place = place_tag(rect, extent, (width, height), canvas.taken)
            if place is not None:
                found = place, text
                canvas.taken.append(place)
                break
        placed.append(found)
    return placed


def write_tag(canvas: Canvas, place: Rect, text: str, color: Color) -> None:
    """A label in dark letters on its colour; `place` is TAG_HEIGHT texts high."""
    size = canvas.text_px
    fill(canvas.pixels, place, color, 0.94, radius=0.3 * size)
    write(canvas.pixels, text, (place[0] + TAG_PAD * size, place[1] + 1.15 * size), size, INK, 600)
