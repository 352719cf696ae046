"""Masks: the run-length code against pycocotools, and logits to original pixels."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deixis.geometry import Geometry
from deixis.masks import decode_counts, encode_counts, pack_counts, refer_mask, segment_mask, unpack_counts
from deixis.results import Mask

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def coco():
    return pytest.importorskip("pycocotools.mask", reason="pycocotools is the independent coder to compare with")


@settings(deadline=None)
@given(hnp.arrays(bool, shapes))
def test_equals_pycocotools(array: np.ndarray) -> None:
    expected = coco().encode(np.asfortranarray(array.astype(np.uint8)))
    mask = Mask.from_array(array)
    assert mask.counts == expected["counts"].decode()
    assert list(mask.size) == list(expected["size"])
    assert mask.area == coco().area(expected) == array.sum()
    np.testing.assert_array_equal(mask.array, array)
    assert Mask.from_rle(expected) == Mask.from_rle(mask.to_rle()) == mask
    if mask.box is not None:
        left, top, width, height = coco().toBbox(expected)
        assert mask.box == (left, top, left + width, top + height)
    else:
        assert not array.any()


def test_equals_pycocotools_on_a_large_mask() -> None:
    array = np.zeros((3000, 4001), bool)
    cv2_like = np.add.outer((np.arange(3000) - 1500) ** 2, (np.arange(4001) - 1900) ** 2) < 1200**2
    array |= cv2_like
    assert Mask.from_array(array).counts == coco().encode(np.asfortranarray(array.astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("value", [False, True])
def test_one_colour(value: bool) -> None:
    mask = Mask.from_array(np.full((3, 5), value))
    assert (mask.array == value).all()
    assert mask.box == ((0.0, 0.0, 5.0, 3.0) if value else None)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=30))
def test_counts_there_and_back(counts: list[int]) -> None:
    np.testing.assert_array_equal(unpack_counts(pack_counts(np.array(counts, np.int64))), counts)


@settings(deadline=None)
@given(st.text(max_size=20), shapes)
def test_damaged_counts_raise_value_error(text: str, size: tuple[int, int]) -> None:
    try:
        array = decode_counts(text, size)
    except ValueError:
        return
    assert array.shape == size


@pytest.mark.parametrize(
    "rle",
    [
        {},
        {"size": [2, 2]},
        {"size": [2], "counts": "4"},
        {"size": [2, 2], "counts": "5"},
        {"size": [2, 2], "counts": [1, 2]},
        {"size": [2, 2], "counts": [-1, 5]},
        {"size": "ab", "counts": "4"},
        {"size": [2, 2], "counts": None},
    ],
)
def test_unusable_rle(rle: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="run-length"):
        Mask.from_rle(rle)


def test_uncompressed_rle() -> None:
    assert Mask.from_rle({"size": [2, 2], "counts": [1, 2, 1]}).array.tolist() == [[False, True], [True, False]]


def test_mask_is_read_only_and_wants_two_dimensions() -> None:
    with pytest.raises(ValueError, match="read-only"):
        Mask.from_array(np.ones((2, 2))).array[0, 0] = False
    with pytest.raises(ValueError, match="height, width"):
        Mask.from_array(np.ones((2, 2, 1)))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**16))
def test_refer_mask_crops_then_resizes_once(height: int, width: int, seed: int) -> None:
    geometry = Geometry.of((height, width), 384)
    logits = np.random.default_rng(seed).normal(size=(96, 96)).astype(np.float32)
    mask = refer_mask(logits, geometry)
    rows, columns = max(1, geometry.valid[0] * 96 // 384), max(1, geometry.valid[1] * 96 // 384)
    expected = bilinear(logits[:rows, :columns], (height, width))
    assert mask.shape == (height, width) and mask.dtype == bool
    clear = np.abs(expected) > 1e-3  # rounding decides the others
    np.testing.assert_array_equal(mask[clear], (expected > 0)[clear])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**16), st.sampled_from([-0.5, 0.0, 1.0]))
def test_segment_mask_takes_two_steps(height: int, width: int, seed: int, threshold: float) -> None:
    geometry = Geometry.of((height, width), 128)
    logits = np.random.default_rng(seed).normal(size=(32, 32)).astype(np.float32)
    mask = segment_mask(logits, geometry, threshold)
    whole = bilinear(logits, (128, 128))
    expected = bilinear(whole[: geometry.valid[0], : geometry.valid[1]], (height, width))
    assert mask.shape == (height, width)
    clear = np.abs(expected - threshold) > 1e-3
    np.testing.assert_array_equal(mask[clear], (expected > threshold)[clear])


def bilinear(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Half-pixel bilinear interpolation in float64, written from the definition."""
    values = values.astype(np.float64)
    for axis, count in enumerate(size):
        length = values.shape[axis]
        at = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, length - 1)
        part = (at - low).reshape(-1, *[1] * (values.ndim - 1 - axis)) if axis == 0 else at - low
        a, b = np.take(values, low, axis), np.take(values, high, axis)
        values = a + (b - a) * part
    return values


def test_bilinear_of_this_test_is_that_of_cv2() -> None:
    values = np.random.default_rng(0).normal(size=(17, 23)).astype(np.float32)
    np.testing.assert_allclose(bilinear(values, (40, 9)), cv2.resize(values, (9, 40)), atol=1e-5)


def test_encode_needs_no_contiguity() -> None:
    array = np.random.default_rng(0).random((8, 9)) > 0.5
    assert encode_counts(array.T) == encode_counts(np.ascontiguousarray(array.T))
