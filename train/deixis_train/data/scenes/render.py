"""Draws a world: a painter's-algorithm rasteriser over OpenCV's polygon fill, at twice the picture's resolution.

Faces are small, so one colour per face looks smooth after the reduction to picture size. Objects stand in disjoint
upright cylinders; drawing those in descending order of (squared distance to the camera - squared radius) on the ground
is exact for disjoint discs, so no depth buffer is needed. The table and the floor are planes and come from
perspective-warped textures; shadows are the objects' outlines projected along the light onto the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis_train.data.scenes.objects import face_colors, mesh
from deixis_train.data.scenes.world import Camera, Placed, World

Floats = NDArray[np.float64]
Image = NDArray[Any]  # floating point; OpenCV's own annotations say no more

OVER = 2  # supersampling factor per axis
_SUBPIXEL = 4  # fractional bits of OpenCV's polygon corners
_FLOOR_Z = -0.72
_TABLE_COLORS = ((186, 140, 96), (140, 95, 60), (214, 186, 150), (178, 178, 176), (120, 122, 126), (222, 214, 200),
                 (150, 168, 178), (168, 176, 150), (92, 66, 48), (196, 160, 150))  # fmt: skip
_FLOOR_COLORS = ((120, 112, 104), (170, 165, 158), (88, 84, 82), (140, 124, 106), (104, 112, 122), (150, 154, 146))


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
def _textures() -> list[Image]:
    """Grey factor maps around 1, float32 [512, 512], that tile: wood grain, planks, cloth, speckle, checks, plain."""
    rng = np.random.default_rng(20240229)

    def smooth(sigma_x: float, sigma_y: float) -> Image:
        """Periodic Gaussian noise of unit variance, blurred by the given sigmas in px."""
        spectrum = np.fft.rfft2(rng.normal(size=(512, 512)))
        fy, fx = np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None]
        spectrum *= np.exp(-2 * np.pi**2 * ((sigma_x * fx) ** 2 + (sigma_y * fy) ** 2))
        out = np.fft.irfft2(spectrum, s=(512, 512))
        return ((out - out.mean()) / out.std()).astype(np.float32)

    y, x = np.mgrid[0:512, 0:512].astype(np.float32)
    rings = np.sin(2 * np.pi * 12 * y / 512 + 2.2 * smooth(90, 14))
    planks = np.where((y % 128) < 2.5, -3.0, rng.normal(size=4).astype(np.float32)[(y // 128).astype(int)])
    checks = np.where(((x // 64) + (y // 64)) % 2 > 0, 1.0, -1.0)
    maps = [
        1 + 0.05 * rings + 0.03 * smooth(40, 2),
        1 + 0.09 * planks + 0.04 * smooth(60, 2) + 0.03 * smooth(60, 6),
        1 + 0.03 * np.sin(2 * np.pi * x / 16) * np.sin(2 * np.pi * y / 16) + 0.02 * smooth(2, 2),
        1 + 0.045 * smooth(3, 3) + 0.03 * smooth(20, 20),
        1 + 0.07 * checks + 0.01 * smooth(4, 4),
        1 + 0.025 * smooth(60, 60),
    ]
    return [m.astype(np.float32) for m in maps]


@cache
def _grain() -> Image:
    """Sensor noise, float32 [1100, 1100, 3] of unit variance; pictures take random windows of it."""
    return np.random.default_rng(7).normal(size=(1100, 1100, 3)).astype(np.float32)


def _plane(rng: np.random.Generator, camera: Camera, z: float, density: float, flat: bool) -> Image:
    """Texture factors [h, w] of a textured plane at height ``z``; ``density`` texture px per world unit."""
    maps = _textures()
    texture = maps[int(rng.choice([3, 4, 5, 1]) if flat else rng.integers(len(maps)))]
    turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.03)
    c, s = np.cos(turn) * density, np.sin(turn) * density
    to_texture = np.array([[c, -s, rng.uniform(0, 512)], [s, c, rng.uniform(0, 512)], [0, 0, 1]])
    matrix = camera.plane_homography(z) @ np.linalg.inv(to_texture)
    return cv2.warpPerspective(texture, matrix, (camera.width, camera.height), borderMode=cv2.BORDER_WRAP)


def _fill(mask: NDArray[np.uint8], points: Floats, value: int = 255, smooth: bool = True) -> None:
    corners = np.round(points * 2**_SUBPIXEL - 2 ** (_SUBPIXEL - 1)).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, value, cv2.LINE_AA if smooth else cv2.LINE_8, _SUBPIXEL)


def _hull(points: Floats) -> Floats:
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)


def _background(rng: np.random.Generator, world: World) -> tuple[Image, tuple[int, int, int, int] | None]:
    """Floor, table and the shadows on it: float32 RGB 0..1 [h, w, 3], and the visible table's box."""
    camera = world.camera
    size = (camera.height, camera.width)

    def paint(colors: tuple[tuple[int, int, int], ...]) -> Image:
        return (np.array(colors[int(rng.integers(len(colors)))]) / 255 * rng.uniform(0.88, 1.08)).astype(np.float32)

    picture = _plane(rng, camera, _FLOOR_Z, rng.uniform(120, 260), True)[..., None] * paint(_FLOOR_COLORS) * 0.8
    top = np.column_stack([world.table, np.zeros(len(world.table))])
    drop = -world.light / world.light[2] * -_FLOOR_Z
    for shape, sigma, gain, rest in (
        (top + drop, camera.width / 60, 0.55, None),
        (np.concatenate([top, top - (0, 0, 0.035)]), 0, 1.0, paint(_TABLE_COLORS) * 0.45),
    ):
        mask = np.zeros(size, np.uint8)
        seen, depth = camera.project(shape)
        if (depth > 0.05).all():
            _fill(mask, _hull(seen))
        cover = mask.astype(np.float32)[..., None] * np.float32(gain / 255)
        if sigma:
            cover = cv2.GaussianBlur(cover, (0, 0), sigma)[..., None]
        picture = picture * (1 - cover) + (cover * rest if rest is not None else 0)

    mask = np.zeros(size, np.uint8)
    _fill(mask, camera.project(top)[0])
    shade = np.zeros(size, np.uint8)
    contact = np.zeros(size, np.uint8)
    for placed in world.objects:
        points, parts = placed.vertices(), mesh(placed.kind).parts
        cast = points - world.light * (points[:, 2:] / world.light[2])
        cast = camera.project(cast)[0]
        for part in range(int(parts.max()) + 1):
            _fill(shade, _hull(cast[parts == part]))
        low = points[points[:, 2] < 0.03 * placed.scale] * (1, 1, 0)
        _fill(contact, _hull(camera.project(low)[0]))
    shade = cv2.GaussianBlur(shade, (0, 0), rng.uniform(0.8, 4.0) * camera.width / 512).astype(np.float32)
    contact = cv2.GaussianBlur(contact, (0, 0), 4.5 * camera.width / 512).astype(np.float32)
    factor = (1 - rng.uniform(0.3, 0.6) / 255 * shade) * (1 - 0.4 / 255 * contact)
    grain = _plane(rng, camera, 0.0, rng.uniform(300, 600), False)
    table = (grain * factor * (0.72 + 0.28 * world.light[2]))[..., None] * paint(_TABLE_COLORS)
    cover = mask.astype(np.float32)[..., None] / 255
    picture = picture * (1 - cover) + table * cover
    ys, xs = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(xs) else None
    return picture, box


