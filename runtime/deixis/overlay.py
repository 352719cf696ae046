"""Pictures of results, to be looked at: traces through their words, boxes with labels, masks, prompts.

Every function takes the original picture (RGB uint8 [H, W, 3]) and results in its pixels, and returns a new RGB uint8
picture of readable size: the longest side is brought to 800..1600 px, and texts stand in a panel below.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from deixis import drawing
from deixis.drawing import FAINT, INK, PAPER, Canvas, Color, Rect
from deixis.errors import ImageError
from deixis.files import write_atomic
from deixis.results import Box, Caption, DenseCaption, GroundedText, Grounding, Mask, Point, Segment, Trace, Word

Picture = NDArray[np.uint8]
_PANEL: Color = (24, 27, 34)
_GREEN, _RED, _WHITE = (64, 214, 120), (246, 84, 84), (255, 255, 255)


def draw_caption(image: Picture, caption: Caption) -> Picture:
    """The caption below the picture, every word in the colour of its dot, and the path through the dots in reading
    order.

    The region of a region caption is drawn as a dashed box.
    """
    canvas = Canvas.of(image)
    if caption.box is not None:
        drawing.rectangle(canvas.pixels, _rect(canvas, caption.box), _WHITE, 1.5 * canvas.unit, dashed=True)
    colors = _draw_path(canvas, caption.words)
    return _with_panel(canvas, [_runs(caption.text + ("" if caption.finished else " ..."), caption.words, colors)])


def draw_trace(image: Picture, trace: Trace | Caption) -> Picture:
    """The path through the words of a given text, and the text below in the same colours."""
    canvas = Canvas.of(image)
    colors = _draw_path(canvas, trace.words)
    return _with_panel(canvas, [_runs(trace.text, trace.words, colors)])


def draw_grounding(image: Picture, groundings: Grounding | Sequence[Grounding]) -> Picture:
    """Box, translucent mask with outline and label of one or several phrases, each in its own colour; phrases listed
    below, also those for which nothing was found.
    """
    found = [groundings] if isinstance(groundings, Grounding) else list(groundings)
    canvas = Canvas.of(image)
    _draw_masks(canvas, [(g.mask, drawing.palette(i)) for i, g in enumerate(found)])
    placed = [(_rect(canvas, g.box), g.text, drawing.palette(i)) for i, g in enumerate(found) if g.box is not None]
    for rect, _, color in placed:
        drawing.rectangle(canvas.pixels, rect, color, 1.8 * canvas.unit)
    for rect, text, color in placed:
        _tag(canvas, rect, text, color)
    lines = [
        [(g.text, drawing.palette(i)), (_score(g.score) if g.box is not None else "  nothing found", FAINT)]
        for i, g in enumerate(found)
    ]
    return _with_panel(canvas, lines)


def draw_grounded(image: Picture, text: GroundedText, boxes: Sequence[Box] = ()) -> Picture:
    """Every phrase's mask in a colour of its own with the phrase at it, and the whole text below with its phrases in
    the same colours.

    Masks that belong to no phrase are numbered, and listed behind the text. A phrase whose mask is missing or empty is
    pale in the text. boxes: what was asked about, dashed.
    """
    canvas = Canvas.of(image)
    names = [(p.mask, p.text) for p in text.phrases] + [(m, str(i)) for i, m in enumerate(text.masks, 1)]
    shown = [(mask, name, drawing.palette(i)) for i, (mask, name) in enumerate(names)]
    _draw_masks(canvas, [(mask, color) for mask, _, color in shown])
    for box in boxes:
        drawing.rectangle(canvas.pixels, _rect(canvas, box), _WHITE, 1.5 * canvas.unit, dashed=True)
    visible = [(_rect(canvas, mask.box), name, color) for mask, name, color in shown if mask is not None and mask.box]
    places = drawing.place_labels(canvas, [rect for rect, _, _ in visible], [[name] for _, name, _ in visible])
    for place, (_, _, color) in zip(places, visible, strict=True):
        if place is not None:  # else the colours in the text say which is which
            drawing.write_tag(canvas, *place, color)
    runs: list[Run] = []
    position = 0
    for phrase, (mask, _, color) in zip(text.phrases, shown, strict=False):
        runs.append((text.text[position : phrase.start], PAPER))
        runs.append((phrase.text, color if mask is not None and mask.area else FAINT))
        position = phrase.end
    runs.append((text.text[position:] + ("" if text.finished else " ..."), PAPER))
    loose = [(f" [{name}]", color) for _, name, color in shown[len(text.phrases) :]]
    problems = [[(problem, FAINT)] for problem in text.problems]
    return _with_panel(canvas, [[*runs, *loose], *problems])


def draw_dense_captions(image: Picture, captions: Sequence[DenseCaption]) -> Picture:
    """The box of every object in a colour of its own, numbered, and its text on it where there is room; all texts with
    their scores below.

    Labels never cover each other: the best objects choose first. Where no place is left for a text its number stands
    alone, and where there is none for that either, the colour tells which line means the box.
    """
    canvas = Canvas.of(image)
    colors = [drawing.palette(i) for i in range(len(captions))]
    rects = [_rect(canvas, caption.box) for caption in captions]
    for rect, color in reversed(list(zip(rects, colors, strict=True))):  # the best on top
        drawing.rectangle(canvas.pixels, rect, color, 1.8 * canvas.unit)
    numbers = [str(i + 1) for i in range(len(captions))]
    places = drawing.place_labels(canvas, rects, [[f"{n} {c.text}", n] for n, c in zip(numbers, captions, strict=True)])
    for place, color in zip(places, colors, strict=True):
        if place is not None:
            drawing.write_tag(canvas, *place, color)
    lines = [
        [(f"{number} {caption.text}", color), (_score(caption.score), FAINT)]
        for number, caption, color in zip(numbers, captions, colors, strict=True)
    ]
    return _with_panel(canvas, lines or [[("nothing found", FAINT)]])


def draw_segments(
    image: Picture,
    segments: Segment | Sequence[Segment],
    *,
    box: Box | None = None,
    points: Sequence[Point] = (),
    labels: Sequence[int] | None = None,
) -> Picture:
    """Masks with outlines, and the prompt that selected them: a dashed box, points with + (label 1) or - (label 0)."""
    found = [segments] if isinstance(segments, Segment) else list(segments)
    canvas = Canvas.of(image)
    _draw_masks(canvas, [(s.mask, drawing.palette(i + 1)) for i, s in enumerate(found)])
    if box is not None:
        drawing.rectangle(canvas.pixels, _rect(canvas, box), _WHITE, 1.5 * canvas.unit, dashed=True)
    for point, label in zip(points, labels if labels is not None else [1] * len(points), strict=True):
        _draw_point(canvas, canvas.at(point), positive=label == 1)
    prompts = (["box"] if box is not None else []) + (
        [f"{len(points)} point{'s'[: len(points) > 1]}"] if len(points) else []
    )
    title = f"segment by {' and '.join(prompts)}" if prompts else "segment"
    lines = [[(title, drawing.palette(i + 1)), (_score(s.score), FAINT)] for i, s in enumerate(found)]
    return _with_panel(canvas, lines)


def contact_sheet(pictures: Sequence[Picture], columns: int = 3, tile_px: int = 520) -> Picture:
    """Pictures side by side in rows, each `tile_px` wide; the rows are as high as their highest picture."""
    gap = tile_px // 26
    rows = []
    for start in range(0, len(pictures), columns):
        tiles = [_fit(p, tile_px, 2 * tile_px) for p in pictures[start : start + columns]]
        row = np.full((max(t.shape[0] for t in tiles), columns * (tile_px + gap) + gap, 3), INK, np.uint8)
        for i, tile in enumerate(tiles):
            left = gap + i * (tile_px + gap) + (tile_px - tile.shape[1]) // 2
            row[: tile.shape[0], left : left + tile.shape[1]] = tile
        rows += [row, np.full((gap, row.shape[1], 3), INK, np.uint8)]
    if not rows:
        raise ValueError("a contact sheet needs at least one picture")
    return np.concatenate([np.full_like(rows[1], INK), *rows])


def save_image(path: str | os.PathLike[str], image: Picture) -> None:
    """Write an RGB picture as the suffix of `path` says (.png, .jpg, .webp, ...), whole or not at all.

    Raises ImageError for a suffix OpenCV cannot write, OSError when the file cannot be written.
    """
    suffix = check_suffix(path)
    good, data = cv2.imencode(suffix, image[..., ::-1])
    if not good:
        raise ImageError(f"cannot write {path}: OpenCV failed to encode it as {suffix}")
    write_atomic(path, data.tobytes())


def check_suffix(path: str | os.PathLike[str]) -> str:
    """The suffix of a picture's path, if OpenCV can write that type; raises ImageError otherwise."""
    suffix = Path(path).suffix.lower()
    if not suffix or not cv2.haveImageWriter(f"picture{suffix}"):
        raise ImageError(f"cannot write {path}: unknown picture type {suffix!r}; use .png or .jpg")
    return suffix


