"""Pictures in every layout we promise to take, and one line for those we cannot."""

from __future__ import annotations

import contextlib
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis.bundle import ImageSpec
from deixis.errors import ImageError
from deixis.image import load_image, prepare, resize_bilinear

GOLDEN = Path(__file__).parents[1] / "golden" / "pixelllm" / "data_prep.npz"


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """RGB uint8 [24, 40, 3], smooth enough for JPEG, with a corner that tells every turn."""
    y, x = np.mgrid[:24, :40]
    image = np.stack([x * 6, y * 10, 255 - x * 3 - y * 4], -1).astype(np.uint8)
    image[:8, :12] = (250, 20, 30)
    return image


def encode(image: np.ndarray, suffix: str) -> bytes:
    good, data = cv2.imencode(suffix, image)
    assert good
    return data.tobytes()


def bgr(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[..., ::-1])


def test_array_layouts(picture: np.ndarray) -> None:
    grey = picture[..., 0].copy()
    alpha = np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(load_image(picture), picture)
    np.testing.assert_array_equal(load_image(bgr(picture), "BGR"), picture)
    np.testing.assert_array_equal(load_image(alpha, "RGBA"), picture)
    np.testing.assert_array_equal(load_image(alpha[..., [2, 1, 0, 3]], "BGRA"), picture)
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(load_image(array, "GRAY"), np.repeat(grey[..., None], 3, 2))


def test_result_is_owned_and_contiguous(picture: np.ndarray) -> None:
    for array in (picture, picture[::2, ::-1]):
        loaded = load_image(array)
        assert loaded.flags.c_contiguous and not np.shares_memory(loaded, array)


def test_alpha_lies_over_white() -> None:
    pixel = np.array([[[200, 100, 0, 0], [200, 100, 0, 255], [200, 100, 0, 51]]], np.uint8)
    expected = [[[255, 255, 255], [200, 100, 0], [244, 224, 204]]]
    np.testing.assert_array_equal(load_image(pixel, "RGBA"), expected)
    np.testing.assert_array_equal(load_image(encode(pixel[..., [2, 1, 0, 3]], ".png")), expected)


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "RGB", "uint8.*float32"),
        (np.zeros((4, 4, 3), np.uint16), "RGB", "uint8.*uint16"),
        (np.zeros((4, 4), bool), "GRAY", "uint8.*bool"),
        (np.zeros((4, 4), np.uint8), "RGB", "say channels='GRAY'"),
        (np.zeros((4, 4, 4), np.uint8), "RGB", r"shape \[H,W,3\]"),
        (np.zeros((3, 4, 4), np.uint8), "BGR", r"shape \[H,W,3\]"),
        (np.zeros((4, 4, 3), np.uint8), "RGBA", r"shape \[H,W,4\]"),
        (np.zeros((4, 4, 3), np.uint8), "GRAY", r"\[H,W\] or \[H,W,1\]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "RGB", "shape"),
        (np.zeros((0, 4, 3), np.uint8), "RGB", "empty"),
        (np.zeros((4, 0), np.uint8), "GRAY", "empty"),
        (np.zeros((4, 4, 3), np.uint8), "YUV", "unknown channels"),
        ([[1, 2], [3, 4]], "GRAY", "not list"),
        (None, "RGB", "not NoneType"),
    ],
)
def test_arrays_we_refuse(array: Any, channels: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        load_image(array, channels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".ppm", ".jpg", ".webp"])
def test_files_and_bytes(picture: np.ndarray, tmp_path: Path, suffix: str) -> None:
    data = encode(bgr(picture), suffix)
    path = tmp_path / f"p{suffix}"
    path.write_bytes(data)
    loaded = load_image(path)
    assert loaded.shape == picture.shape and loaded.dtype == np.uint8
    assert np.abs(loaded.astype(int) - picture).mean() < (6 if suffix in (".jpg", ".webp") else 1e-9)
    for source in (str(path), data, bytearray(data), memoryview(data)):
        np.testing.assert_array_equal(load_image(source), loaded)


def test_name_that_is_not_ascii(picture: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "Bücher und 机.png"
    path.write_bytes(encode(bgr(picture), ".png"))
    np.testing.assert_array_equal(load_image(path), picture)


def test_sixteen_bits(picture: np.ndarray) -> None:
    deep = bgr(picture).astype(np.uint16) * 257
    np.testing.assert_array_equal(load_image(encode(deep, ".png")), picture)
    with_alpha = np.dstack([deep, np.full(deep.shape[:2], 65535, np.uint16)])
    np.testing.assert_array_equal(load_image(encode(with_alpha, ".png")), picture)


def test_grey_file(picture: np.ndarray) -> None:
    loaded = load_image(encode(picture[..., 0], ".png"))
    np.testing.assert_array_equal(loaded, np.repeat(picture[..., :1], 3, 2))


def palette_png(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.tobytes() for row in indices.astype(np.uint8))
    head = struct.pack(">IIBBBBB", indices.shape[1], indices.shape[0], 8, 3, 0, 0, 0)
    body = chunk(b"PLTE", bytes(v for colour in colours for v in colour)) + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def test_palette() -> None:
    colours = [(255, 0, 0), (0, 128, 255), (9, 8, 7)]
    indices = np.array([[0, 1, 2], [2, 1, 0]])
    np.testing.assert_array_equal(load_image(palette_png(indices, colours)), np.array(colours)[indices])


def exif(orientation: int, order: str = ">") -> bytes:
    """A TIFF structure of one entry before the orientation, and the orientation."""
    entries = [
        struct.pack(order + "HHII", 0x0100, 4, 1, 40),
        struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0),
    ]
    head = (b"MM" if order == ">" else b"II") + struct.pack(order + "HIH", 42, 8, len(entries))
    return head + b"".join(entries) + struct.pack(order + "I", 0)


