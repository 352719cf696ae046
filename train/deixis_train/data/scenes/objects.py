"""Object kinds of the table scenes: small procedural meshes of quads, one per kind, built from surfaces of revolution,
boxes and swept tubes. Nothing is loaded from disk, so a scene depends on its seed alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

COLORS: dict[str, tuple[int, int, int]] = {  # sRGB
    "red": (205, 28, 34),
    "orange": (245, 122, 14),
    "yellow": (246, 214, 36),
    "green": (36, 150, 58),
    "blue": (32, 84, 210),
    "purple": (128, 46, 168),
    "white": (238, 238, 234),
    "black": (34, 34, 38),
}
SIZES: dict[str, float] = {"small": 0.68, "large": 1.12}  # factors on the kind's canonical size

# Paint codes of faces: MAIN takes the object's colour, LIGHT a lighter tint of it, the others are fixed.
MAIN, LIGHT, DARK, BEAK, PALE = range(5)


@dataclass(frozen=True)
class Mesh:
    """A kind's mesh in world units (about 0.2 for a whole object), z up, standing on z = 0, axis at the origin.

    vertices: float64 [v, 3]. quads: int64 [q, 4], counter-clockwise seen from outside. paint: int64 [q], a paint code.
    ambient: float64 [q] in (0, 1], the share of ambient light that reaches a face. parts: int64 [v], index of the
    nearly convex part a vertex belongs to (shadows are cast per part).
    """

    vertices: Floats
    quads: Ints
    paint: Ints
    ambient: Floats
    parts: Ints

    @property
    def radius(self) -> float:
        """Radius of the upright cylinder around the z axis that holds the mesh."""
        return float(np.hypot(self.vertices[:, 0], self.vertices[:, 1]).max())


Part = tuple[Floats, Ints, int, float]  # vertices, quads, paint, ambient


def _grid(rows: int, columns: int, wrap: bool) -> Ints:
    """Quads over a rows x columns grid of vertices; ``wrap`` joins the last column to the first."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns if wrap else columns - 1), indexing="ij")
    i, j = i.ravel(), j.ravel()
    k = (j + 1) % columns
    return np.stack([i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j], axis=1)


def _lathe(profile: list[tuple[float, float]], paint: int = MAIN, ambient: float = 1.0, steps: int = 32) -> Part:
    """Surface of revolution of (radius, z) points; going up the outer wall the normals point outwards."""
    r, z = np.array(profile).T
    a = np.arange(steps) * (2 * np.pi / steps)
    ring = np.stack([np.cos(a), np.sin(a)], axis=1)
    xyz = np.concatenate([r[:, None, None] * ring[None], np.broadcast_to(z[:, None, None], (len(r), steps, 1))], axis=2)
    return xyz.reshape(-1, 3), _grid(len(r), steps, wrap=True), paint, ambient