def _shade(world: World, placed: Placed, centers: Floats, normals: Floats, gloss: float) -> Floats:
    """Colours [q, 3] of faces: sky light, the lamp, light thrown back by the table, and a highlight."""
    view = world.camera.position - centers
    view /= np.linalg.norm(view, axis=1, keepdims=True)
    half = view + world.light
    half /= np.linalg.norm(half, axis=1, keepdims=True)
    ambient = mesh(placed.kind).ambient
    lamp = np.clip(normals @ world.light, 0, 1) * ambient
    near = np.clip(centers[:, 2] / (0.1 * placed.scale), 0, 1)
    sky = (0.42 + 0.13 * normals[:, 2]) * ambient * (0.72 + 0.28 * near)
    shine = gloss * np.clip((normals * half).sum(axis=1), 0, 1) ** 40 * (ambient > 0.9)
    return face_colors(placed.kind, placed.tint) * (sky + 0.68 * lamp)[:, None] + shine[:, None]


def _faces(world: World, placed: Placed) -> tuple[NDArray[np.int32], Floats, Floats, Floats]:
    """Corners [q, 4, 2] (fixed-point px of the supersampled picture, far to near), colours [q, 3] of the faces that
    look at the camera, and the lowest and highest corner [2] in supersampled px."""
    shape, points = mesh(placed.kind), placed.vertices()
    corners = points[shape.quads]
    centers = corners.mean(axis=1)
    normals = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    normals /= np.maximum(length, 1e-12)
    towards = ((world.camera.position - centers) * normals).sum(axis=1)
    keep = np.flatnonzero((towards > 0) & (length[:, 0] > 1e-9))
    keep = keep[np.argsort(-np.linalg.norm(centers[keep] - world.camera.position, axis=1))]
    gloss = 0.08 if placed.kind in ("teddy", "banana") else 0.4
    colors = _shade(world, placed, centers, normals, gloss)[keep]
    pixels = world.camera.project(points)[0] * OVER - 0.5
    fixed = np.round(pixels * 2**_SUBPIXEL).astype(np.int32)[shape.quads[keep]]
    return fixed, colors, pixels.min(axis=0), pixels.max(axis=0)


