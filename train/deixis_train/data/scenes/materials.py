"""Materials of the objects: a finish (how light is thrown back) and a pattern (how the colour varies over the faces),
combined freely and jittered, without ever changing the name of the colour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deixis_train.data.scenes.shapes import MAIN, Floats, Mesh

FINISHES: dict[str, tuple[float, float, float]] = {  # strength and exponent of the highlight, share of mirroring
    "chalk": (0.0, 1.0, 0.0),
    "matte": (0.07, 12.0, 0.0),
    "rubber": (0.14, 8.0, 0.0),
    "satin": (0.25, 22.0, 0.0),
    "plastic": (0.4, 40.0, 0.0),
    "glazed": (0.6, 90.0, 0.08),
    "lacquered": (0.5, 60.0, 0.2),
    "metal": (0.55, 26.0, 0.5),
}
PATTERNS: tuple[str, ...] = (
    "plain",
    "gradient",
    "speckle",
    "stripes",
    "upright stripes",
    "band",
    "dots",
    "patches",
    "slanted stripes",
)


@dataclass(frozen=True)
class Material:
    """What an object is made of. finish, pattern: names. frequency: of the pattern, from 0 to 1 of its range. phase:
    shift of the pattern, 0..1. contrast: -1 (darker) to 1 (lighter), how far the pattern goes from the colour. seed:
    of the speckle."""

    finish: str
    pattern: str
    frequency: float
    phase: float
    contrast: float
    seed: int


PLAIN = Material("plastic", "plain", 0.5, 0.0, 0.0, 0)


def draw_material(rng: np.random.Generator, kind: str) -> Material:
    """A material for an object of ``kind``: bears and bananas do not shine, half of all objects have one colour."""
    finishes = list(FINISHES)[: 3 if kind in ("teddy", "banana") else None]
    pattern = "plain" if rng.random() < 0.4 else PATTERNS[1 + int(rng.integers(len(PATTERNS) - 1))]
    contrast = rng.choice([-1.0, 1.0]) * rng.uniform(0.5, 1.0)
    finish = finishes[int(rng.integers(len(finishes)))]
    return Material(
        finish, pattern, float(rng.random()), float(rng.random()), float(contrast), int(rng.integers(2**31))
    )


def _pattern(material: Material, shape: Mesh) -> Floats:
    """The pattern's strength at every face, float64 [q] in 0..1; coordinates are relative to the mesh's extent."""
    centers = shape.vertices[shape.quads].mean(axis=1)
    x, y = centers[:, 0] / shape.radius, centers[:, 1] / shape.radius
    z = centers[:, 2] / float(shape.vertices[:, 2].max())
    around = np.arctan2(y, x) / (2 * np.pi)
    f, phase = material.frequency, material.phase
    if material.pattern == "plain":
        return np.zeros(len(z))
    if material.pattern == "gradient":
        return z if phase < 0.6 else (1 + x) / 2
    if material.pattern == "speckle":
        share = 0.08 + 0.25 * f
        rng = np.random.default_rng(material.seed)
        return (rng.random(len(z)) < share) * rng.uniform(0.4, 1.0, len(z))
    if material.pattern == "stripes":
        return ((z * (2 + 2.5 * f) + phase) % 1 < 0.42).astype(float)
    if material.pattern == "upright stripes":
        return ((around * int(4 + 7 * f) + phase) % 1 < 0.45).astype(float)
    if material.pattern == "band":
        return (np.abs(z - (0.25 + 0.5 * phase)) < 0.08 + 0.1 * f).astype(float)
    if material.pattern == "dots":
        rows = 3 + 2 * f
        u, v = around * int(6 + 5 * f) + phase, z * rows
        return (((u + np.floor(v) / 2) % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.085).astype(float)
    if material.pattern == "patches":
        w = 3 + 3 * f
        return (np.sin(w * x + 6 * phase) + np.sin(w * y + 9 * phase) + np.sin(w * z * 1.3) > 0.7).astype(float)
    if material.pattern == "slanted stripes":
        return ((z * (1.5 + f) + around * int(2 + 4 * f) + phase) % 1 < 0.42).astype(float)
    raise ValueError(f"unknown pattern {material.pattern!r}")


def face_colors(shape: Mesh, palette: Floats, material: Material) -> Floats:
    """Albedo of every face: sRGB 0..1, float64 [q, 3]. The pattern moves faces painted MAIN towards a lighter or darker
    tint, less so where a little more would change the name (white, black, yellow, orange)."""
    colors = palette[shape.paint]
    main = palette[MAIN]
    if material.pattern == "plain":
        return colors
    if float(main.min()) > 0.8:
        target, reach = main * 0.8, 0.7
    elif float(main.mean()) < 0.25:
        target, reach = main + 0.2, 0.7
    elif material.contrast > 0:
        target, reach = main + (1 - main) * 0.42, 0.85
    else:
        target, reach = main * (0.8 if main[0] > 0.85 else 0.6), 0.85
    strength = (_pattern(material, shape) * reach * abs(material.contrast) * (shape.paint == MAIN))[:, None]
    return colors + (target - colors) * strength
