"""Surfaces that the objects of the table scenes are built from: revolved profiles, ellipsoids, boxes and swept tubes,
all of them small quads so that sorting faces by depth is right and one colour per face looks smooth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Point = tuple[float, float, float]
Profile = list[tuple[float, float]]  # (radius, z)

# Paint codes of faces: MAIN takes the object's colour and its material's pattern, LIGHT and DEEP a lighter and a darker
# tint of the colour, the others are fixed.
MAIN, LIGHT, DARK, BEAK, PALE, DEEP = range(6)


@dataclass(frozen=True)
class Mesh:
    """A mesh in world units (about 0.2 for a whole object), z up, standing on z = 0, axis at the origin.

    vertices: float64 [v, 3]. quads: int64 [q, 4], counter-clockwise seen from outside. paint: int64 [q], a paint code.
    ambient: float64 [q] in (0, 1], the share of ambient light that reaches a face. parts: int64 [v], index of the
    nearly convex part a vertex belongs to (shadows are cast per part). layers: int64 [q]; a higher layer lies wholly
    above a lower one, so that seen from above it is drawn later whatever the distances.
    """

    vertices: Floats
    quads: Ints
    paint: Ints
    ambient: Floats
    parts: Ints
    layers: Ints

    @property
    def radius(self) -> float:
        """Radius of the upright cylinder around the z axis that holds the mesh."""
        return float(np.hypot(self.vertices[:, 0], self.vertices[:, 1]).max())


Part = tuple[Floats, Ints, "int | Ints", float]  # vertices, quads, paint (one code, or one per quad), ambient


def _grid(rows: int, columns: int, wrap: bool) -> Ints:
    """Quads over a rows x columns grid of vertices; ``wrap`` joins the last column to the first."""
    i, j = np.meshgrid(np.arange(rows - 1), np.arange(columns if wrap else columns - 1), indexing="ij")
    i, j = i.ravel(), j.ravel()
    k = (j + 1) % columns
    return np.stack([i * columns + j, i * columns + k, (i + 1) * columns + k, (i + 1) * columns + j], axis=1)


def lathe(
    profile: Profile,
    paint: int | Ints = MAIN,
    ambient: float = 1.0,
    steps: int = 32,
    lobes: int = 0,
    depth: float = 0.0,
) -> Part:
    """Surface of revolution of (radius, z) points; going up the outer wall the normals point outwards. ``lobes`` waves
    of relative ``depth`` go round it. The quads come row after row of the profile, ``steps`` in each."""
    r, z = np.array(profile).T
    a = np.arange(steps) * (2 * np.pi / steps)
    ring = np.stack([np.cos(a), np.sin(a)], axis=1) * (1 + depth * np.cos(lobes * a))[:, None]
    xyz = np.concatenate([r[:, None, None] * ring[None], np.broadcast_to(z[:, None, None], (len(r), steps, 1))], axis=2)
    return xyz.reshape(-1, 3), _grid(len(r), steps, wrap=True), paint, ambient


def ellipsoid(center: Point, radii: Point, paint: int | Ints = MAIN, steps: int = 20) -> Part:
    """Ellipsoid with ``steps`` meridians and half as many rows."""
    t = np.linspace(-np.pi / 2, np.pi / 2, steps // 2 + 1)
    vertices, quads, _, _ = lathe([(float(np.cos(a)), float(np.sin(a))) for a in t], steps=steps)
    return vertices * np.array(radii) + np.array(center), quads, paint, 1.0


def box(low: Point, high: Point, paint: int = MAIN, cells: int = 5, edge: float = 0.0, panel: int = MAIN) -> list[Part]:
    """Six sides, each split into about cells x cells quads. Edges are rounded with radius ``edge``; the cells in the
    middle of each side have the paint ``panel`` (where ``panel`` is not MAIN)."""
    lo, hi = np.array(low), np.array(high)
    inset = np.array([0.3, 1.0]) * edge / float((hi - lo).min()) if edge > 0 else np.zeros(0)
    first, last = (inset[-1], 1 - inset[-1]) if edge > 0 else (0.0, 1.0)
    s = np.unique(np.concatenate([[0.0], inset, np.linspace(first, last, cells + 1), 1 - inset, [1.0]]).round(9))
    middle = (s[:-1] + s[1:]) / 2
    center_u, center_v = (g.ravel() for g in np.meshgrid(middle, middle, indexing="xy"))
    inner = np.maximum(np.abs(center_u - 0.5), np.abs(center_v - 0.5)) < 0.3
    codes = np.where(inner, panel, paint) if panel != MAIN else np.full(len(inner), paint)
    u, v = (g.ravel() for g in np.meshgrid(s, s, indexing="xy"))
    sides: list[Part] = []
    for axis in range(3):
        for top in (0, 1):
            unit = np.zeros((len(u), 3))
            one, two = ((axis + 1) % 3, (axis + 2) % 3) if top else ((axis + 2) % 3, (axis + 1) % 3)
            unit[:, axis], unit[:, one], unit[:, two] = top, u, v
            points = lo + unit * (hi - lo)
            if edge > 0:
                core = np.clip(points, lo + edge, hi - edge)
                out = points - core
                points = core + out / np.linalg.norm(out, axis=1, keepdims=True) * edge
            sides.append((points, _grid(len(s), len(s), wrap=False), codes, 1.0))
    return sides


def tube(path: Floats, radii: Floats, paint: int = MAIN, steps: int = 10, flat: float = 1.0) -> Part:
    """Tube of varying radius swept along a plane path [n, 3]; ``flat`` stretches its section across that plane."""
    tangent = np.gradient(path, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    straight = abs(float(tangent[0] @ tangent[len(path) // 2])) > 0.9999
    side = np.cross(tangent, [0.0, 1.0, 0.0] if straight else np.cross(tangent[0], tangent[len(path) // 2]))
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    other = np.cross(tangent, side) * flat
    a = np.arange(steps) * (2 * np.pi / steps)
    ring = np.cos(a)[None, :, None] * side[:, None] + np.sin(a)[None, :, None] * other[:, None]
    vertices = path[:, None] + radii[:, None, None] * ring
    return vertices.reshape(-1, 3), _grid(len(path), steps, wrap=True), paint, 1.0


def split(part: Part, groups: Ints) -> list[Part]:
    """The part cut into pieces: quads of the same group [q] stay together. Bent things cast their shadow by pieces."""
    vertices, quads, paint, ambient = part
    codes, pieces = np.broadcast_to(paint, len(quads)), []
    for group in np.unique(groups):
        used, corners = np.unique(quads[groups == group], return_inverse=True)
        pieces.append((vertices[used], corners.reshape(-1, 4), codes[groups == group], ambient))
    return pieces


def join(parts: Sequence[list[Part] | Part], first: int = 0) -> Mesh:
    """One mesh of several parts, put on z = 0; a list of parts counts as one part for shadows. The ``first`` parts are
    the lower layer of the mesh."""
    vertices, quads, paint, ambient, index, layers, base = [], [], [], [], [], [], 0
    for number, group in enumerate(parts):
        for v, q, code, light in group if isinstance(group, list) else [group]:
            vertices.append(v)
            quads.append(q + base)
            paint.append(np.broadcast_to(code, len(q)))
            ambient.append(np.full(len(q), light))
            index.append(np.full(len(v), number))
            layers.append(np.full(len(q), int(number >= first)))
            base += len(v)
    points = np.concatenate(vertices)
    points[:, 2] -= points[:, 2].min()
    return Mesh(points, *(np.concatenate(x) for x in (quads, paint, ambient, index, layers)))


def curve(points: Profile, cells: int) -> Profile:
    """The polyline of ``points`` with every leg split into ``cells``."""
    out = [points[0]]
    for (r0, z0), (r1, z1) in pairwise(points):
        out += [(r0 + (r1 - r0) * k / cells, z0 + (z1 - z0) * k / cells) for k in range(1, cells + 1)]
    return out