def _draw_path(canvas: Canvas, words: Sequence[Word]) -> list[Color | None]:
    """Draw the path through the words' centres; returns each word's colour, None where it has no place."""
    colors = drawing.gradient(len(words))
    placed = [(canvas.at(w.center), w.text, c) for w, c in zip(words, colors, strict=True) if w.center is not None]
    unit, pixels = canvas.unit, canvas.pixels
    near_path: list[Rect] = []
    if len(placed) > 1:
        steps = 24
        path = drawing.smooth_path([at for at, _, _ in placed], steps)
        inks = np.array([c for _, _, c in placed], float)
        blend = [np.interp(np.arange(len(path)) / steps, np.arange(len(placed)), inks[:, i]) for i in range(3)]
        points: list[tuple[float, float]] = [(float(x), float(y)) for x, y in path]
        for a, b in itertools.pairwise(points):
            drawing.line(pixels, a, b, INK, 4.6 * unit)
        for i, (a, b) in enumerate(itertools.pairwise(points)):
            red, green, blue = (int(channel[i]) for channel in blend)
            drawing.line(pixels, a, b, (red, green, blue), 2.4 * unit)
        _draw_arrow(canvas, points, placed[-1][2])
        near_path = [(x - 2 * unit, y - 2 * unit, x + 2 * unit, y + 2 * unit) for x, y in points[::3]]
    for i, (at, _, color) in enumerate(placed):
        radius = (5.2 if i == 0 else 4.2) * unit
        drawing.disc(pixels, at, radius, color, rim=1.2 * unit)
        if i == 0:  # a ring marks the beginning
            drawing.disc(pixels, at, radius * 0.5, INK)
    canvas.taken += [(x - 5 * unit, y - 5 * unit, x + 5 * unit, y + 5 * unit) for (x, y), _, _ in placed]
    # long words say most: they choose their places first
    for at, text, color in sorted(placed, key=lambda item: -len(item[1])):
        _name_dot(canvas, at, text, color, near_path)
    return [c if w.center is not None else None for w, c in zip(words, colors, strict=True)]


