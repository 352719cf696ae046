"""Pictures are found, measured without decoding, and read as they are stored; and all of it without PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from published import write_picture

from deixis_train.data.formats.errors import DataError, MalformedError
from deixis_train.data.formats.pictures import Pictures, picture_size, read_picture


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_size_from_the_header_is_that_of_the_pixels(tmp_path: Path, suffix: str) -> None:
    path = write_picture(tmp_path / f"a.{suffix}", 37, 21)
    assert picture_size(path) == (37, 21)
    assert read_picture(path).shape == (21, 37, 3)


def test_pixels_are_rgb(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.png")
    expected = np.random.default_rng(len(path.name)).integers(0, 256, (30, 40, 3), dtype=np.uint8)  # written as BGR
    np.testing.assert_array_equal(read_picture(path), expected[..., ::-1])


def test_an_exif_turn_changes_neither_size_nor_pixels(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.jpg", 40, 30)
    upright = read_picture(path)
    data = path.read_bytes()
    tiff = b"MM\x00*\x00\x00\x00\x08" + b"\x00\x01" + b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00" + b"\x00" * 4
    exif = b"Exif\x00\x00" + tiff
    path.write_bytes(data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:])
    assert picture_size(path) == (40, 30)
    np.testing.assert_array_equal(read_picture(path), upright)


def test_what_is_no_whole_picture_is_refused(tmp_path: Path) -> None:
    path = write_picture(tmp_path / "a.jpg", 200, 200)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match=r"a\.jpg: the picture is truncated"):
        read_picture(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="not a picture"):
        read_picture(path)
    with pytest.raises(MalformedError, match="not a picture"):
        picture_size(path)
    with pytest.raises(DataError, match=r"b\.jpg: cannot read the picture"):
        read_picture(tmp_path / "b.jpg")


def test_names_lead_into_the_folder_and_those_inside_it(tmp_path: Path) -> None:
    for name in ("pictures/a.jpg", "pictures/train/b.jpg", "pictures/train/deep/c.jpg", "d.jpg"):
        write_picture(tmp_path / name)
    pictures = Pictures(tmp_path / "pictures")
    for name, found in [("a.jpg", "a.jpg"), ("b.jpg", "train/b.jpg"), ("deep/c.jpg", "train/deep/c.jpg")]:
        assert pictures.find(name, (40, 30)) == (tmp_path / "pictures" / found, 40, 30)
    for name, what in [("c.jpg", "missing"), ("../d.jpg", "leads out"), (str(tmp_path / "d.jpg"), "leads out")]:
        with pytest.raises(MalformedError, match=what):
            pictures.find(name, None)
    for name in ("a" * 5000, "a\0.jpg"):
        with pytest.raises(MalformedError, match="no name"):
            pictures.find(name, None)
    with pytest.raises(MalformedError, match="40x30 px, not 30x40"):
        pictures.find("a.jpg", (30, 40))


def test_readers_and_alignment_import_no_torch() -> None:
    modules = ["formats", "preparation.geometry", "preparation.alignment", "preparation.store"]
    imports = ", ".join(f"deixis_train.data.{module}" for module in modules)
    code = f"import sys, {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
