"""What lies under and behind the objects: floor, wall, table top, flat clutter on it, and the objects' shadows."""

from __future__ import annotations

from functools import cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis_train.data.scenes.clutter import lay_clutter
from deixis_train.data.scenes.world import Camera, World

Floats = NDArray[np.float64]
Image = NDArray[Any]  # floating point; OpenCV's own annotations say no more

SUBPIXEL = 4  # fractional bits of OpenCV's polygon corners
_FLOOR_Z = -0.72
_HORIZON = np.radians(4)  # rays less far below the horizon than this must end on a wall
_TABLE_COLORS = ((186, 140, 96), (140, 95, 60), (214, 186, 150), (178, 178, 176), (120, 122, 126), (222, 214, 200),
                 (150, 168, 178), (168, 176, 150), (92, 66, 48), (196, 160, 150), (70, 74, 80), (204, 198, 206),
                 (164, 120, 84), (108, 124, 132), (182, 172, 132), (118, 78, 62))  # fmt: skip
_FLOOR_COLORS = ((120, 112, 104), (170, 165, 158), (88, 84, 82), (140, 124, 106), (104, 112, 122), (150, 154, 146),
                 (128, 100, 78), (96, 104, 92), (160, 148, 150))  # fmt: skip
_WALL_COLORS = ((206, 202, 194), (178, 188, 192), (196, 186, 166), (172, 180, 168), (150, 146, 148), (214, 206, 198))


