"""Flat things that lie on the table and that no text names: paper, coasters, cloths, pencils, straws and cables. Their
colours are muted and none has the outline of a named kind, so that a text stays true whether or not they are there."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis_train.data.scenes.world import World

Floats = NDArray[np.float64]
Image = NDArray[Any]

MAX_CLUTTER = 4
_PAPER = ((0.86, 0.85, 0.8), (0.8, 0.78, 0.72), (0.72, 0.62, 0.48), (0.74, 0.77, 0.8), (0.82, 0.8, 0.68))
_MUTED = ((0.6, 0.48, 0.34), (0.4, 0.4, 0.42), (0.5, 0.52, 0.46), (0.36, 0.42, 0.46), (0.62, 0.56, 0.52),
          (0.46, 0.36, 0.3), (0.56, 0.58, 0.62), (0.5, 0.44, 0.46))  # fmt: skip
_STICKS = ((0.7, 0.58, 0.38), (0.3, 0.31, 0.33), (0.62, 0.63, 0.64), (0.5, 0.36, 0.26), (0.8, 0.79, 0.75))


def _color(rng: np.random.Generator, colors: tuple[tuple[float, float, float], ...]) -> Floats:
    return np.array(colors[int(rng.integers(len(colors)))]) * rng.uniform(0.88, 1.08)


class _Pen:
    """Draws polygons given on the table plane into a picture [h, w, 3] of the table's albedo."""

    def __init__(self, world: World, picture: Image, at: Floats, turn: float) -> None:
        self.world, self.picture, self.at = world, picture, at
        c, s = np.cos(turn), np.sin(turn)
        self.turn = np.array([[c, s], [-s, c]])

    def fill(self, outline: Floats, color: Floats, strength: float = 1.0) -> None:
        """Fills a convex outline [n, 2] with ``color``; a ``strength`` below 1 lets the ground show through."""
        ground = np.column_stack([outline @ self.turn + self.at, np.zeros(len(outline))])
        pixels, depth = self.world.camera.project(ground)
        if depth.min() < 0.1:  # beside or behind the camera
            return
        corners = np.round(pixels * 16 - 8).astype(np.int32)
        low, high = np.maximum(corners.min(axis=0) // 16 - 2, 0), corners.max(axis=0) // 16 + 3
        window = self.picture[low[1] : max(high[1], 0), low[0] : max(high[0], 0)]
        if window.size == 0:
            return
        mask = np.zeros(window.shape[:2], np.uint8)
        cv2.fillConvexPoly(mask, corners - (low * 16).astype(np.int32), 255, cv2.LINE_AA, 4)
        cover = mask.astype(np.float32)[..., None] * np.float32(strength / 255)
        window += (color.astype(np.float32) - window) * cover


def _rectangle(w: float, d: float) -> Floats:
    return np.array([[-w, -d], [w, -d], [w, d], [-w, d]])


def _rounded(w: float, d: float, corner: float) -> Floats:
    a = np.arange(24) * (2 * np.pi / 24)
    sign = np.stack([np.sign(np.cos(a + 1e-9)), np.sign(np.sin(a + 1e-9))], axis=1)
    return sign * (w - corner, d - corner) + corner * np.stack([np.cos(a), np.sin(a)], axis=1)


def _with_shadow(pen: _Pen, outline: Floats, color: Floats, height: float) -> None:
    shift = -pen.world.light[:2] / pen.world.light[2] * height @ pen.turn.T
    pen.fill(outline + shift, np.zeros(3), 0.3)
    pen.fill(outline, color)


def _sheet(rng: np.random.Generator, pen: _Pen) -> None:
    w, d = rng.uniform(0.07, 0.17), rng.uniform(0.09, 0.2)
    color = _color(rng, _PAPER)
    _with_shadow(pen, _rectangle(w, d), color, 0.004)
    if rng.random() < 0.6:  # lines of writing
        for y in np.linspace(0.75, -0.75, int(rng.integers(4, 9))):
            end = rng.uniform(0.2, 0.8)
            line = np.array([[-0.8 * w, y * d - 0.003], [end * w, y * d - 0.003], [end * w, y * d + 0.003]])
            pen.fill(np.vstack([line, [[-0.8 * w, y * d + 0.003]]]), color * 0.6)


def _coaster(rng: np.random.Generator, pen: _Pen) -> None:
    w = rng.uniform(0.045, 0.07)
    corner, color = rng.uniform(0.1, 0.45) * w, _color(rng, _MUTED)
    _with_shadow(pen, _rounded(w, w, corner), color, 0.006)
    if rng.random() < 0.5:
        pen.fill(_rounded(0.8 * w, 0.8 * w, 0.8 * corner), color * rng.uniform(0.85, 1.15))


def _cloth(rng: np.random.Generator, pen: _Pen) -> None:
    w, d = rng.uniform(0.12, 0.26), rng.uniform(0.1, 0.2)
    color = _color(rng, _MUTED) * rng.uniform(0.9, 1.3)
    _with_shadow(pen, _rectangle(w, d) + rng.normal(0, 0.006, (4, 2)), color, 0.005)
    stripe = color * rng.choice([0.82, 1.16])
    for x in np.linspace(-0.85, 0.85, int(rng.integers(2, 9))):
        pen.fill(_rectangle(0.012, 0.97 * d) + np.array([x * w, 0.0]), stripe, 0.7)
    if rng.random() < 0.5:
        for y in np.linspace(-0.8, 0.8, int(rng.integers(2, 6))):
            pen.fill(_rectangle(0.97 * w, 0.012) + np.array([0.0, y * d]), stripe, 0.6)


def _stick(rng: np.random.Generator, pen: _Pen) -> None:
    length, half = rng.uniform(0.07, 0.13), rng.uniform(0.0035, 0.006)
    color = _color(rng, _STICKS)
    _with_shadow(pen, _rectangle(length, half), color, 0.014)
    pen.fill(_rectangle(length, half * 0.35), np.minimum(color * 1.25, 1.0))
    if rng.random() < 0.6:  # a pencil's point
        tip = np.array([[length, -half], [length + 0.02, 0.0], [length, half]])
        pen.fill(tip, np.array([0.74, 0.62, 0.46]))
        pen.fill(tip * (1, 0.35) + (0.012, 0.0), np.array([0.2, 0.2, 0.2]))


def _cable(rng: np.random.Generator, pen: _Pen) -> None:
    t = np.linspace(0, 1, 30)
    bend = rng.uniform(-0.09, 0.09, 3)
    line = np.stack(
        [(t - 0.5) * rng.uniform(0.3, 0.7), sum(b * np.sin(np.pi * k * t) for k, b in enumerate(bend, 1))], 1
    )
    color, half = np.full(3, rng.uniform(0.16, 0.6)), rng.uniform(0.003, 0.005)
    normal = np.stack([-np.gradient(line[:, 1]), np.gradient(line[:, 0])], axis=1)
    normal *= half / np.linalg.norm(normal, axis=1, keepdims=True)
    shift = -pen.world.light[:2] / pen.world.light[2] * 0.008 @ pen.turn.T
    for offset, paint, strength in ((shift, np.zeros(3), 0.3), (np.zeros(2), color, 1.0)):
        for k in range(len(line) - 1):
            leg = np.stack(
                [line[k] - normal[k], line[k + 1] - normal[k + 1], line[k + 1] + normal[k + 1], line[k] + normal[k]]
            )
            pen.fill(leg + offset, paint, strength)


_FLAT = (_sheet, _sheet, _coaster, _coaster, _cloth, _cloth, _stick, _stick, _cable)


def lay_clutter(rng: np.random.Generator, world: World, picture: Image) -> None:
    """Lays 0 to ``MAX_CLUTTER`` flat things somewhere on the table, in place, into float32 RGB [h, w, 3] of its top
    before any light falls on it. What hangs over the edge is cut off when the table is put into the picture."""
    low, high = world.table.min(axis=0), world.table.max(axis=0)
    for _ in range(int(rng.integers(MAX_CLUTTER + 1))):
        draw = _FLAT[int(rng.integers(len(_FLAT)))]
        at = (low + high) / 2 + (high - low) / 2 * rng.uniform(-0.75, 0.75, 2)
        draw(rng, _Pen(world, picture, at, float(rng.uniform(0, 2 * np.pi))))
