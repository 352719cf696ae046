"""What stands where: camera, light, table and objects of one scene, drawn from a random generator."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deixis_train.data.scenes.materials import PLAIN, Material, draw_material
from deixis_train.data.scenes.objects import COLORS, KINDS, SIZES, VARIANTS, mesh
from deixis_train.data.scenes.shapes import Mesh

Floats = NDArray[np.float64]

ASPECTS: tuple[tuple[float, float], ...] = ((4 / 3, 0.64), (1.0, 0.12), (3 / 4, 0.12), (16 / 9, 0.12))  # w/h, share
MIN_OBJECTS, MAX_OBJECTS = 3, 10
MAX_ROLL = 1.5  # degrees; more would let feet that lie far apart sideways swap their order from front to back
MAX_COVER = 0.6  # share of an object's box that the boxes of nearer objects may take, a cheap guess before drawing


@dataclass(frozen=True)
class Camera:
    """Pinhole camera with at most ``MAX_ROLL`` degrees of roll. World z is up, the table top is z = 0; pixels have
    their origin at the top left corner of the picture, so a pixel's centre is at + 0.5."""

    width: int
    height: int
    focal: float  # px
    position: Floats  # [3]
    axes: Floats  # [3, 3], rows: right, down, forward

    def project(self, points: Floats) -> tuple[Floats, Floats]:
        """World points [..., 3] to pixels [..., 2] and depths [...] along the view axis."""
        local = (points - self.position) @ self.axes.T
        depth = local[..., 2]
        center = np.array([self.width / 2, self.height / 2])
        return local[..., :2] / depth[..., None] * self.focal + center, depth

    def ground(self, x: float, y: float) -> Floats:
        """The point [3] of the table plane seen at pixel (x, y)."""
        ray = np.array([(x - self.width / 2) / self.focal, (y - self.height / 2) / self.focal, 1.0]) @ self.axes
        return self.position - ray * (self.position[2] / ray[2])

    def plane_homography(self, z: float) -> Floats:
        """[3, 3] matrix from homogeneous (X, Y, 1) on the plane at height ``z`` to homogeneous pixels."""
        intrinsics = np.array([[self.focal, 0, self.width / 2], [0, self.focal, self.height / 2], [0, 0, 1]])
        plane = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, z]])
        plane[:, 2] -= self.position
        return intrinsics @ self.axes @ plane


@dataclass(frozen=True)
class Placed:
    """One object of the world: its names, its turn about z in radians, and where it stands (X, Y)."""

    kind: str
    color: str
    size: str
    tint: Floats  # [3] sRGB 0..1, the colour with a little jitter
    turn: float
    at: Floats  # [2]
    variant: int = 0  # which of the kind's meshes
    material: Material = PLAIN

    @property
    def shape(self) -> Mesh:
        return mesh(self.kind, self.variant)

    @property
    def scale(self) -> float:
        return SIZES[self.size]

    @property
    def radius(self) -> float:
        return self.shape.radius * self.scale

    def vertices(self) -> Floats:
        """World coordinates [v, 3] of the mesh's vertices."""
        c, s = np.cos(self.turn), np.sin(self.turn)
        points = self.shape.vertices @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]]) * self.scale
        points[:, :2] += self.at
        return points


@dataclass(frozen=True)
class World:
    """A scene before it is drawn. ``table`` holds the corners [n, 2] of the convex table top, ``light`` the unit vector
    towards the lamp."""

    camera: Camera
    table: Floats
    light: Floats
    objects: tuple[Placed, ...]


def _camera(rng: np.random.Generator, longest: int) -> Camera:
    ratios, shares = zip(*ASPECTS, strict=True)
    ratio = ratios[int(rng.choice(len(ratios), p=shares))]
    width, height = (longest, round(longest / ratio)) if ratio >= 1 else (round(longest * ratio), longest)
    half = np.radians(rng.uniform(26, 46)) / 2  # half the angle of view across the shorter side
    focal = min(width, height) / 2 / np.tan(half)
    distance = rng.uniform(0.78, 1.14) / 2 / np.tan(half)
    pitch, yaw = np.radians(rng.uniform(26, 62)), np.radians(rng.uniform(-35, 35))
    forward = np.array([np.sin(yaw) * np.cos(pitch), np.cos(yaw) * np.cos(pitch), -np.sin(pitch)])
    right = np.array([np.cos(yaw), -np.sin(yaw), 0.0])
    down = np.cross(forward, right)
    roll = np.radians(rng.uniform(-MAX_ROLL, MAX_ROLL))
    c, s = np.cos(roll), np.sin(roll)
    axes = np.stack([c * right + s * down, c * down - s * right, forward])
    target = np.array([rng.uniform(-0.08, 0.08), rng.uniform(-0.1, 0.05), 0.05])
    return Camera(width, height, float(focal), target - forward * distance, axes)


