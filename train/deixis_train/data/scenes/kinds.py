"""The kinds of objects in table scenes. Each builder draws the shape of one variant of its kind from a generator and
stays within what makes the kind recognisable at 50 px: a mug has a handle, a bowl is wider than high, a ring has a
hole, a bottle a neck."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deixis_train.data.scenes.shapes import (
    BEAK,
    DARK,
    DEEP,
    LIGHT,
    MAIN,
    PALE,
    Ints,
    Mesh,
    Part,
    Profile,
    box,
    curve,
    ellipsoid,
    join,
    lathe,
    split,
    tube,
)

Rng = np.random.Generator
Parts = list[list[Part] | Part]


def _pick(rng: Rng, codes: tuple[int, ...]) -> int:
    return codes[int(rng.integers(len(codes)))]


def _rows(profile: Profile, steps: int, low: float, high: float, code: int) -> Ints:
    """Paint of a lathe's quads: ``code`` between the heights ``low`` and ``high``, MAIN elsewhere."""
    z = np.array([z for _, z in profile])
    middle = (z[:-1] + z[1:]) / 2
    return np.repeat(np.where((middle > low) & (middle < high), code, MAIN), steps)


def _ball(rng: Rng) -> Mesh:
    r, squash, steps = rng.uniform(0.072, 0.094), rng.uniform(0.95, 1.0), 36
    rows, columns = np.divmod(np.arange(steps * steps // 2), steps)
    code, gores = _pick(rng, (LIGHT, DEEP)), _pick(rng, (4, 6))
    style = int(rng.integers(5))
    paint = np.full(len(rows), MAIN)
    if style == 1:  # beach ball
        paint = np.where(columns * gores // steps % 2, code, MAIN)
    elif style == 2:  # a band around the middle
        paint = np.where(np.abs(rows + 0.5 - steps / 4) < rng.uniform(1.2, 2.6), code, MAIN)
    elif style == 3:  # caps at the poles
        paint = np.where(np.abs(rows + 0.5 - steps / 4) > rng.uniform(4.5, 6.5), code, MAIN)
    vertices, quads, _, light = ellipsoid((0, 0, 0), (r, r, r * squash), steps=steps)
    tilt = rng.uniform(-1.3, 1.3) if squash > 0.97 else 0.0
    c, s = np.cos(tilt), np.sin(tilt)
    return join([(vertices @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]]), quads, paint, light)])


def _cube(rng: Rng) -> Mesh:
    half, edge = rng.uniform(0.062, 0.074), _pick(rng, (0, 1, 2, 3)) * 0.005
    height = 2 * half * rng.uniform(0.94, 1.04)
    panel = _pick(rng, (MAIN, MAIN, LIGHT, DEEP))
    return join([box((-half, -half, 0), (half, half, height), cells=6, edge=edge, panel=panel)])


def _mug(rng: Rng) -> Mesh:
    r, h = rng.uniform(0.054, 0.068), rng.uniform(0.118, 0.162)
    t = np.linspace(0, 1, 10)
    form = int(rng.integers(4))
    swell = rng.uniform(0.05, 0.16)
    radius = (
        r
        * (
            np.ones(10),  # straight
            1 - swell * (1 - t),  # narrow foot
            0.9 + swell * np.sin(np.pi * (0.1 + 0.8 * t)),  # barrel
            np.minimum(1, 0.72 + 1.2 * np.sqrt(t) * (0.5 + swell)),  # rounded foot
        )[form]
    )
    wall: Profile = [(float(a), float(b)) for a, b in zip(radius, t * h, strict=True)]
    hem = _pick(rng, (MAIN, MAIN, LIGHT, DEEP))
    outer: Profile = [(0, 0), *wall, (wall[-1][0] - 0.007, h)]
    low, high = ((0.8 * h, 2 * h), (0.35 * h, 0.66 * h), (-1.0, 0.2 * h))[int(rng.integers(3))]
    inner = [(a - 0.007, b) for a, b in wall[::-1] if b > 0.02]
    inside = lathe([*inner, (0, 0.018)], LIGHT if rng.random() < 0.3 else MAIN, ambient=0.55)
    a = np.linspace(-0.5 * np.pi, 0.5 * np.pi, 13)
    power = rng.uniform(0.6, 1.1)
    z = h * rng.uniform(0.47, 0.56) + h * rng.uniform(0.27, 0.34) * np.sign(np.sin(a)) * np.abs(np.sin(a)) ** power
    reach = rng.uniform(0.038, 0.052) * (1 + rng.uniform(-0.25, 0.25) * np.sin(a))
    x = np.interp(z, t * h, radius) - 0.004 + reach * np.clip(np.cos(a), 0, 1) ** power
    path = np.stack([x, np.zeros(13), z], axis=1)
    handle = tube(path, np.full(13, rng.uniform(0.008, 0.0115)), flat=rng.uniform(1, 1.5))
    return join([[lathe(outer, _rows(outer, 32, low, high, hem)), inside], handle])