def _draw_arrow(canvas: Canvas, points: list[tuple[float, float]], color: Color) -> None:
    """A head on the path's last piece, short of the last dot."""
    tip, unit = points[-1], canvas.unit
    tail = next((p for p in reversed(points) if math.dist(p, tip) > 16 * unit), None)
    if tail is None:
        return
    length = math.dist(tail, tip)
    dx, dy = (tip[0] - tail[0]) / length, (tip[1] - tail[1]) / length
    tip = (tip[0] - 6 * unit * dx, tip[1] - 6 * unit * dy)
    for size, pen in ((13.0, INK), (10.0, color)):
        nose = (tip[0] + (size - 10) * 0.45 * unit * dx, tip[1] + (size - 10) * 0.45 * unit * dy)
        back = (nose[0] - size * unit * dx, nose[1] - size * unit * dy)
        side = size * 0.52 * unit
        head = [nose, (back[0] - side * dy, back[1] + side * dx), (back[0] + side * dy, back[1] - side * dx)]
        corners = np.round((np.array(head) - 0.5) * 16).astype(np.int32)
        cv2.fillConvexPoly(canvas.pixels, corners, pen, cv2.LINE_AA, 4)


def _name_dot(canvas: Canvas, at: tuple[float, float], text: str, color: Color, near_path: list[Rect]) -> None:
    """Write a word beside its dot, off the path if it can be; a word without room stays in the panel only."""
    size, unit = canvas.text_px, canvas.unit
    width, far = drawing.text_width(text, size, 700), 8 * unit
    x, y = at
    height, full = canvas.pixels.shape[:2]
    places = [(x + far, y + size * 0.35), (x - far - width, y + size * 0.35)]
    places += [(x - width / 2, y - far), (x - width / 2, y + far + size * 0.7)]
    places += [(x + far * 0.7, y - far * 0.7), (x + far * 0.7, y + far * 0.7 + size * 0.7)]
    places += [(x - far * 0.7 - width, y - far * 0.7), (x - far * 0.7 - width, y + far * 0.7 + size * 0.7)]
    rects = [(left - unit, base - size * 0.85, left + width + unit, base + size * 0.25) for left, base in places]
    for avoid in (canvas.taken + near_path, canvas.taken):
        for (left, base), rect in zip(places, rects, strict=True):
            inside = rect[0] >= 0 and rect[1] >= 0 and rect[2] <= full and rect[3] <= height
            if inside and not drawing.overlaps(rect, avoid):
                drawing.write_haloed(canvas.pixels, text, (left, base), size, color)
                canvas.taken.append(rect)
                return