def _table(rng: np.random.Generator) -> Floats:
    if rng.random() < 0.2:
        a = np.arange(64) * (2 * np.pi / 64)
        return rng.uniform(0.58, 0.8) * np.stack([np.cos(a), np.sin(a)], axis=1)
    w, d = rng.uniform(0.62, 0.85), rng.uniform(0.46, 0.56)
    return np.array([[-w, -d], [w, -d], [w, d], [-w, d]])


def _inside(table: Floats, point: Floats, margin: float) -> bool:
    """Whether a disc of radius ``margin`` about ``point`` lies in the convex polygon (corners counter-clockwise)."""
    edge = np.roll(table, -1, axis=0) - table
    normal = np.stack([-edge[:, 1], edge[:, 0]], axis=1) / np.linalg.norm(edge, axis=1, keepdims=True)
    return bool((((point - table) * normal).sum(axis=1) >= margin).all())


def _names(rng: np.random.Generator, taken: list[Placed]) -> tuple[str, str, str]:
    """Kind, colour and size of a next object; shares a kind or a colour with another often enough that names alone do
    not always single an object out, but never all three."""
    while True:
        kind, color = str(rng.choice(KINDS)), str(rng.choice(list(COLORS)))
        size = str(rng.choice(list(SIZES)))
        if taken and rng.random() < 0.35:
            kind = taken[int(rng.integers(len(taken)))].kind
        if taken and rng.random() < 0.25:
            color = taken[int(rng.integers(len(taken)))].color
        if all((kind, color, size) != (o.kind, o.color, o.size) for o in taken):
            return kind, color, size


def _spot(rng: np.random.Generator, camera: Camera, objects: list[Placed], radius: float) -> Floats:
    """Where an object of ``radius`` might stand: anywhere in the picture, or close by another, often behind it."""
    if objects and rng.random() < 0.6:
        other = objects[int(rng.integers(len(objects)))]
        away = other.at - camera.position[:2]
        angle = np.arctan2(away[1], away[0]) + rng.normal(0, 0.55) + (np.pi if rng.random() < 0.35 else 0.0)
        reach = other.radius + radius + rng.uniform(0.008, 0.04)
        return other.at + reach * np.array([np.cos(angle), np.sin(angle)])
    return camera.ground(*(rng.uniform((0.05, 0.08), (0.95, 0.96)) * (camera.width, camera.height)))[:2]


def _too_hidden(camera: Camera, boxes: list[Floats], objects: list[Placed], box: Floats, at: Floats) -> bool:
    """Whether the box of a new object at ``at`` would leave too little of itself or of another in sight."""
    far = np.hypot(*(at - camera.position[:2]))
    for other, placed in zip(boxes, objects, strict=True):
        size = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
        behind = box if np.hypot(*(placed.at - camera.position[:2])) < far else other
        if size.prod() > MAX_COVER * (behind[2:] - behind[:2]).prod():
            return True
    return False


def build_world(rng: np.random.Generator, longest: int) -> World:
    """A world with up to ``MAX_OBJECTS`` objects that stand apart on the table and lie wholly in the picture, whose
    longer side has ``longest`` pixels. There may be fewer than ``MIN_OBJECTS`` when the table was too full."""
    camera, table = _camera(rng, longest), _table(rng)
    azimuth, elevation = rng.uniform(0, 2 * np.pi), np.radians(rng.uniform(38, 80))
    light = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    wanted = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
    objects: list[Placed] = []
    boxes: list[Floats] = []
    for _ in range(wanted):
        kind, color, size = _names(rng, objects)
        variant, material = int(rng.integers(VARIANTS)), draw_material(rng, kind)
        tint = np.clip(np.array(COLORS[color]) / 255 + rng.normal(0, 0.02, 3), 0.02, 0.97)
        radius = mesh(kind, variant).radius * SIZES[size]
        for _ in range(40):
            at = _spot(rng, camera, objects, radius)
            if not _inside(table, at, radius + 0.01):
                continue
            if any(np.hypot(*(at - o.at)) < radius + o.radius + 0.006 for o in objects):
                continue
            turn = rng.uniform(0, 2 * np.pi)
            if kind in ("duck", "teddy"):  # mostly facing the camera, so that the face shows
                to_camera = camera.position[:2] - at
                turn = np.arctan2(to_camera[1], to_camera[0]) + rng.uniform(-1.1, 1.1)
            placed = Placed(kind, color, size, tint, float(turn), at, variant, material)
            seen, _ = camera.project(placed.vertices())
            low, high = seen.min(axis=0), seen.max(axis=0)
            if (low < 2).any() or (high > (camera.width - 2, camera.height - 2)).any():
                continue
            box = np.concatenate([low, high])
            if _too_hidden(camera, boxes, objects, box, at):
                continue
            objects.append(placed)
            boxes.append(box)
            break
    return World(camera, table, light, tuple(objects))