def _ellipsoid(
    center: tuple[float, float, float], radii: tuple[float, float, float], paint: int = MAIN, steps: int = 24
) -> Part:
    t = np.linspace(-np.pi / 2, np.pi / 2, steps // 2 + 1)
    vertices, quads, _, _ = _lathe([(float(np.cos(a)), float(np.sin(a))) for a in t], steps=steps)
    return vertices * np.array(radii) + np.array(center), quads, paint, 1.0


def _box(
    low: tuple[float, float, float], high: tuple[float, float, float], paint: int = MAIN, cells: int = 5
) -> list[Part]:
    """Six sides, each split into cells x cells quads so that sorting faces by depth stays right."""
    lo, hi = np.array(low), np.array(high)
    s = np.linspace(0, 1, cells + 1)
    u, v = (g.ravel() for g in np.meshgrid(s, s, indexing="xy"))
    sides: list[Part] = []
    for axis in range(3):
        for top in (0, 1):
            unit = np.zeros((len(u), 3))
            first, second = ((axis + 1) % 3, (axis + 2) % 3) if top else ((axis + 2) % 3, (axis + 1) % 3)
            unit[:, axis], unit[:, first], unit[:, second] = top, u, v
            sides.append((lo + unit * (hi - lo), _grid(cells + 1, cells + 1, wrap=False), paint, 1.0))
    return sides


def _tube(path: Floats, radii: Floats, paint: int = MAIN, steps: int = 12) -> Part:
    """Tube of varying radius swept along a path [n, 3] that does not run parallel to (0.1, 0.2, 1) x tangent = 0."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    side = np.cross(tangent, np.cross(tangent[0], tangent[-1]) if abs(tangent[0] @ tangent[-1]) < 0.999 else [0, 1, 0])
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    other = np.cross(tangent, side)
    a = np.arange(steps) * (2 * np.pi / steps)
    ring = np.cos(a)[None, :, None] * side[:, None] + np.sin(a)[None, :, None] * other[:, None]
    vertices = path[:, None] + radii[:, None, None] * ring
    return vertices.reshape(-1, 3), _grid(len(path), steps, wrap=True), paint, 1.0


def _join(parts: list[list[Part] | Part]) -> Mesh:
    """One mesh of several parts; a list of parts counts as one part for shadows."""
    vertices, quads, paint, ambient, index, base = [], [], [], [], [], 0
    for number, group in enumerate(parts):
        for v, q, code, light in group if isinstance(group, list) else [group]:
            vertices.append(v)
            quads.append(q + base)
            paint.append(np.full(len(q), code))
            ambient.append(np.full(len(q), light))
            index.append(np.full(len(v), number))
            base += len(v)
    return Mesh(*(np.concatenate(x) for x in (vertices, quads, paint, ambient, index)))


def _curve(points: list[tuple[float, float]], cells: int) -> list[tuple[float, float]]:
    """The polyline of ``points`` with every leg split into ``cells``."""
    out = [points[0]]
    for (r0, z0), (r1, z1) in pairwise(points):
        out += [(r0 + (r1 - r0) * k / cells, z0 + (z1 - z0) * k / cells) for k in range(1, cells + 1)]
    return out


def _ball() -> Mesh:
    return _join([_ellipsoid((0, 0, 0.085), (0.085, 0.085, 0.085), steps=48)])


def _cube() -> Mesh:
    return _join([_box((-0.07, -0.07, 0), (0.07, 0.07, 0.14), cells=6)])


def _mug() -> Mesh:
    wall = _lathe([(0, 0), *_curve([(0.062, 0), (0.066, 0.15)], 6), (0.058, 0.15)])
    inside = _lathe([*_curve([(0.058, 0.15), (0.055, 0.02)], 5), (0, 0.02)], ambient=0.55)
    a = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 13)
    path = np.stack([0.062 + 0.048 * np.cos(a), np.zeros(13), 0.077 + 0.045 * np.sin(a)], axis=1)
    return _join([[wall, inside], _tube(path, np.full(13, 0.011))])


def _bottle() -> Mesh:
    body = _lathe([(0, 0), *_curve([(0.05, 0), (0.05, 0.14), (0.02, 0.19), (0.018, 0.225)], 4)])
    cap = _lathe([*_curve([(0.023, 0.222), (0.023, 0.25)], 2), (0, 0.25)], paint=DARK)
    return _join([body, cap])


def _bowl() -> Mesh:
    a = np.linspace(-np.pi / 2, 0, 9)
    outside = [(0.1 * float(np.cos(t)) ** 0.8, 0.085 + 0.085 * float(np.sin(t))) for t in a]
    inside = [(0.092 * float(np.cos(t)) ** 0.8, 0.085 + 0.075 * float(np.sin(t))) for t in a[::-1]]
    return _join([[_lathe([*outside, (0.092, 0.085)]), _lathe(inside, ambient=0.62)]])


def _plate() -> Mesh:
    rim = _lathe([(0, 0), (0.07, 0), (0.1, 0.01), (0.125, 0.02), (0.125, 0.024), (0.1, 0.017), (0.078, 0.01)], steps=40)
    flat = _lathe([(0.078, 0.01), (0.05, 0.009), (0.025, 0.009), (0, 0.009)], paint=LIGHT, steps=40)
    return _join([[rim, flat]])


def _cone() -> Mesh:
    def radius(z: float) -> float:
        return 0.065 - 0.053 * (z - 0.015) / 0.205

    def band(z0: float, z1: float, paint: int) -> Part:
        return _lathe(_curve([(radius(z0), z0), (radius(z1), z1)], 3), paint)

    top = _lathe([(0.012, 0.22), (0, 0.22)])
    base = _box((-0.08, -0.08, 0), (0.08, 0.08, 0.015), cells=5)
    return _join([base, [band(0.015, 0.09, MAIN), band(0.09, 0.135, PALE), band(0.135, 0.22, MAIN), top]])


def _duck() -> Mesh:
    parts: list[list[Part] | Part] = [
        _ellipsoid((0, 0, 0.06), (0.095, 0.068, 0.06)),
        _ellipsoid((-0.085, 0, 0.092), (0.034, 0.034, 0.022), steps=16),
        [
            _ellipsoid((0.055, 0, 0.142), (0.05, 0.047, 0.048)),
            _ellipsoid((0.11, 0, 0.132), (0.028, 0.026, 0.009), BEAK, 16),
            _ellipsoid((0.084, 0.03, 0.156), (0.011, 0.011, 0.011), DARK, 10),
            _ellipsoid((0.084, -0.03, 0.156), (0.011, 0.011, 0.011), DARK, 10),
        ],
        _ellipsoid((-0.01, 0.06, 0.07), (0.05, 0.014, 0.028), steps=16),
        _ellipsoid((-0.01, -0.06, 0.07), (0.05, 0.014, 0.028), steps=16),
    ]
    return _join(parts)


def _teddy() -> Mesh:
    parts: list[list[Part] | Part] = [_ellipsoid((0, 0, 0.075), (0.056, 0.062, 0.075))]
    parts.append(_ellipsoid((0.036, 0, 0.072), (0.03, 0.042, 0.05), LIGHT, 16))
    head: list[Part] = [
        _ellipsoid((0.006, 0, 0.178), (0.05, 0.056, 0.048)),
        _ellipsoid((0.05, 0, 0.165), (0.02, 0.024, 0.018), LIGHT, 14),
        _ellipsoid((0.068, 0, 0.172), (0.008, 0.01, 0.008), DARK, 10),
        _ellipsoid((0.047, 0.022, 0.192), (0.009, 0.009, 0.009), DARK, 10),
        _ellipsoid((0.047, -0.022, 0.192), (0.009, 0.009, 0.009), DARK, 10),
    ]
    parts.append(head)
    for side in (-1, 1):
        parts.append(_ellipsoid((0, 0.043 * side, 0.22), (0.014, 0.023, 0.023), steps=16))
        parts.append(_ellipsoid((0.02, 0.072 * side, 0.105), (0.026, 0.022, 0.038), steps=16))
        parts.append(_ellipsoid((0.07, 0.05 * side, 0.028), (0.046, 0.027, 0.028), steps=16))
        parts.append(_ellipsoid((0.108, 0.05 * side, 0.03), (0.012, 0.019, 0.02), LIGHT, 12))
    return _join(parts)


def _brick() -> Mesh:
    parts: list[list[Part] | Part] = [_box((-0.12, -0.06, 0), (0.12, 0.06, 0.075), cells=8)]
    for x in (-0.09, -0.03, 0.03, 0.09):
        for y in (-0.03, 0.03):
            stud, quads, paint, light = _lathe([(0.018, 0.075), (0.018, 0.094), (0, 0.094)], steps=14)
            parts.append((stud + np.array([x, y, 0.0]), quads, paint, light))
    return _join(parts)


def _ring() -> Mesh:
    a = np.linspace(0, 2 * np.pi, 17)
    profile = [(0.085 + 0.03 * float(np.cos(t)), 0.03 + 0.03 * float(np.sin(t))) for t in a]
    return _join([_lathe(profile, steps=40)])


def _banana() -> Mesh:
    a = np.linspace(-1.15, 1.15, 19)
    path = np.stack([0.125 * np.sin(a), 0.125 * np.cos(a) - 0.085, 0.026 + 0.02 * np.abs(a / 1.15) ** 2], axis=1)
    thick = 0.027 * np.sqrt(np.clip(1 - np.abs(a / 1.24) ** 3.0, 0, 1)) + 0.001
    body = _tube(path, thick)
    tips = [
        _ellipsoid(tuple(path[0]), (0.013, 0.013, 0.013), DARK, 10),
        _ellipsoid(tuple(path[-1]), (0.011, 0.011, 0.011), DARK, 10),
    ]
    return _join([[body, *tips]])


_BUILDERS: dict[str, Callable[[], Mesh]] = {
    "ball": _ball,
    "cube": _cube,
    "mug": _mug,
    "bottle": _bottle,
    "bowl": _bowl,
    "plate": _plate,
    "cone": _cone,
    "duck": _duck,
    "teddy": _teddy,
    "brick": _brick,
    "ring": _ring,
    "banana": _banana,
}
KINDS: tuple[str, ...] = tuple(_BUILDERS)


@cache
def mesh(kind: str) -> Mesh:
    """The mesh of one of ``KINDS``; raises KeyError for another name."""
    return _BUILDERS[kind]()


def face_colors(kind: str, main: Floats) -> Floats:
    """Albedo of every face of ``kind`` for an object whose main colour is ``main`` [3]: sRGB 0..1, float64 [q, 3]."""
    dark_main = float(main.mean()) < 0.25
    palette = np.array(
        [
            main,
            main + (1 - main) * (0.12 if kind == "plate" else 0.3),
            (0.85, 0.85, 0.85) if dark_main else (0.1, 0.09, 0.09),
            (0.75, 0.12, 0.05) if main[0] > 0.85 and main[2] < 0.12 and main[1] < 0.55 else (0.93, 0.45, 0.08),
            (0.45, 0.45, 0.47) if float(main.min()) > 0.8 else (0.93, 0.93, 0.92),
        ]
    )
    return palette[mesh(kind).paint]
