"""Overlays: right size and kind for any picture, the marks where they belong, files whole or not at all."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deixis import drawing, overlay
from deixis.errors import ImageError
from deixis.files import check_target, write_atomic
from deixis.results import Caption, DenseCaption, Grounding, Mask, Segment, Trace, Word

SIZES = [(64, 64), (480, 640), (3000, 4000), (6000, 400), (64, 6000), (1, 1), (1, 900)]


def caption(height: int, width: int, text: str = "a red mug, left of the (blue) bowl.") -> Caption:
    words, position = [], 0
    for i, piece in enumerate(text.split()):
        start = text.index(piece, position)
        position = start + len(piece)
        x, y = width * (0.1 + 0.1 * i), height * (0.2 + 0.07 * i)
        points = None if piece == "of" else ((x - 3, y - 3), (x + 3, y + 3))
        words.append(Word(piece, start, position, points, -0.1))
    return Caption(
        text, tuple(words), -1.0, (1, 2), finished=False, box=(width * 0.1, height * 0.1, width, height * 2.0)
    )


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_any_size(height: int, width: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    mask = Mask.from_array(np.tri(height, width, dtype=bool))
    segment, box = Segment(mask, 0.9, mask.box), (0.0, 0.0, width / 2, height / 2)
    told = caption(height, width)
    pictures = [
        overlay.draw_caption(image, told),
        overlay.draw_trace(image, Trace(told.text, told.words)),
        overlay.draw_grounding(image, [Grounding("the red mug", box, mask, 0.5), Grounding("x" * 300, box)]),
        overlay.draw_segments(image, segment, box=box),
        overlay.draw_segments(image, segment, points=[(0, 0), (width, height)], labels=[1, 0]),
    ]
    assert image.min() == image.max() == 90  # the given picture stays as it was
    for picture in pictures:
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert 480 <= picture.shape[1] <= 1600
        assert picture.shape[0] < 1600 + 800
        assert np.ptp(picture, axis=2).max() > 30  # something coloured was drawn


def test_words_in_the_panel_have_the_colour_of_their_dots() -> None:
    image = np.full((600, 800, 3), 40, np.uint8)
    words = (Word("left", 0, 4, ((190, 290), (210, 310))), Word("right", 5, 10, ((590, 290), (610, 310))))
    picture = overlay.draw_caption(image, Caption("left right", words))
    first, last = drawing.gradient(2)
    assert tuple(picture[300, 597]) == last  # the dot's own disc; the first dot is a ring
    panel = picture[600:]
    for color in (first, last):
        distance = np.abs(panel.astype(int) - color).sum(-1)
        assert (distance < 12).sum() > 30


def test_places_outside_the_picture_are_drawn_at_its_edge() -> None:
    image = np.zeros((400, 800, 3), np.uint8)
    far = ((5000.0, 150.0), (5000.0, 250.0))
    nan = ((float("nan"), 1.0), (2.0, 3.0))
    words = (Word("far", 0, 3, far), Word("nan", 4, 7, nan))
    picture = overlay.draw_trace(image, Trace("far nan", words))
    assert picture[195:205, 790:].max() > 100


def test_mask_is_tinted_where_it_is_and_dimmed_where_it_is_not() -> None:
    image = np.full((800, 800, 3), 120, np.uint8)
    array = np.zeros((800, 800), bool)
    array[200:600, 200:600] = True
    picture = overlay.draw_segments(image, Segment(Mask.from_array(array), 0.9))
    inside, outside = picture[400, 400].astype(int), picture[50, 50].astype(int)
    assert np.ptp(inside) > 20 and np.ptp(outside) == 0 and outside[0] < 120


def test_empty_things_draw() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    overlay.draw_caption(image, Caption("", ()))
    overlay.draw_grounding(image, [])
    overlay.draw_segments(image, Segment(Mask.from_array(np.zeros((50, 50), bool))))
    with pytest.raises(ValueError, match="at least one"):
        overlay.contact_sheet([])


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=60))
def test_any_text_draws(text: str) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    words = (Word(text, 0, len(text), ((1, 1), (2, 2))),)
    overlay.draw_caption(image, Caption(text, words))
    overlay.draw_grounding(image, Grounding(text, (1, 1, 30, 30)))


def test_long_captions_wrap() -> None:
    image = np.zeros((600, 800, 3), np.uint8)
    short = overlay.draw_caption(image, Caption("one", (Word("one", 0, 3),)))
    text = " ".join(["word"] * 60)
    words = tuple(Word("word", 5 * i, 5 * i + 4) for i in range(60))
    long = overlay.draw_caption(image, Caption(text, words))
    assert long.shape[0] > short.shape[0] + 60 and long.shape[1] == short.shape[1]
    assert (long[:, -10:] == long[-1, -1]).all(axis=-1)[600:].all()  # nothing is written over the margin


def test_text_without_the_font_of_opencv_5(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_FACE", None)
    picture = overlay.draw_caption(np.zeros((100, 100, 3), np.uint8), caption(100, 100))
    assert picture[picture.shape[1] :].max() > 100


def test_contact_sheet() -> None:
    pictures = [np.full((100 * (i + 1), 300, 3), 50 * i, np.uint8) for i in range(4)]
    sheet = overlay.contact_sheet(pictures, columns=3, tile_px=260)
    assert sheet.shape[1] == 3 * 270 + 10 and sheet.dtype == np.uint8


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".PNG"])
def test_save(tmp_path: Path, suffix: str) -> None:
    image = np.zeros((10, 20, 3), np.uint8)
    image[..., 0] = 255
    path = tmp_path / f"p{suffix}"
    overlay.save_image(path, image)
    loaded = cv2.imread(str(path))
    assert loaded.shape == image.shape and loaded[5, 5, 2] > 240 and loaded[5, 5, 0] < 15
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["p.xyz", "p", ".png"])
def test_save_unknown_type(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="unknown picture type"):
        overlay.save_image(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_save_into_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        overlay.save_image(tmp_path / "no" / "p.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(IsADirectoryError, match="it is a folder"):
        check_target(tmp_path)


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    write_atomic(path, b"old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match=r"cannot write .*f: No space left on device"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f"]


share = st.floats(0, 1, width=32)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(600, 800), (800, 800), (1600, 120), (60, 900)]),
    st.lists(st.tuples(share, share, share, share, st.text("abc ", max_size=30)), max_size=30),
)
def test_labels_never_cover_each_other(size: tuple[int, int], objects: list[tuple[float, ...]]) -> None:
    height, width = size
    canvas = drawing.Canvas.of(np.zeros((height, width, 3), np.uint8))
    height, width = canvas.pixels.shape[:2]
    rects = [
        (a * width, b * height, (a + (1 - a) * c) * width, (b + (1 - b) * d) * height) for a, b, c, d, _ in objects
    ]
    texts = [[f"{i} {text}", str(i)] for i, (*_, text) in enumerate(objects)]
    already = (width * 0.4, height * 0.4, width * 0.6, height * 0.6)
    canvas.taken.append(already)
    placed = drawing.place_labels(canvas, rects, texts)
    found = [p for p in placed if p is not None]
    assert len(placed) == len(objects)
    for i, (place, text) in enumerate(found):
        assert place[0] >= 0 and place[1] >= 0 and place[2] <= width and place[3] <= height
        assert not drawing.overlaps(place, [already, *(other for other, _ in found[:i])])
        assert drawing.text_width(text, canvas.text_px, 600) <= place[2] - place[0]
    assert canvas.taken == [already, *(place for place, _ in found)]


def test_labels_stand_at_their_boxes_while_there_is_room() -> None:
    canvas = drawing.Canvas.of(np.zeros((800, 800, 3), np.uint8))
    rects = [(100.0, 300.0, 300.0, 500.0)] * 9 + [(600.0, 600.0, 700.0, 700.0)]
    placed = drawing.place_labels(canvas, rects, [[f"{i} a red mug", str(i)] for i in range(10)])
    for (left, top, right, bottom), own in zip(rects, placed, strict=True):
        assert own is not None
        assert own[0][0] <= right and own[0][2] >= left and own[0][1] <= bottom and own[0][3] >= top
    # Where the whole text has no room any more, the number alone may still have some.
    crowd = drawing.place_labels(canvas, rects[:1] * 40, [["x a red mug beside the bowl", "7"]] * 40)
    assert any(own is not None and own[1] == "7" for own in crowd) and crowd[-1] is None


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dense_captions_of_any_size(height: int, width: int) -> None:
    image = np.full((height, width, 3), 90, np.uint8)
    boxes = [(width * k / 30, 0.0, width * (k + 3) / 30, height * (k + 1) / 30) for k in range(20)]
    captions = [DenseCaption(box, "a red mug, left of the bowl", (), 0.9, 0.9) for box in boxes]
    picture = overlay.draw_dense_captions(image, captions)
    assert picture.dtype == np.uint8 and 480 <= picture.shape[1] <= 1600
    assert np.ptp(picture, axis=2).max() > 30 and image.min() == image.max() == 90
    longer = overlay.draw_dense_captions(image, captions + captions)
    assert longer.shape[0] > picture.shape[0] > overlay.draw_dense_captions(image, []).shape[0]
