"""Variety of the table scenes: meshes, materials, cameras and clutter differ by seed alone, and whatever is drawn from
them stays true to geometry, to the colours' names and to the masks."""

from __future__ import annotations

import colorsys
from dataclasses import replace

import numpy as np
import pytest

from deixis_train.data.scenes.clutter import lay_clutter
from deixis_train.data.scenes.materials import FINISHES, PATTERNS, Material, draw_material, face_colors
from deixis_train.data.scenes.objects import COLORS, KINDS, VARIANTS, face_palette, mesh
from deixis_train.data.scenes.render import draw
from deixis_train.data.scenes.shapes import MAIN
from deixis_train.data.scenes.world import MAX_OBJECTS, MAX_ROLL, World, build_world


def world_of(seed: int, size: int = 256) -> World:
    return build_world(np.random.default_rng(seed), size)


def hue(color: np.ndarray) -> float:
    return colorsys.rgb_to_hsv(*(float(c) for c in color))[0]


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_is_sound(kind: str) -> None:
    """No stray numbers, standing on the table, of a bounded size, facing outwards, closed enough to have a volume."""
    for variant in range(VARIANTS):
        shape = mesh(kind, variant)
        assert np.isfinite(shape.vertices).all()
        assert shape.vertices[:, 2].min() == 0.0
        assert 0.03 < shape.radius < 0.16 and shape.vertices[:, 2].max() < 0.3
        assert shape.quads.min() == 0 and shape.quads.max() == len(shape.vertices) - 1
        assert len(shape.paint) == len(shape.ambient) == len(shape.layers) == len(shape.quads)
        assert set(shape.parts) == set(range(int(shape.parts.max()) + 1))
        p = shape.vertices[shape.quads]
        halves = np.concatenate([p[:, [0, 1, 2]], p[:, [0, 2, 3]]])
        volume = np.einsum("ij,ij->i", halves[:, 0], np.cross(halves[:, 1], halves[:, 2])).sum() / 6
        assert 0 < volume < np.ptp(shape.vertices, axis=0).prod() * 1.2


def test_hundreds_of_meshes() -> None:
    shapes = {(kind, mesh(kind, v).vertices.round(5).tobytes()) for kind in KINDS for v in range(VARIANTS)}
    assert len(shapes) == len(KINDS) * VARIANTS >= 300
    with pytest.raises(ValueError, match="variant"):
        mesh("mug", VARIANTS)


@pytest.mark.parametrize("variant", range(VARIANTS))
def test_kinds_keep_what_tells_them_apart(variant: int) -> None:
    extent = {kind: np.ptp(mesh(kind, variant).vertices, axis=0) for kind in KINDS}
    long, tall = ({kind: float(e[axis]) for kind, e in extent.items()} for axis in (0, 2))
    mug = mesh("mug", variant).vertices[:, 0]
    assert mug.max() > 1.25 * -mug.min()  # the handle
    assert tall["bowl"] < 0.65 * long["bowl"] and tall["mug"] > 0.8 * float(extent["mug"][1])
    assert tall["plate"] < 0.15 * long["plate"] < tall["bowl"]
    assert tall["bottle"] > 1.7 * long["bottle"]
    assert tall["cube"] > 0.9 * long["cube"] and tall["brick"] < 0.8 * long["brick"]
    ring = np.hypot(*mesh("ring", variant).vertices[:, :2].T)
    assert ring.min() > 0.35 * ring.max()  # the hole


def test_materials_are_many_and_keep_the_colours_name() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_material(rng, KINDS[i % len(KINDS)]) for i in range(1500)]
    assert len({(m.finish, m.pattern) for m in drawn}) == len(FINISHES) * len(PATTERNS) >= 60
    for i, material in enumerate(drawn[:300]):
        kind = KINDS[i % len(KINDS)]
        shape = mesh(kind, i % VARIANTS)
        name = list(COLORS)[i % len(COLORS)]
        color = np.array(COLORS[name]) / 255
        faces = face_colors(shape, face_palette(kind, color), material)[shape.paint == MAIN]
        assert ((faces >= 0) & (faces <= 1)).all()
        if name == "white":
            assert faces.min() > 0.75
        elif name == "black":
            assert faces.max() < 0.4
        else:
            assert all(abs((hue(f) - hue(color) + 0.5) % 1 - 0.5) < 0.03 for f in np.unique(faces, axis=0))


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_patterns_show(pattern: str) -> None:
    material = Material("matte", pattern, 0.5, 0.3, -1.0, 3)
    faces = face_colors(mesh("mug"), face_palette("mug", np.array([0.1, 0.3, 0.8])), material)
    assert np.ptp(faces[mesh("mug").paint == MAIN], axis=0).max() > 0.05


def test_worlds_depend_on_their_seed_alone_and_vary() -> None:
    worlds = [world_of(seed) for seed in range(60)]
    for seed in range(5):
        again = world_of(seed)
        for a, b in zip(worlds[seed].objects, again.objects, strict=True):
            assert (a.kind, a.color, a.size, a.variant, a.material) == (b.kind, b.color, b.size, b.variant, b.material)
    counts = [len(w.objects) for w in worlds]
    assert max(counts) > 8 and max(counts) <= MAX_OBJECTS
    placed = [o for w in worlds for o in w.objects]
    assert len({(o.kind, o.variant) for o in placed}) > 0.6 * len(placed)
    for world in worlds:
        roll = np.degrees(np.arcsin(world.camera.axes[0, 2]))
        assert abs(roll) <= MAX_ROLL
        np.testing.assert_allclose(world.camera.axes @ world.camera.axes.T, np.eye(3), atol=1e-12)


def test_feet_apart_in_the_picture_are_in_order_on_the_table() -> None:
    """Texts call a thing in front of another by its foot in the picture: the camera's roll must not turn that round."""
    for seed in range(40):
        world = world_of(seed)
        camera = world.camera
        forward = camera.axes[2, :2]
        at = np.array([[*o.at, 0.0] for o in world.objects])
        feet = camera.project(at)[0][:, 1]
        away = (at[:, :2] - camera.position[:2]) @ forward
        for i in range(len(at)):
            for j in range(len(at)):
                if feet[i] > feet[j] + 0.04 * camera.height:
                    assert away[i] < away[j]


def test_pictures_are_deterministic_and_masks_match_the_shares() -> None:
    hidden = 0
    for seed in range(8):
        world = world_of(seed)
        one, two = (draw(world, np.random.default_rng(seed)) for _ in range(2))
        assert (one.picture == two.picture).all() and (one.masks == two.masks).all() and one.visible == two.visible
        assert one.masks.sum(axis=0).max() <= 1
        for index, placed in enumerate(world.objects):
            alone = draw(replace(world, objects=(placed,)), np.random.default_rng(seed))
            assert alone.visible == [1.0]
            assert not (one.masks[index] & ~alone.masks[0]).sum() > 0.05 * alone.masks[0].sum()
            share = one.masks[index].sum() / alone.masks[0].sum()
            assert abs(share - one.visible[index]) < 0.06
            hidden += one.visible[index] < 0.95
    assert hidden >= 3


def test_clutter_touches_the_table_alone() -> None:
    """Flat clutter changes the ground and keeps muted colours."""
    changed = 0
    for seed in range(12):
        world = world_of(seed)
        ground = np.full((world.camera.height, world.camera.width, 3), 0.5, np.float32)
        lay_clutter(np.random.default_rng(seed), world, ground)
        assert np.isfinite(ground).all()
        assert (ground.max(axis=2) - ground.min(axis=2)).max() < 0.4
        changed += bool((ground != 0.5).any())
    assert 6 <= changed < 12