def _bottle(rng: Rng) -> Mesh:
    r, body = rng.uniform(0.039, 0.053), rng.uniform(0.105, 0.15)
    neck, rise, stem = rng.uniform(0.013, 0.019), rng.uniform(0.03, 0.06), rng.uniform(0.02, 0.05)
    a = np.linspace(0, 1, 8)
    shoulder = (
        1 - a,  # slope
        np.sqrt(1 - a**2),  # round
        (1 + np.cos(np.pi * a)) / 2,  # bell
    )[int(rng.integers(3))]
    foot = r * rng.uniform(0.88, 1.0)
    waist = r * rng.uniform(0.86, 1.0)
    sides = curve([(foot, 0), (r, 0.25 * body), (waist, 0.6 * body), (r, body)], 3)
    sides += [(float(neck + (r - neck) * w), float(body + rise * k)) for k, w in zip(a, shoulder, strict=True)][1:]
    top = body + rise + stem
    profile: Profile = [(0, 0), *sides, (neck, body + rise + stem / 2), (neck, top)]
    label = _rows(profile, 28, 0.3 * body, 0.8 * body, _pick(rng, (MAIN, MAIN, LIGHT, DEEP)))
    lid, width = rng.uniform(0.014, 0.035), neck + rng.uniform(0.002, 0.006)
    paint = _pick(rng, (DARK, DARK, MAIN, DEEP, PALE))
    form = int(rng.integers(3))
    cap: Profile = [*curve([(width, top - 0.004), (width, top + lid)], 2), (0, top + lid)]
    if form == 1:  # dome
        cap = [(width * float(np.cos(t)), top - 0.004 + lid * float(np.sin(t))) for t in np.linspace(0, np.pi / 2, 5)]
    elif form == 2:  # cork
        cap = [(neck * 0.8, top - 0.002), (neck * 0.95, top + lid * 0.7), (0, top + lid * 0.7)]
    return join([lathe(profile, label, steps=28), lathe(cap, paint, steps=20)])


def _bowl(rng: Rng) -> Mesh:
    r, h = rng.uniform(0.086, 0.106), rng.uniform(0.062, 0.088)
    power, foot = rng.uniform(0.6, 1.15), _pick(rng, (0, 1)) * rng.uniform(0.008, 0.014)
    a = np.linspace(-np.pi / 2, 0, 9)
    flare = rng.uniform(0.0, 0.12) * np.clip(np.linspace(-1, 1, 9), 0, 1) ** 2
    wall = r * (np.cos(a) ** power + flare) / (1 + flare[-1])
    outside = [(float(w), foot + h * (1 + float(np.sin(t)))) for w, t in zip(wall, a, strict=True)]
    inside = [
        (max(0.0, float(w) - 0.007), foot + h * (1 + 0.9 * float(np.sin(t)))) for w, t in zip(wall, a, strict=True)
    ]
    profile: Profile = [*outside, inside[-1]]
    if foot:
        stand = 0.4 * r
        profile = [(0, 0), (stand, 0), (stand, foot), *(p for p in outside if p[0] > stand), inside[-1]]
    lobes = _pick(rng, (0, 0, 0, 8, 10))
    depth = 0.02 if lobes else 0.0
    top = foot + h
    paint = _rows(profile, 32, top - rng.uniform(0.012, 0.03), 2 * top, _pick(rng, (MAIN, MAIN, LIGHT, DEEP)))
    inner = lathe(inside[::-1], _pick(rng, (MAIN, MAIN, LIGHT)), 0.62, 32, lobes, depth)
    return join([[lathe(profile, paint, 1.0, 32, lobes, depth), inner]])


def _plate(rng: Rng) -> Mesh:
    r, well, rise = rng.uniform(0.108, 0.132), rng.uniform(0.58, 0.74), rng.uniform(0.013, 0.024)
    lobes = _pick(rng, (0, 0, 0, 0, 8, 12))
    depth = 0.025 if lobes else 0.0
    line = _pick(rng, (MAIN, LIGHT, DEEP))
    w = r * well
    rim: Profile = [(0, 0), (w * 0.9, 0), (r * 0.82, rise * 0.5), (r, rise), (r, rise + 0.004)]
    rim += [(r * 0.95, rise + 0.003), (r * 0.86, rise * 0.6 + 0.005), (w, 0.01)]
    codes = np.array([MAIN, MAIN, MAIN, MAIN, line, MAIN, MAIN])
    flat: Profile = [(w, 0.01), (w * 0.66, 0.009), (w * 0.33, 0.009), (0, 0.009)]
    center = _pick(rng, (MAIN, LIGHT, LIGHT))
    return join([[lathe(rim, np.repeat(codes, 40), 1.0, 40, lobes, depth), lathe(flat, center, 1.0, 40, lobes, depth)]])


