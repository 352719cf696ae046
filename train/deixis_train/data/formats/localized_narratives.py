"""Localized Narratives: one narration per line, with timed words and a mouse trace (section 14.1, offline part)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.json_files import check_file, read_lines
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Row, Sample, Utterance

SAMPLES = 16  # points of the trace per utterance
SHORTEST = 1e-5  # s; below, an utterance has no duration to average over

Floats = NDArray[np.float64]


def trace_of_utterances(trace: ArrayLike, times: ArrayLike) -> tuple[Floats, Floats, Floats]:
    """Where the mouse was during each utterance (section 14.1).

    Args:
        trace: [T, 3], x and y as fractions of the picture and the time in s, in any order; T >= 1.
        times: [U, 2], start and end of each utterance in s.

    Returns:
        float64 centres [U, 2] (average over time), boxes [U, 4] (XYXY, around the points) and points [U, 16, 2] at
        equally spaced times, as fractions of the picture, not clipped. Outside of the trace's time the first or the
        last stretch is continued in a straight line.
    """
    path = np.asarray(trace, np.float64)
    path = path[np.argsort(path[:, 2], kind="stable")]
    start, end = np.asarray(times, np.float64).reshape(-1, 2).T
    at = np.linspace(start, end, SAMPLES, axis=1)  # [U, 16]
    points = _positions(path, at)
    duration = end - start
    steps = np.diff(at, axis=1)[..., None]
    area = (steps * (points[:, 1:] + points[:, :-1]) / 2).sum(1)  # trapezoids
    lasting = duration >= SHORTEST
    centers = np.where(lasting[:, None], area / np.where(lasting, duration, 1)[:, None], points.mean(1))
    return centers, np.concatenate([points.min(1), points.max(1)], axis=1), points


def _positions(path: Floats, at: Floats) -> Floats:
    """x, y [.., 2] of a path [T, 3] sorted by time, at times [..]: linear between and beyond its points."""
    if len(path) == 1:
        return np.broadcast_to(path[0, :2], (*at.shape, 2))
    time = path[:, 2]
    after = np.clip(np.searchsorted(time, at), 1, len(time) - 1)
    before = after - 1
    lasts = time[after] - time[before]
    # Two points at the same time define no direction: beyond them the mouse is taken to rest.
    share = np.where(lasts > 0, (at - time[before]) / np.where(lasts > 0, lasts, 1), 1.0)
    return path[before, :2] + share[..., None] * (path[after, :2] - path[before, :2])


class LocalizedNarratives(Reader):
    """JSONL files of narrations: a sample per line, with one row whose utterances carry centre and box.

    Args:
        picture: file name of a picture made of its `image_id`, e.g. "{:012d}.jpg" or "{}.jpg". Without it, COCO's
            narrations (dataset_id "mscoco...") take the first and all others the second.
        sizes: COCO JSON that states the sizes of the pictures, to be compared with the pictures' own.
    """

    def __init__(
        self, files: list[Path], images: Path, *, picture: str | None = None, sizes: Path | None = None, **common: Any
    ) -> None:
        super().__init__(files, images, **common)
        if sizes is not None:
            check_file(sizes)
        self._picture = picture
        self._sizes = sizes

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        sizes = self._stated_sizes()
        for where, value in read_lines(path, skips):
            sample = None
            with skips.record(where):
                sample = self._sample(fields.record(value, "narration"), where, sizes)
            if sample is not None:
                yield sample

    def _stated_sizes(self) -> dict[str, tuple[int, int]]:
        if self._sizes is None:
            return {}
        try:
            records = [fields.record(image) for image in read_coco(self._sizes)["images"]]
            stated = {Path(fields.text(record, "file_name")).name: fields.size(record) for record in records}
        except MalformedError as error:
            raise DataError(f"{self._sizes}: 'images' without names or sizes: {error}") from None
        return {name: size for name, size in stated.items() if size is not None}

    def _sample(self, record: dict[str, Any], where: str, sizes: dict[str, tuple[int, int]]) -> Sample:
        caption = fields.text(record, "caption")
        name = self._name(record)
        image, width, height = self.pictures.find(name, sizes.get(name))
        timed = [fields.record(u, "timed caption") for u in fields.items(record, "timed_caption")]
        if not timed:
            raise MalformedError("'timed_caption' is empty")
        times = [(fields.number(u, "start_time"), fields.number(u, "end_time")) for u in timed]
        if any(end < start for start, end in times):
            raise MalformedError("an utterance ends before it starts")
        with np.errstate(over="ignore", invalid="ignore"):  # judged by the result
            centers, boxes, _ = trace_of_utterances(_joined_trace(record), times)
        if not (np.isfinite(centers).all() and np.isfinite(boxes).all()):
            raise MalformedError("the trace runs off to infinity")
        utterances = tuple(
            Utterance(_words(u), tuple(center), tuple(box))
            for u, center, box in zip(timed, centers.tolist(), boxes.tolist(), strict=True)
        )
        return Sample(image, width, height, (Row(caption, utterances=utterances),), where=where)

    def _name(self, record: dict[str, Any]) -> str:
        image_id = fields.identifier(record, "image_id")
        coco = str(record.get("dataset_id", "")).startswith(("mscoco", "coco"))
        template = self._picture or ("{:012d}.jpg" if coco else "{}.jpg")
        if not re.search(r"\{:\d*d\}", template):
            return template.format(image_id)
        if not str(image_id).isdecimal():
            raise MalformedError(f"'image_id' {image_id!r} is no number, which {template} needs")
        return template.format(int(image_id))


def _words(timed: dict[str, Any]) -> str:
    """What was said; may be empty, and then counts for nothing."""
    return fields.whole_characters(str(timed.get("utterance") or ""), "utterance").strip()


def _joined_trace(record: dict[str, Any]) -> Floats:
    points: list[tuple[float, float, float]] = []
    for segment in fields.items(record, "traces"):
        if not isinstance(segment, list):
            raise MalformedError("'traces' is not a list of lists of points")
        for point in segment:
            named = fields.record(point, "point of the trace")
            points.append((fields.number(named, "x"), fields.number(named, "y"), fields.number(named, "t")))
    if not points:
        raise MalformedError("the trace is empty")
    return np.array(points)
