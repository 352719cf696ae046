"""The size rule and the point maps, against an independent calculation with exact fractions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis.geometry import Geometry, fit_inside

GOLDEN = Path(__file__).parents[1] / "golden" / "pixelllm" / "data_prep.npz"

sides = st.integers(1, 12_000)
sizes = st.sampled_from([224, 300, 384, 512, 1024])


def test_golden_sizes() -> None:
    with np.load(GOLDEN) as golden:
        rows = golden["geometry/hw_long384_long300_short384"]
    for row in rows:
        original = (int(row[0]), int(row[1]))
        assert fit_inside(original, 384) == (int(row[2]), int(row[3]))
        assert fit_inside(original, 300) == (int(row[4]), int(row[5]))


@settings(deadline=None)
@given(sides, sides, sizes)
def test_fits_and_keeps_the_aspect(height: int, width: int, size: int) -> None:
    valid = fit_inside((height, width), size)
    assert min(valid) >= 1 and max(valid) <= size
    assert (valid[0] <= valid[1]) == (height <= width) or valid[0] == valid[1]
    assert fit_inside((width, height), size) == valid[::-1]
    shortest, longest = sorted((height, width))
    short, long = sorted(valid)
    exact_short = Fraction(size * shortest, longest)
    # float32 may round a whole number down to the one below it, or up onto it; truncation does the rest
    assert max(1, exact_short - 1 - Fraction(1, 1000)) <= short or short == 1
    assert short <= max(1, exact_short + Fraction(1, 1000))
    if exact_short >= 1:
        exact_long = Fraction(short * longest, shortest)
        assert min(exact_long, size) - 1 - Fraction(1, 1000) <= long <= min(exact_long, size) + Fraction(1, 1000)


@settings(deadline=None)
@given(sides, sides, sizes)
def test_equals_the_exact_rule_away_from_whole_numbers(height: int, width: int, size: int) -> None:
    shortest, longest = sorted((height, width))
    exact_short = Fraction(size * shortest, longest)
    short = int(exact_short)
    if short < 1 or min(exact_short - short, short + 1 - exact_short) < Fraction(1, 1000):
        return
    exact_long = Fraction(short * longest, shortest)
    if min(exact_long - int(exact_long), int(exact_long) + 1 - exact_long) < Fraction(1, 1000):
        return
    assert sorted(fit_inside((height, width), size)) == [short, int(exact_long)]


@pytest.mark.parametrize(
    ("original", "expected"),
    [
        ((1, 1), (384, 384)),
        ((384, 384), (384, 384)),
        ((256, 384), (256, 384)),  # fits already
        ((38, 383), (38, 383)),  # the smaller side fits already: untouched
        ((1, 384), (1, 384)),
        ((1, 385), (1, 384)),  # would be 0 pixels high: clamped
        ((12_000, 3), (384, 1)),
    ],
)
def test_corners_of_the_rule(original: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fit_inside(original, 384) == expected


def test_no_area() -> None:
    with pytest.raises(ValueError, match="no area"):
        fit_inside((0, 10), 384)


@settings(deadline=None)
@given(sides, sides, sizes, st.lists(st.tuples(st.floats(-2, 3), st.floats(-2, 3)), min_size=1, max_size=5))
def test_points_there_and_back(height: int, width: int, size: int, relative: list[tuple[float, float]]) -> None:
    geometry = Geometry.of((height, width), size)
    points = np.array(relative) * (width, height)
    inside = geometry.to_input(points)
    np.testing.assert_allclose(geometry.to_original(inside), points, rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(geometry.relative_to_original(np.array(relative)), points, rtol=1e-12)
    for (x, y), (u, v) in zip(points, inside, strict=True):
        assert u == pytest.approx(float(Fraction(x) * geometry.valid[1] / width), rel=1e-12, abs=1e-9)
        assert v == pytest.approx(float(Fraction(y) * geometry.valid[0] / height), rel=1e-12, abs=1e-9)


@settings(deadline=None)
@given(sides, sides, sizes)
def test_corners_meet(height: int, width: int, size: int) -> None:
    geometry = Geometry.of((height, width), size)
    corners = geometry.to_input([[0, 0], [width, height]])
    np.testing.assert_allclose(corners, [[0, 0], geometry.valid[::-1]], rtol=1e-12)


def test_any_leading_shape() -> None:
    geometry = Geometry.of((100, 200), 384)
    assert geometry.to_input(np.zeros((2, 3, 4, 2))).shape == (2, 3, 4, 2)
    assert geometry.to_original(np.zeros((0, 2))).shape == (0, 2)
