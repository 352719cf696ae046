"""Fitting, cutting and flipping: equal to the reference's numbers, and safe for any picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deixis_train.data.preparation.geometry import (
    Placement,
    crop_points,
    fit_long,
    fit_short,
    has_area,
    place_centered,
    place_fitted,
    place_randomly,
    resize_bilinear,
)

GOLDEN = Path(__file__).parents[2] / "golden" / "pixelllm"
sides = st.integers(1, 900)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "data_prep.npz") as file:
        return dict(file)


def test_fitted_sizes(golden: dict[str, np.ndarray]) -> None:
    for row in golden["geometry/hw_long384_long300_short384"].tolist():
        original = (row[0], row[1])
        assert fit_long(original, 384) == tuple(row[2:4])
        assert fit_long(original, 300) == tuple(row[4:6])
        assert fit_short(original, 384) == tuple(row[6:8])


def test_resized_picture_boxes_and_points(golden: dict[str, np.ndarray]) -> None:
    image = golden["resize/in"]
    placement = place_fitted(image.shape[:2], 24)
    assert placement.resized == tuple(golden["resize/out_size"])
    np.testing.assert_allclose(
        resize_bilinear(image.astype(np.float32), placement.resized), golden["resize/out"], atol=1e-3
    )
    np.testing.assert_array_equal(placement.place_boxes(golden["resize/in_boxes"]), golden["resize/out_boxes"])
    np.testing.assert_array_equal(placement.place_points(golden["resize/in_points"]), golden["resize/out_points"])
    network = placement.place_image(image, 24)
    assert not network[17:].any() and not network[:, 23:].any()
    assert np.abs(network[:17, :23] - golden["resize/out"]).max() <= 0.501  # whole values


def test_cut_boxes_and_points(golden: dict[str, np.ndarray]) -> None:
    top, left, height, width = golden["crop/region_ijhw"].tolist()
    placement = Placement((30, 41), tuple(golden["resize/out_size"]), (top, left), (height, width))
    boxes = placement.place_boxes(golden["resize/in_boxes"])
    np.testing.assert_array_equal(boxes, golden["crop/out_boxes"])
    np.testing.assert_array_equal(has_area(boxes), golden["crop/out_labels"] > 0)
    np.testing.assert_array_equal(placement.place_points(golden["resize/in_points"]), golden["crop/out_points"])
    moved = crop_points(golden["resize/out_points"], (top, left), (height, width))
    np.testing.assert_array_equal(moved, golden["crop/out_points"])


@given(st.tuples(sides, sides), st.integers(1, 512))
def test_fitted_sizes_stay_inside_and_keep_the_aspect(original: tuple[int, int], size: int) -> None:
    height, width = fit_long(original, size)
    assert 1 <= height <= size and 1 <= width <= size
    assert (height <= width) == (original[0] <= original[1]) or height == width
    assert fit_short(original, size)[0] >= size and fit_short(original, size)[1] >= size


@given(st.tuples(sides, sides), st.integers(4, 64), st.integers(0, 2**32 - 1), st.data())
def test_boxes_stay_inside_of_the_cut(original: tuple[int, int], size: int, seed: int, data: st.DataObject) -> None:
    placement = place_randomly(original, size, (0.1, 2.0), 0.5, np.random.default_rng(seed))
    height, width = placement.valid
    assert 1 <= height <= size and 1 <= width <= size
    assert 0 <= placement.offset[0] <= placement.resized[0] - height
    assert 0 <= placement.offset[1] <= placement.resized[1] - width
    x = sorted(data.draw(st.tuples(*[st.floats(0, original[1])] * 2)))
    y = sorted(data.draw(st.tuples(*[st.floats(0, original[0])] * 2)))
    box = placement.place_boxes([x[0], y[0], x[1], y[1]])
    assert 0 <= box[0] <= box[2] <= width and 0 <= box[1] <= box[3] <= height


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 100))
def test_flipping_twice_is_identity(height: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    x, y = np.sort(rng.integers(0, width + 1, 2)), np.sort(rng.integers(0, height + 1, 2))
    box = np.array([x[0], y[0], x[1], y[1]], np.float32)
    flip = Placement((height, width), (height, width), (0, 0), (height, width), flipped=True)
    np.testing.assert_array_equal(flip.place_boxes(flip.place_boxes(box)), box)
    once = flip.place_image(image, 40)[:height, :width]
    np.testing.assert_array_equal(flip.place_image(np.ascontiguousarray(once), 40)[:height, :width], image)
    assert (once == image[:, ::-1]).all()


@pytest.mark.parametrize("flipped", [False, True])
def test_picture_mask_and_box_move_together(flipped: bool) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 6:24] = 255
    placement = replace(
        place_randomly((40, 60), 24, (1.8, 1.8), 0.0, np.random.default_rng(4)), offset=(2, 3), flipped=flipped
    )
    box = placement.place_boxes([6, 10, 24, 30])
    for seen in (placement.place_image(image, 24)[..., 0] > 127, placement.place_mask(image[..., 0] // 255, 24) > 0):
        rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
        extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose(box, extent, atol=1)


def test_the_centre_is_cut_for_captions() -> None:
    placement = place_centered((427, 640), 384)
    assert placement.resized == (384, 575) and placement.valid == (384, 384) and placement.offset == (0, 95)


def test_a_picture_without_area_is_refused() -> None:
    with pytest.raises(ValueError, match="0x5"):
        fit_long((0, 5), 384)