def with_orientation(jpeg: bytes, orientation: int, thumbnail: bytes = b"") -> bytes:
    body = b"Exif\0\0" + exif(orientation) + thumbnail
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def turned(stored: np.ndarray, orientation: int) -> np.ndarray:
    return {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(picture: np.ndarray, tmp_path: Path, orientation: int) -> None:
    plain = encode(bgr(picture), ".jpg")
    expected = turned(load_image(plain), orientation)
    data = with_orientation(plain, orientation)
    np.testing.assert_array_equal(load_image(data), expected)
    (tmp_path / "p.jpg").write_bytes(data)
    np.testing.assert_array_equal(load_image(tmp_path / "p.jpg"), expected)


def png_with(png: bytes, tiff: bytes) -> bytes:
    chunk = b"eXIf" + tiff
    return png[:33] + struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


def webp_with(webp: bytes, tiff: bytes, size: tuple[int, int]) -> bytes:
    """A plain lossless WebP file of `size` (height, width) as an extended one, with transparency and EXIF."""
    sides = b"".join(struct.pack("<I", side - 1)[:3] for side in size[::-1])
    head = b"VP8X" + struct.pack("<IB3x", 10, 0x18) + sides
    body = head + webp[12:] + b"EXIF" + struct.pack("<I", len(tiff)) + tiff + b"\0" * (len(tiff) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_transparent_files(picture: np.ndarray, orientation: int, square: bool) -> None:
    """Both are seen: which way up, and what shines through, in either order of bytes."""
    alpha = np.full(picture.shape[:2], 255, np.uint8)
    alpha[:5, 20:] = 0
    stored = np.dstack([picture, alpha])[:, : len(picture) if square else None]
    expected = turned(load_image(np.ascontiguousarray(stored), "RGBA"), orientation)
    flipped = np.ascontiguousarray(stored[..., [2, 1, 0, 3]])
    good, lossless = cv2.imencode(".webp", flipped, [cv2.IMWRITE_WEBP_QUALITY, 101])
    assert good
    for order in "><":
        png = png_with(encode(flipped, ".png"), exif(orientation, order))
        np.testing.assert_array_equal(load_image(png), expected)
        webp = webp_with(lossless.tobytes(), exif(orientation, order), stored.shape[:2])
        # lossless WebP keeps no colours under full transparency, and none are to be seen
        np.testing.assert_array_equal(load_image(webp), expected)


@pytest.mark.parametrize(
    "tiff", [b"", b"II", b"MM\0*\xff\xff\xff\xff", exif(6)[:20], exif(0), exif(9), b"XX" + exif(6)[2:]]
)
def test_exif_that_makes_no_sense(picture: np.ndarray, tiff: bytes) -> None:
    png = encode(np.dstack([bgr(picture), np.full(picture.shape[:2], 255, np.uint8)]), ".png")
    np.testing.assert_array_equal(load_image(png_with(png, tiff)), picture)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
@pytest.mark.parametrize("part", [0.3, 0.7, 0.95])
def test_truncated_files(suffix: str, part: float, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = encode(noise, suffix)
    path = tmp_path / f"p{suffix}"
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(ImageError, match=rf"p\{suffix}: ") as caught:
        load_image(path)
    assert "\n" not in str(caught.value)


def test_truncated_jpeg_with_a_whole_thumbnail(picture: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    data = with_orientation(encode(noise, ".jpg"), 1, thumbnail=encode(picture[:8, :8], ".jpg"))
    load_image(data)
    with pytest.raises(ImageError, match="truncated"):
        load_image(data[: len(data) * 3 // 4])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"this is no picture", "not a picture"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"\0" * 1000, "not a"),
    ],
)
def test_files_that_are_no_pictures(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match=message) as caught:
            load_image(source)
        assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.png", tmp_path, "a\0b.png", ""):
        with pytest.raises(ImageError, match="cannot read"):
            load_image(path)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_image_error(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        load_image(data)


def test_golden_resize() -> None:
    with np.load(GOLDEN) as golden:
        source, expected = golden["resize/in"].astype(np.float32), golden["resize/out"]
        size = tuple(int(v) for v in golden["resize/out_size"])
    resized = resize_bilinear(source, size)
    assert np.abs(resized - expected).max() <= 1e-5 * np.abs(expected).max()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([64, 384]))
def test_prepare_pads_right_and_bottom(height: int, width: int, size: int) -> None:
    image = np.full((height, width, 3), 200, np.uint8)
    padded, geometry = prepare(image, ImageSpec(size))
    rows, columns = geometry.valid
    assert padded.shape == (size, size, 3) and padded.dtype == np.float32
    assert geometry.original == (height, width) and geometry.size == size
    np.testing.assert_allclose(padded[:rows, :columns], 200, atol=1e-3)
    assert not padded[rows:].any() and not padded[:, columns:].any()


def test_prepare_leaves_a_fitting_picture_alone(picture: np.ndarray) -> None:
    padded, _ = prepare(picture, ImageSpec(40))
    np.testing.assert_array_equal(padded[:24], picture)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 3)])
def test_tiny_and_extreme_pictures(shape: tuple[int, int]) -> None:
    image = np.full((*shape, 3), 7, np.uint8)
    padded, geometry = prepare(load_image(image), ImageSpec(64))
    assert min(geometry.valid) >= 1
    np.testing.assert_allclose(padded[: geometry.valid[0], : geometry.valid[1]], 7, atol=1e-4)
