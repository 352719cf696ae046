"""Which files answer which task, and what they say, picture by picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deixis_train.data.formats import FILE_OPTIONS, open_source
from deixis_train.data.formats.pictures import read_picture
from deixis_train.data.samples import Instance, Row, Sample
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.evaluation.tasks import Asked


@dataclass(frozen=True)
class Files:
    """What a reader is opened with; see `deixis_train.data.formats.open_source`."""

    kind: str
    files: tuple[Path, ...]
    images: Path
    options: Mapping[str, Any] = field(default_factory=dict)


# A folder of rendered scenes: the reader and the file of each task.
LAYOUT: dict[str, tuple[str, str, dict[str, str]]] = {
    "refer": ("refer", "annotations/refer.json", {}),
    "trace": ("localized_narratives", "annotations/narrations.jsonl", {}),
    "free-trace": ("localized_narratives", "annotations/traces.jsonl", {}),
    "caption": ("coco_captions", "annotations/captions.json", {}),
    "regions": (
        "visual_genome",
        "annotations/region_descriptions.json",
        {"sizes": "annotations/image_data.json"},
    ),
    "grounded-captions": ("grandf", "annotations/grounded_captions.json", {}),
    "questions": ("llava", "annotations/questions.json", {}),
    "boxes": ("coco_instances", "annotations/instances.json", {}),
}
INSTANCES = "annotations/instances.json"
TRUTH = {"dense-captions": "regions"}  # tasks that are judged by the rows of another one


def files_of(folder: Path, task: str) -> Files:
    """The files of a task in a folder of rendered scenes. Raises EvaluationError when there is no such folder."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder}: no such folder; render scenes into it with 'deixis train scenes --out'")
    kind, name, options = LAYOUT[task]
    return Files(kind, (folder / name,), folder / "images", {key: folder / value for key, value in options.items()})


@dataclass
class Picture:
    """What is asked about one picture, by task; `instances`: of whichever file has them."""

    path: Path
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    instances: tuple[Instance, ...] = ()

    def asked(self, task: str, pixels: NDArray[np.uint8], expressions: int | None) -> Asked:
        """What a task asks about; `expressions` bounds the rows where each is a question."""
        rows = self.rows.get(TRUTH.get(task, task), ())
        return Asked(
            self.path.name, pixels, rows[:expressions] if task in ("refer", "questions") else rows, self.instances
        )


def read_pictures(
    sources: Mapping[str, Files], instances: Files | None, limit: int | None
) -> tuple[list[Picture], dict[str, int]]:
    """The first `limit` pictures of the sources with all that is said about them.

    Returns the pictures, in the order in which they come first, and how many malformed records each task passed over.
    Raises DataError, and EvaluationError when a task has nothing to ask about these pictures.
    """
    pictures: dict[str, Picture] = {}
    skipped: dict[str, int] = {}
    for task, files in sources.items():
        asked = 0
        first = not pictures
        for sample in _samples(task, files, skipped):
            if sample.image.name not in pictures:
                if limit is not None and (len(pictures) >= limit or not first):
                    continue
                pictures[sample.image.name] = Picture(sample.image)
            picture = pictures[sample.image.name]
            picture.rows[task] = picture.rows.get(task, ()) + sample.rows
            picture.instances = picture.instances or sample.instances
            asked += 1
        if not asked:
            raise EvaluationError(f"{', '.join(map(str, files.files))}: nothing about the pictures that are measured")
    if instances is not None:
        for sample in _samples("instances", instances, skipped):
            if sample.image.name in pictures:
                pictures[sample.image.name].instances = sample.instances
    return list(pictures.values()), skipped


def _samples(task: str, files: Files, skipped: dict[str, int]) -> Iterator[Sample]:
    source = open_source(files.kind, files.files, files.images, name=task, losses=(), **files.options)
    yield from source
    if source.skipped:
        skipped[task] = source.skipped


def pixels_of(picture: Picture) -> NDArray[np.uint8]:
    """RGB uint8 [H, W, 3] as stored, the frame of all boxes. Raises DataError."""
    return read_picture(picture.path)


def reader_options(pairs: Sequence[str], split: str | None) -> dict[str, Any]:
    """Options of a reader from "name=value" texts. Raises EvaluationError for what is none."""
    options: dict[str, Any] = {} if split is None else {"split": split}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise EvaluationError(f"--option {pair!r} is not name=value")
        options[name] = Path(value) if name in FILE_OPTIONS else value
    return options