def draw(world: World, rng: np.random.Generator) -> Drawing:
    """Draws ``world``; ``rng`` chooses colours and textures of table and floor, exposure and noise."""
    camera = world.camera
    size = (camera.height, camera.width)
    background, table = _background(rng, world)
    faces = np.zeros((size[0] * OVER, size[1] * OVER), np.int32)  # index into `table_of_colors`, 0 = background
    colors: list[Floats] = [np.zeros((1, 3))]
    owner: list[NDArray[np.int64]] = [np.zeros(1, np.int64)]
    outline = np.zeros(len(world.objects))
    windows: list[tuple[slice, slice]] = [(slice(0), slice(0))] * len(world.objects)
    eye = camera.position[:2]
    power = [float(((o.at - eye) ** 2).sum() - o.radius**2) for o in world.objects]
    count = 1
    for index in np.argsort(power)[::-1]:
        fixed, shaded, low, high = _faces(world, world.objects[index])
        x0, y0 = (max(0, int(v) // OVER * OVER - 2 * OVER) for v in low)
        x1 = min(faces.shape[1], (int(high[0]) // OVER + 3) * OVER)
        y1 = min(faces.shape[0], (int(high[1]) // OVER + 3) * OVER)
        window = faces[y0:y1, x0:x1]
        patch = np.zeros(window.shape, np.int32)
        fixed -= np.array([x0, y0], np.int32) << _SUBPIXEL
        for number, corners in enumerate(fixed, start=count):
            cv2.fillConvexPoly(patch, corners, number, cv2.LINE_8, _SUBPIXEL)
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
    picture = paint + background * (1 - alpha)  # `paint` is already weighted: the background's entry is black
    return Drawing(_develop(picture, rng), masks, visible, table)


def _develop(picture: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Exposure, a slight colour cast, softness and sensor noise; float RGB 0..1 to uint8."""
    gain = rng.uniform(0.95, 1.2) * (1 + rng.normal(0, 0.02, 3))
    picture = picture * gain.astype(np.float32)
    softness = rng.uniform(0, 0.7)
    if softness > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), softness)
    h, w = picture.shape[:2]
    y, x = int(rng.integers(1100 - h)), int(rng.integers(1100 - w))
    picture = picture + _grain()[y : y + h, x : x + w] * np.float32(rng.uniform(0.002, 0.014))
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8)