def _draw_masks(canvas: Canvas, items: Sequence[tuple[Mask | None, Color]]) -> None:
    """Tint every mask, outline it, and dim what lies outside all of them a little."""
    height, width = canvas.pixels.shape[:2]
    shapes = [
        (cv2.resize(m.array * np.uint8(255), (width, height), interpolation=cv2.INTER_AREA) / np.float32(255), color)
        for m, color in items
        if m is not None and m.area
    ]
    if not shapes:
        return
    inside = np.max([alpha for alpha, _ in shapes], axis=0)[..., None]
    mixed = canvas.pixels * (0.72 + 0.28 * inside)
    for alpha, color in shapes:
        mixed += 0.45 * alpha[..., None] * (np.array(color, np.float32) - mixed)
    canvas.pixels = np.clip(np.round(mixed), 0, 255).astype(np.uint8)
    for alpha, color in shapes:
        outline, _ = cv2.findContours((alpha > 0.5).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        for pen, thickness in ((INK, 3.6), (color, 1.8)):
            cv2.drawContours(canvas.pixels, outline, -1, pen, max(1, round(thickness * canvas.unit)), cv2.LINE_AA)


def _draw_point(canvas: Canvas, at: tuple[float, float], positive: bool) -> None:
    unit, pixels = canvas.unit, canvas.pixels
    drawing.disc(pixels, at, 8.5 * unit, _WHITE, rim=1.2 * unit)
    drawing.disc(pixels, at, 7 * unit, _GREEN if positive else _RED)
    arm = 3.6 * unit
    drawing.line(pixels, (at[0] - arm, at[1]), (at[0] + arm, at[1]), _WHITE, 2 * unit)
    if positive:
        drawing.line(pixels, (at[0], at[1] - arm), (at[0], at[1] + arm), _WHITE, 2 * unit)


def _tag(canvas: Canvas, rect: Rect, text: str, color: Color) -> None:
    """A label on a box: above it, else below, else inside; the first place that is free."""
    size = canvas.text_px
    height, width = canvas.pixels.shape[:2]
    pad = drawing.TAG_PAD * size
    text = drawing.shorten(text, size, max(width - 2 * pad, size), 600)
    wide, high = drawing.text_width(text, size, 600) + 2 * pad, drawing.TAG_HEIGHT * size
    left = min(max(rect[0] - canvas.unit, 0), max(width - wide, 0))
    tops = [
        rect[1] - high - canvas.unit,
        rect[3] + canvas.unit,
        rect[1] + 2 * canvas.unit,
        rect[3] - high - 2 * canvas.unit,
    ]
    places = [(left, top, left + wide, top + high) for top in tops if 0 <= top <= height - high]
    places = places or [(left, 0.0, left + wide, high)]
    place = next((p for p in places if not drawing.overlaps(p, canvas.taken)), places[0])
    canvas.taken.append(place)
    drawing.write_tag(canvas, place, text, color)


Run = tuple[str, Color]


def _runs(text: str, words: Sequence[Word], colors: Sequence[Color | None]) -> list[Run]:
    """The text in pieces of one colour; what belongs to no word is pale."""
    runs: list[Run] = []
    position = 0
    for word, color in zip(words, colors, strict=True):
        if word.start < position:  # spans out of order: nothing to colour
            continue
        runs += [(text[position : word.start], FAINT), (text[word.start : word.end], color or PAPER)]
        position = word.end
    return [*runs, (text[position:], FAINT)]


def _with_panel(canvas: Canvas, paragraphs: Sequence[Sequence[Run]]) -> Picture:
    """The picture with a dark panel below that holds the paragraphs, wrapped. A narrow picture gets a margin."""
    picture_height, picture_width = canvas.pixels.shape[:2]
    width = max(picture_width, drawing.NARROWEST_PX)
    size = int(min(max(width / 34, 17), 34))
    margin, leading = round(0.9 * size), round(1.45 * size)
    lines = [row for runs in paragraphs for row in _wrap(runs, size, width - 2 * margin)]
    panel = margin * 2 + leading * len(lines) - round(0.4 * size) if lines else 0
    result = np.full((picture_height + panel, width, 3), _PANEL, np.uint8)
    left = (width - picture_width) // 2
    result[:picture_height, left : left + picture_width] = canvas.pixels
    for i, row in enumerate(lines):
        for x, text, color in row:
            base = picture_height + margin + round(0.8 * size) + i * leading
            drawing.write(result, text, (margin + x, base), size, color, 600)
    return result


def _wrap(runs: Sequence[Run], size: int, room: int) -> list[list[tuple[int, str, Color]]]:
    """Break coloured runs into lines of (x, text, colour); a word wider than a line is cut with dots."""
    chunks: list[list[Run]] = [[]]
    for text, color in runs:
        for i, piece in enumerate(text.replace("\n", " ").split(" ")):
            if i:
                chunks.append([])
            if piece:
                chunks[-1].append((piece, color))
    space = round(0.3 * size)
    lines: list[list[tuple[int, str, Color]]] = [[]]
    x = 0
    for chunk in filter(None, chunks):
        widths = [drawing.text_width(text, size, 600) for text, _ in chunk]
        if x and x + sum(widths) > room:
            lines.append([])
            x = 0
        for (text, color), piece_width in zip(chunk, widths, strict=True):
            lines[-1].append((x, drawing.shorten(text, size, room, 600), color))
            x += piece_width
        x += space
    return [row for row in lines if row]


def _rect(canvas: Canvas, box: Box) -> Rect:
    return (*canvas.at(box[:2]), *canvas.at(box[2:]))


def _score(score: float | None) -> str:
    return "" if score is None else f" {score:.2f}"


def _fit(picture: Picture, width: int, height: int) -> Picture:
    scale = min(width / picture.shape[1], height / picture.shape[0])
    size = max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale))
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return np.asarray(resized, np.uint8)
