"""Draws a world: a painter's-algorithm rasteriser over OpenCV's polygon fill, at twice the picture's resolution.

Faces are small, so one colour per face looks smooth after the reduction to picture size. Objects stand in disjoint
upright cylinders; drawing those in descending order of (squared distance to the camera - squared radius) on the ground
is exact for disjoint discs, so no depth buffer is needed. What lies under and behind them comes from `surfaces`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis_train.data.scenes.materials import FINISHES, face_colors
from deixis_train.data.scenes.objects import face_palette
from deixis_train.data.scenes.shapes import Ints
from deixis_train.data.scenes.surfaces import SUBPIXEL, background
from deixis_train.data.scenes.world import Placed, World

Floats = NDArray[np.float64]
Image = NDArray[Any]  # floating point; OpenCV's own annotations say no more

OVER = 2  # supersampling factor per axis


@dataclass(frozen=True)
class Drawing:
    """A drawn world. picture: uint8 RGB [h, w, 3]. masks: bool [n, h, w], visible pixels of each object of the world,
    disjoint. visible: share of each object's own outline that is not hidden. table: box x0, y0, x1, y1 of the visible
    table top in px, or None."""

    picture: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    visible: list[float]
    table: tuple[int, int, int, int] | None


@cache
def _grain() -> Image:
    """Sensor noise, float32 [1100, 1100, 3] of unit variance; pictures take random windows of it."""
    return np.random.default_rng(7).normal(size=(1100, 1100, 3)).astype(np.float32)


@dataclass(frozen=True)
class _Lights:
    """lamp, sky: colours [3] of the lamp and of the light from all around. fill, strength: unit vector towards a
    second, weaker lamp without shadows, and its brightness."""

    lamp: Floats
    sky: Floats
    fill: Floats
    strength: float


def _lights(rng: np.random.Generator) -> _Lights:
    warm = rng.uniform(-1, 1)
    lamp = 1 + warm * np.array([0.07, 0.0, -0.09])
    sky = (1 - rng.uniform(-0.3, 1) * warm * np.array([0.05, 0.0, -0.06])) * rng.uniform(0.85, 1.12)
    azimuth, elevation = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.9)
    fill = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    return _Lights(lamp, sky, fill, float(rng.uniform(0.08, 0.28)) if rng.random() < 0.5 else 0.0)


def _shade(world: World, lights: _Lights, placed: Placed, centers: Floats, normals: Floats, keep: Ints) -> Floats:
    """Colours [k, 3] of the faces ``keep`` [k], given their centres and normals [k, 3]: light from all around, the
    lamp, a fill light, light thrown back by the table, highlights, and what a mirroring finish shows of the room."""
    shape = placed.shape
    shine, exponent, mirror = FINISHES[placed.material.finish]
    view = world.camera.position - centers
    view /= np.linalg.norm(view, axis=1, keepdims=True)
    half = view + world.light
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    ambient = shape.ambient[keep]
    lamp = 0.68 * np.clip(normals @ world.light, 0, 1) * ambient
    fill = lights.strength * np.clip(normals @ lights.fill, 0, 1) * ambient
    near = np.clip(centers[:, 2] / (0.1 * placed.scale), 0, 1)
    sky = (0.42 + 0.13 * normals[:, 2]) * ambient * (0.72 + 0.28 * near)
    albedo = face_colors(shape, face_palette(placed.kind, placed.tint), placed.material)[keep]
    light = np.outer(sky, lights.sky) + np.outer(lamp + fill, lights.lamp)
    if float(placed.tint.min()) > 0.8:  # white that mirrors a room looks grey
        mirror = 0.0
    if mirror:
        up = 2 * (normals * view).sum(axis=1) * normals[:, 2] - view[:, 2]  # z of the mirrored line of sight
        room = 0.45 + 0.75 / (1 + np.exp(-9 * (up - 0.15))) - 0.3 * np.clip(up - 0.6, 0, 1)
        light = (1 - mirror) * light + mirror * (room * ambient)[:, None]
    glint = shine * np.clip((normals * half).sum(axis=1), 0, 1) ** exponent * (ambient > 0.9)
    tinted = 0.5 * mirror * albedo + (1 - 0.5 * mirror)
    return albedo * light + glint[:, None] * tinted * lights.lamp


def _faces(world: World, lights: _Lights, placed: Placed) -> tuple[NDArray[np.int32], Floats, Floats, Floats]:
    """Corners [q, 4, 2] (fixed-point px of the supersampled picture, far to near), colours [q, 3] of the faces that
    look at the camera, and the lowest and highest corner [2] in supersampled px."""
    shape, points = placed.shape, placed.vertices()
    corners = points[shape.quads]
    centers = corners.mean(axis=1)
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals /= np.maximum(length, 1e-12)
    towards = ((world.camera.position - centers) * normals).sum(axis=1)
    keep = np.flatnonzero((towards > 0) & (length[:, 0] > 1e-9))
    distance = np.linalg.norm(centers[keep] - world.camera.position, axis=1)
    keep = keep[np.lexsort((-distance, shape.layers[keep]))]
    colors = _shade(world, lights, placed, centers[keep], normals[keep], keep)
    pixels = world.camera.project(points)[0] * OVER - 0.5
    fixed = np.round(pixels * 2**SUBPIXEL).astype(np.int32)[shape.quads[keep]]
    return fixed, colors, pixels.min(axis=0), pixels.max(axis=0)


def draw(world: World, rng: np.random.Generator) -> Drawing:
    """Draws ``world``; ``rng`` chooses the colour of the light, table, floor and wall with
    their textures, the flat clutter, exposure and noise."""
    camera = world.camera
    size = (camera.height, camera.width)
    lights = _lights(rng)
    ground, table = background(rng, world, lights.lamp)
    faces = np.zeros((size[0] * OVER, size[1] * OVER), np.int32)  # index into `table_of_colors`, 0 = background
    colors: list[Floats] = [np.zeros((1, 3))]
    owner: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    outline = np.zeros(len(world.objects))
    windows: list[tuple[slice, slice]] = [(slice(0), slice(0))] * len(world.objects)
    eye = camera.position[:2]
    power = [float(((o.at - eye) ** 2).sum() - o.radius**2) for o in world.objects]
    count = 1
    for index in np.argsort(power)[::-1]:
        fixed, shaded, low, high = _faces(world, lights, world.objects[index])
        x0, y0 = (max(0, int(v) // OVER * OVER - 2 * OVER) for v in low)
        x1 = min(faces.shape[1], (int(high[0]) // OVER + 3) * OVER)
        y1 = min(faces.shape[0], (int(high[1]) // OVER + 3) * OVER)
        window = faces[y0:y1, x0:x1]
        patch = np.zeros(window.shape, np.int32)
        fixed -= np.array([x0, y0], np.int32) << SUBPIXEL
        for number, corners in enumerate(fixed, start=count):
            cv2.fillConvexPoly(patch, corners, number, cv2.LINE_8, SUBPIXEL)
        drawn = patch > 0
        np.copyto(window, patch, where=drawn)
        outline[index] = np.count_nonzero(drawn)
        windows[index] = (slice(y0, y1), slice(x0, x1))
        colors.append(shaded)
        owner.append(np.full(len(shaded), index + 1))
        count += len(shaded)

    owners = np.concatenate(owner).astype(np.int32)[faces]
    masks = np.zeros((len(world.objects), *size), np.bool_)
    visible: list[float] = []
    for index, (rows, columns) in enumerate(windows):
        own = (owners[rows, columns] == index + 1).astype(np.uint8)
        visible.append(float(np.count_nonzero(own) / max(outline[index], 1)))
        small = (slice(rows.start // OVER, rows.stop // OVER), slice(columns.start // OVER, columns.stop // OVER))
        quarters = own.reshape(own.shape[0] // OVER, OVER, own.shape[1] // OVER, OVER).sum(axis=(1, 3))
        masks[index][small] = (quarters * 2 > OVER * OVER) | (
            (quarters * 2 == OVER * OVER) & ~masks[(slice(index), *small)].any(axis=0)
        )

    palette = np.clip(np.concatenate(colors) * 255, 0, 255).astype(np.uint8)
    paint = cv2.resize(palette[faces], size[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    alpha = cv2.resize((faces > 0).astype(np.float32), size[::-1], interpolation=cv2.INTER_AREA)[..., None]
    picture = paint + ground * (1 - alpha)  # `paint` is already weighted: the background's entry is black
    return Drawing(_develop(picture, rng), masks, visible, table)


def _develop(picture: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, a slight colour cast, softness and sensor noise; float RGB 0..1 to uint8."""
    gain = rng.uniform(0.98, 1.22) * (1 + rng.normal(0, 0.02, 3))
    picture = picture * gain.astype(np.float32)
    softness = rng.uniform(0, 0.7)
    if softness > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), softness)
    h, w = picture.shape[:2]
    y, x = int(rng.integers(1100 - h)), int(rng.integers(1100 - w))
    picture = picture + _grain()[y : y + h, x : x + w] * np.float32(rng.uniform(0.002, 0.014))
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