def _cone(rng: Rng) -> Mesh:
    h, r, tip, foot = rng.uniform(0.18, 0.235), rng.uniform(0.054, 0.068), rng.uniform(0.005, 0.013), 0.013
    profile = curve([(r, foot), (tip, h)], 14)
    t = (np.arange(14) + 0.5) / 14
    codes = np.full(14, MAIN)
    bands, code = int(rng.integers(3)), _pick(rng, (PALE, PALE, LIGHT))
    for k in range(bands):
        middle = (0.5, 0.3)[bands - 1] + 0.34 * k
        codes[np.abs(t - middle) < rng.uniform(0.07, 0.12)] = code
    body = lathe(profile, np.repeat(codes, 28), steps=28)
    top = lathe([(tip, h), (0, h)], steps=28)
    paint, wide = _pick(rng, (MAIN, MAIN, DEEP)), r * rng.uniform(1.15, 1.3)
    if rng.random() < 0.6:
        base: list[Part] = box((-wide, -wide, 0), (wide, wide, foot), paint, cells=4)
    else:
        steps = _pick(rng, (8, 28))
        base = [
            lathe([(0, 0), (wide, 0), (wide, foot), *curve([(wide, foot), (r * 0.9, foot)], 2)[1:]], paint, 1.0, steps)
        ]
    return join([base, [body, top]], first=1)


def _duck(rng: Rng) -> Mesh:
    long, wide, tall = rng.uniform(0.085, 0.1), rng.uniform(0.06, 0.072), rng.uniform(0.052, 0.066)
    head, forward = rng.uniform(0.042, 0.053), rng.uniform(0.04, 0.06)
    up = 2 * tall + head * rng.uniform(0.4, 0.75)
    bill = rng.uniform(0.022, 0.032)
    eye = rng.uniform(0.009, 0.012)
    face = forward + head
    tail = rng.uniform(0.02, 0.034)
    wing = (rng.uniform(0.04, 0.055), 0.014, rng.uniform(0.024, 0.034))
    feather = _pick(rng, (MAIN, MAIN, LIGHT, DEEP))
    tail_z = tall * rng.uniform(1.4, 1.8)
    parts: Parts = [
        ellipsoid((0, 0, tall), (long, wide, tall), steps=24),
        ellipsoid((-long * 0.9, 0, tail_z), (tail * 1.15, tail, tail * rng.uniform(0.6, 0.9)), steps=14),
    ]
    front: list[Part] = [
        ellipsoid((forward, 0, up), (head, head * 0.95, head)),
        ellipsoid((face + 0.006, 0, up - 0.2 * head), (bill, bill * 0.9, rng.uniform(0.007, 0.012)), BEAK, 14),
    ]
    for side in (-1, 1):
        front.append(ellipsoid((forward + 0.62 * head, side * 0.6 * head, up + 0.35 * head), (eye, eye, eye), DARK, 8))
        parts.append(ellipsoid((-0.012, side * wide * 0.9, tall * 1.15), wing, feather, 14))
    parts.append(front)
    return join(parts)


def _teddy(rng: Rng) -> Mesh:
    belly, wide, head = rng.uniform(0.066, 0.08), rng.uniform(0.056, 0.066), rng.uniform(0.047, 0.057)
    ear, arm, leg = rng.uniform(0.018, 0.026), rng.uniform(0.032, 0.042), rng.uniform(0.038, 0.048)
    up = 2 * belly + head * rng.uniform(0.5, 0.72)
    patch = _pick(rng, (LIGHT, LIGHT, MAIN))
    eye = rng.uniform(0.007, 0.01)
    face: list[Part] = [
        ellipsoid((0.006, 0, up), (head * 0.95, head * 1.05, head * 0.92)),
        ellipsoid((0.85 * head + 0.006, 0, up - 0.27 * head), (0.02, 0.024, 0.018), LIGHT, 12),
        ellipsoid((0.85 * head + 0.024, 0, up - 0.13 * head), (0.008, 0.01, 0.008), DARK, 8),
    ]
    parts: Parts = [ellipsoid((0, 0, belly), (wide * 0.92, wide, belly))]
    parts.append(ellipsoid((wide * 0.62, 0, belly * 0.95), (0.028, wide * 0.68, belly * 0.66), patch, 14))
    lift, spread = rng.uniform(-0.01, 0.03), rng.uniform(0.042, 0.058)
    for side in (-1, 1):
        face.append(ellipsoid((0.77 * head + 0.008, side * 0.4 * head, up + 0.25 * head), (eye, eye, eye), DARK, 8))
        at = (-0.002, side * head * 0.82, up + head * 0.76)
        parts.append(ellipsoid(at, (0.013, ear, ear), MAIN, 14))
        parts.append(ellipsoid((at[0] + 0.009, at[1], at[2]), (0.007, ear * 0.6, ear * 0.6), patch, 10))
        parts.append(ellipsoid((0.018, side * wide * 1.12, belly * 1.4 + lift), (0.025, 0.022, arm), MAIN, 14))
        parts.append(ellipsoid((0.066, side * spread, 0.028), (leg, 0.026, 0.028), MAIN, 14))
        parts.append(ellipsoid((0.066 + leg * 0.85, side * spread, 0.03), (0.011, 0.018, 0.019), LIGHT, 10))
    if rng.random() < 0.3:  # a scarf
        parts.append(ellipsoid((0.008, 0, up - head * 0.88), (head * 0.86, head * 0.86, 0.013), DEEP, 18))
    return join([*parts, face])


