"""Pictures for GLaMM: bit for bit those of the reference, and Pillow's where it is installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis.bundle import ImageSpec
from deixis.geometry import Geometry, center_crop, longest_side
from deixis.image import fit, middle, pad, square
from deixis.masks import segment_mask
from deixis.resample import resize

GOLDEN = Path(__file__).parents[1] / "golden" / "glamm" / "preprocess.npz"
GLOBAL = ImageSpec(336, "center_crop", "bicubic", antialias=True, pad="none")
STRETCHED = ImageSpec(56, "stretch", "bicubic", antialias=True, pad="none")
GROUNDING = ImageSpec(128, "longest_side", "bilinear", antialias=True)
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

sides = st.integers(1, 70)
interpolations = st.sampled_from(["bilinear", "bicubic"])


def noise(height: int, width: int, seed: int) -> np.ndarray:
    """Half of the pictures black and white, where cubic weights overshoot the most."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image if seed % 2 else np.where(image > 127, np.uint8(255), np.uint8(0))


@pytest.mark.parametrize("number", [0, 1])
def test_both_inputs_are_those_of_the_reference(number: int) -> None:
    golden = np.load(GOLDEN)
    picture = golden[f"image{number}_uint8"]
    np.testing.assert_array_equal(middle(picture, GLOBAL), golden[f"clip{number}_resized_cropped_uint8"])
    resized, geometry = fit(picture, GROUNDING)
    assert resized.dtype == np.uint8
    np.testing.assert_array_equal(resized, golden[f"sam{number}_resized_uint8"])
    assert geometry.valid == tuple(golden[f"sam{number}_resize_hw"])
    assert geometry.original == picture.shape[:2] and geometry.size == 128
    height, width = geometry.valid
    real = np.zeros((128, 128, 1), np.float32)
    real[:height, :width] = 1
    normalised = (pad(resized, GROUNDING) - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD) * real
    np.testing.assert_allclose(normalised.transpose(2, 0, 1), golden[f"sam{number}_input"], atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(sides, sides, sides, sides, interpolations, st.integers(0, 99))
def test_equal_to_pillow(height: int, width: int, rows: int, columns: int, interpolation: str, seed: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    method = {"bilinear": image_module.BILINEAR, "bicubic": image_module.BICUBIC}[interpolation]
    image = noise(height, width, seed)
    # One pass at a time: some versions of Pillow take the cheaper pass first, the published pictures had rows first.
    expected = image_module.fromarray(image).resize((columns, height), method).resize((columns, rows), method)
    np.testing.assert_array_equal(resize(image, (rows, columns), interpolation), np.asarray(expected))


@settings(deadline=None, max_examples=30)
@given(sides, sides, sides, sides, interpolations, st.data())
def test_a_window_is_cut_out_of_the_whole(
    height: int, width: int, rows: int, columns: int, interpolation: str, data: st.DataObject
) -> None:
    def part(length: int) -> slice:
        start = data.draw(st.integers(0, length - 1))
        return slice(start, data.draw(st.integers(start + 1, length)))

    image, window = noise(height, width, 1), (part(rows), part(columns))
    whole = resize(image, (rows, columns), interpolation)
    np.testing.assert_array_equal(resize(image, (rows, columns), interpolation, window), whole[window])


def test_nothing_is_touched_when_the_size_stays() -> None:
    image = noise(13, 17, 3)
    same = resize(image, (13, 17), "bicubic")
    np.testing.assert_array_equal(same, image)
    np.testing.assert_array_equal(resize(image[:, ::-1], (13, 17), "bilinear"), image[:, ::-1])


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 1100))
def test_sizes(height: int, width: int, size: int) -> None:
    valid = longest_side((height, width), size)
    assert max(valid) == size and min(valid) >= 1
    geometry = Geometry.of((height, width), size, "longest_side")
    assert geometry.valid == valid
    corner = geometry.to_input((width, height))
    np.testing.assert_allclose(corner, (valid[1], valid[0]))
    (rows, columns), window = center_crop((height, width), size)
    assert min(rows, columns) == size
    for length, cut in zip((rows, columns), window, strict=True):
        assert cut.start >= 0 and cut.stop - cut.start == size and cut.stop <= length
        assert abs(cut.start - (length - cut.stop)) <= 1  # the middle


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1), (336, 336)])
def test_any_shape(shape: tuple[int, int]) -> None:
    image = noise(*shape, 5)
    whole = middle(image, GLOBAL)
    assert whole.shape == (336, 336, 3) and whole.dtype == np.uint8
    resized, geometry = fit(image, GROUNDING)
    assert resized.shape[:2] == geometry.valid and pad(resized, GROUNDING).shape == (128, 128, 3)


def test_a_stretched_picture_is_seen_whole() -> None:
    image_of = pytest.importorskip("PIL.Image", reason="Pillow is what it is compared with")
    for shape in ((1, 1), (3, 200), (97, 61), (56, 56)):
        image = noise(*shape, 5)
        # Pillow's own order of the two passes is not always this.
        wide = image_of.fromarray(image).resize((56, shape[0]), image_of.Resampling.BICUBIC)
        pillow = wide.resize((56, 56), image_of.Resampling.BICUBIC)
        np.testing.assert_array_equal(square(image, STRETCHED), np.asarray(pillow))
        np.testing.assert_array_equal(square(image, GLOBAL), middle(image, GLOBAL))


@pytest.mark.parametrize("spec", [GLOBAL, STRETCHED])
def test_what_fills_a_square_has_no_way_back(spec: ImageSpec) -> None:
    with pytest.raises(ValueError, match="no geometry"):
        fit(noise(4, 4, 0), spec)


def test_masks_go_back_as_the_reference_has_it() -> None:
    """Section 6.6 on the golden's own logits: two bilinear steps and the crop between them."""
    golden = np.load(GOLDEN.parent / "sam_prompt_and_decoder.npz")
    height, width = (int(v) for v in golden["post_input_hw"])
    original = tuple(int(v) for v in golden["post_orig_hw"])
    geometry = Geometry((original[0], original[1]), (height, width), 128)
    for logits, expected in zip(golden["low_res"][:, 0], golden["post"][:, 0], strict=True):
        found = segment_mask(logits, geometry)
        unsure = np.abs(expected) < 1e-4
        np.testing.assert_array_equal(found[~unsure], (expected > 0)[~unsure])