@cache
def _textures() -> list[Image]:
    """Maps of mean 0 and about unit height, float32 [512, 512], that tile. The first six are calm enough for floors."""
    rng = np.random.default_rng(20240229)

    def smooth(sigma_x: float, sigma_y: float) -> Image:
        """Periodic Gaussian noise of unit variance, blurred by the given sigmas in px."""
        spectrum = np.fft.rfft2(rng.normal(size=(512, 512)))
        fy, fx = np.fft.fftfreq(512)[:, None], np.fft.rfftfreq(512)[None]
        spectrum *= np.exp(-2 * np.pi**2 * ((sigma_x * fx) ** 2 + (sigma_y * fy) ** 2))
        out = np.fft.irfft2(spectrum, s=(512, 512))
        return ((out - out.mean()) / out.std()).astype(np.float32)

    y, x = np.mgrid[0:512, 0:512].astype(np.float32)
    turn = 2 * np.pi / 512
    board = (y // 128).astype(int)
    planks = np.where((y % 128) < 2.5, -3.0, rng.normal(size=4).astype(np.float32)[board])
    short = rng.normal(size=(8, 4)).astype(np.float32)[
        (y // 64).astype(int), ((x + 64 * (y // 64)) // 128 % 4).astype(int)
    ]
    tiles = np.where(
        ((x % 128) < 4) | ((y % 128) < 4), -2.2, 0.3 * rng.normal(size=(4, 4))[board, (x // 128).astype(int)]
    )
    weave = np.sin(turn * 32 * x) * np.sin(turn * 32 * y)
    veins = 1 - 5 * np.clip(0.2 - np.abs(smooth(26, 26)), 0, 1)
    maps = [
        0.5 * smooth(60, 60),
        0.9 * smooth(3, 3) + 0.6 * smooth(20, 20),
        planks + 0.5 * smooth(60, 2) + 0.3 * smooth(60, 6),
        tiles + 0.15 * smooth(3, 3),
        short + 0.3 * smooth(30, 2),
        0.5 * smooth(1.2, 1.2) + 0.5 * smooth(90, 90),
        np.sin(turn * 12 * y + 2.2 * smooth(90, 14)) + 0.6 * smooth(40, 2),
        np.sin(turn * 5 * y + 3.5 * smooth(70, 20)) + 0.3 * smooth(50, 1.5),
        0.6 * weave + 0.4 * smooth(2, 2),
        np.where(((x // 64) + (y // 64)) % 2 > 0, 1.0, -1.0) + 0.15 * smooth(4, 4),
        (np.abs((x % 128) - 64) < 20) * 1.0 + (np.abs((y % 128) - 64) < 20) * 1.0 - 0.6 + 0.2 * weave,
        np.where(y % 64 < 26, 1.0, -0.7) + 0.15 * smooth(2, 2),
        0.9 * (veins - veins.mean()) + 0.4 * smooth(50, 50),
        1.4 * (smooth(5, 5) > 1.1) - 1.2 * (smooth(4, 4) > 1.3) + 0.2 * smooth(2, 2),
    ]
    return [m.astype(np.float32) for m in maps]


def _plane(rng: np.random.Generator, camera: Camera, z: float, density: float, calm: bool) -> Image:
    """Texture heights [h, w] of a textured plane at height ``z``; ``density`` texture px per world unit."""
    maps = _textures()
    texture = maps[int(rng.integers(6 if calm else len(maps)))]
    turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.03) + (rng.uniform(-0.8, 0.8) if rng.random() < 0.25 else 0.0)
    c, s = np.cos(turn) * density, np.sin(turn) * density
    to_texture = np.array([[c, -s, rng.uniform(0, 512)], [s, c, rng.uniform(0, 512)], [0, 0, 1]])
    matrix = camera.plane_homography(z) @ np.linalg.inv(to_texture)
    return cv2.warpPerspective(texture, matrix, (camera.width, camera.height), borderMode=cv2.BORDER_WRAP)


def _colored(rng: np.random.Generator, heights: Image, colors: tuple[tuple[int, int, int], ...]) -> Image:
    """A texture [h, w] in one colour and its shades, or between two colours: float32 RGB [h, w, 3]."""
    base = _paint(rng, colors)
    if rng.random() < 0.3:
        other = base + (_paint(rng, colors) - base) * np.float32(rng.uniform(0.25, 0.7))
        return base + (other - base) * np.clip(0.5 + 0.5 * heights, 0, 1)[..., None]
    return base * (1 + np.float32(rng.uniform(0.015, 0.085)) * heights)[..., None]


def _paint(rng: np.random.Generator, colors: tuple[tuple[int, int, int], ...]) -> Image:
    color = np.array(colors[int(rng.integers(len(colors)))]) / 255
    color = color.mean() + 0.82 * (color - color.mean())  # calm, or a wooden table and an orange thing look alike
    return np.clip(color * rng.uniform(0.85, 1.1) * (1 + rng.normal(0, 0.03, 3)), 0, 1).astype(np.float32)


def fill(mask: NDArray[Any], points: Floats, value: float | tuple[float, ...] = 255) -> None:
    """Fills a convex polygon [n, 2] (px, origin at the corner of the first pixel) into ``mask``, in place."""
    corners = np.round(points * 2**SUBPIXEL - 2 ** (SUBPIXEL - 1)).astype(np.int32)
    cv2.fillConvexPoly(mask, corners, value, cv2.LINE_AA, SUBPIXEL)  # type: ignore[call-overload]


def _hull(points: Floats) -> Floats:
    return cv2.convexHull(points.astype(np.float32))[:, 0].astype(np.float64)


def _blend(picture: Image, mask: NDArray[np.uint8], color: Image) -> Image:
    cover = mask.astype(np.float32)[..., None] / 255
    return picture + (color - picture) * cover


def _wall(rng: np.random.Generator, camera: Camera, picture: Image) -> Image:
    """Puts a wall behind the floor: always where the picture reaches the horizon, else now and then."""
    top = np.arcsin(-camera.axes[2, 2]) - np.arctan(camera.height / 2 / camera.focal)  # of the view, below the horizon
    if top > _HORIZON and rng.random() < 0.5:
        return picture
    away = camera.axes[2, :2] / np.linalg.norm(camera.axes[2, :2])
    turn = rng.uniform(-0.25, 0.25)
    normal = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ away
    along = np.array([-normal[1], normal[0]])
    base = normal * rng.uniform(1.0, 2.2)
    color = _paint(rng, _WALL_COLORS) * np.float32(rng.uniform(0.6, 0.95))
    for height, paint in ((0.0, color * np.float32(rng.uniform(0.6, 1.2))), (rng.uniform(0.05, 0.1), color)):
        ends = np.array([[*(base + along * k), _FLOOR_Z + height] for k in (-1.5, 1.5)])
        (left, right), depth = camera.project(ends)
        if (depth < 0.05).any():
            return picture
        if left[0] > right[0]:
            left, right = right, left
        slope = (right[1] - left[1]) / (right[0] - left[0])
        at = np.array([-8.0, camera.width + 8.0])
        line = np.column_stack([at, left[1] + slope * (at - left[0])])
        if line[:, 1].max() < 0:
            return picture
        mask = np.zeros(picture.shape[:2], np.uint8)
        fill(mask, np.concatenate([line, [[camera.width + 8.0, -8.0], [-8.0, -8.0]]]))
        picture = _blend(picture, mask, paint)
    return picture


def _shadows(rng: np.random.Generator, world: World) -> Image:
    """Factor [h, w] by which the objects' shadows darken the table."""
    camera = world.camera
    shade = np.zeros((camera.height, camera.width), np.uint8)
    contact = np.zeros_like(shade)
    for placed in world.objects:
        points, parts = placed.vertices(), placed.shape.parts
        cast = camera.project(points - world.light * (points[:, 2:] / world.light[2]))[0]
        low = points[:, 2] < 0.03 * placed.scale
        touch = camera.project(points * (1, 1, 0))[0]
        for part in range(int(parts.max()) + 1):
            own = parts == part
            fill(shade, _hull(cast[own]))
            if (own & low).sum() > 2:
                fill(contact, _hull(touch[own & low]))
    soft = cv2.GaussianBlur(shade, (0, 0), rng.uniform(0.8, 5.0) * camera.width / 512).astype(np.float32)
    near = cv2.GaussianBlur(contact, (0, 0), 4.5 * camera.width / 512).astype(np.float32)
    return (1 - np.float32(rng.uniform(0.25, 0.6) / 255) * soft) * (1 - np.float32(0.4 / 255) * near)


def background(rng: np.random.Generator, world: World, lamp: Floats) -> tuple[Image, tuple[int, int, int, int] | None]:
    """Floor, wall, table, clutter and the shadows on it under a lamp of colour ``lamp`` [3]: float32 RGB 0..1
    [h, w, 3], and the box of the visible table top in px (None where it is out of sight)."""
    camera = world.camera
    size = (camera.height, camera.width)
    floor = _plane(rng, camera, _FLOOR_Z, rng.uniform(110, 300), True)
    picture = _colored(rng, floor, _FLOOR_COLORS) * np.float32(rng.uniform(0.6, 0.95))
    top = np.column_stack([world.table, np.zeros(len(world.table))])
    drop = -world.light / world.light[2] * -_FLOOR_Z
    seen, depth = camera.project(top + drop)
    if (depth > 0.05).all():
        mask = np.zeros(size, np.uint8)
        fill(mask, _hull(seen))
        soft = cv2.GaussianBlur(mask, (0, 0), camera.width / 60)
        picture = picture * (1 - np.float32(0.5 / 255) * soft[..., None])
    picture = _wall(rng, camera, picture)
    edge = np.zeros(size, np.uint8)
    fill(edge, _hull(camera.project(np.concatenate([top, top - (0, 0, rng.uniform(0.02, 0.05))]))[0]))
    picture = _blend(picture, edge, _paint(rng, _TABLE_COLORS) * np.float32(0.45))

    table = _colored(rng, _plane(rng, camera, 0.0, rng.uniform(280, 700), False), _TABLE_COLORS)
    lay_clutter(rng, world, table)
    table *= (_shadows(rng, world) * np.float32(0.72 + 0.28 * world.light[2]))[..., None] * lamp.astype(np.float32)
    mask = np.zeros(size, np.uint8)
    fill(mask, camera.project(top)[0])
    ys, xs = np.flatnonzero((mask > 127).any(axis=1)), np.flatnonzero((mask > 127).any(axis=0))
    box = (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(xs) else None
    return _blend(picture, mask, table), box