def _brick(rng: Rng) -> Mesh:
    columns = _pick(rng, (2, 3, 4, 4))
    pitch, height = rng.uniform(0.052, 0.06), rng.uniform(0.05, 0.075)
    if columns == 2:  # low, or it looks like a cube
        pitch, height = pitch * 1.12, height * 0.8
    x, y, knob = columns * pitch / 2, pitch, pitch * rng.uniform(0.27, 0.34)
    rise, edge = rng.uniform(0.015, 0.021), _pick(rng, (0, 1)) * 0.004
    parts: Parts = [box((-x, -y, 0), (x, y, height), cells=7, edge=edge)]
    profile: Profile = [(knob, height), (knob, height + rise), (0, height + rise)]
    top = _pick(rng, (MAIN, MAIN, LIGHT))
    for i in range(columns):
        for j in (-0.5, 0.5):
            stud, quads, _, light = lathe(profile, steps=12)
            at = np.array([(i - (columns - 1) / 2) * pitch, j * pitch, 0.0])
            parts.append((stud + at, quads, np.repeat([MAIN, top], 12), light))
    return join(parts, first=1)


def _ring(rng: Rng) -> Mesh:
    middle, wide = rng.uniform(0.074, 0.09), rng.uniform(0.019, 0.031)
    tall, power = wide * rng.uniform(0.75, 1.15), rng.uniform(0.55, 1.0)
    a = np.linspace(0, 2 * np.pi, 15)
    c, s = (np.sign(v) * np.abs(v) ** power for v in (np.cos(a), np.sin(a)))
    profile = [(middle + wide * float(x), tall * float(z)) for x, z in zip(c, s, strict=True)]
    sectors, code = _pick(rng, (0, 0, 4, 8)), _pick(rng, (LIGHT, DEEP))
    column = np.arange(40)
    striped = (column * sectors * 2 // 40 % 2 == 1) if sectors else np.zeros(40, bool)
    torus = lathe(profile, np.tile(np.where(striped, code, MAIN), 14), steps=40)
    return join(split(torus, np.tile(column // 4, 14)))


def _banana(rng: Rng) -> Mesh:
    bend, r = rng.uniform(0.85, 1.3), rng.uniform(0.11, 0.13)
    radius = r / np.sin(min(bend, np.pi / 2)) * 0.95
    a = np.linspace(-bend, bend, 19)
    lift = rng.uniform(0.005, 0.03)
    path = np.stack([radius * np.sin(a), radius * np.cos(a), 0.026 + lift * np.abs(a / bend) ** 2], axis=1)
    path[:, 1] -= (path[:, 1].min() + path[:, 1].max()) / 2
    fat, blunt = rng.uniform(0.023, 0.03), rng.uniform(2.2, 4.0)
    thick = fat * np.sqrt(np.clip(1 - np.abs(a / (bend * 1.05)) ** blunt, 0, 1)) + 0.001
    sides = _pick(rng, (6, 8, 12))
    body = split(tube(path, thick, steps=sides), np.repeat(np.arange(18) // 3, sides))
    stem = rng.uniform(0.009, 0.013)
    tips = [
        ellipsoid((float(path[0][0]), float(path[0][1]), float(path[0][2])), (stem * 1.3, stem, stem), DARK, 8),
        ellipsoid((float(path[-1][0]), float(path[-1][1]), float(path[-1][2])), (0.009, 0.009, 0.009), DARK, 8),
    ]
    return join([*body, *tips])


BUILDERS: dict[str, Callable[[Rng], Mesh]] = {
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
