"""Whatever is wrong inside of a file, readers answer with counted skips or a DataError, with no other exception."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published import coco, narration, write_json, write_lines, write_picture

from deixis_train.data.formats import open_source
from deixis_train.data.formats.errors import DataError
from deixis_train.data.preparation.store import decode, encode
from deixis_train.data.samples import Sample

ANNOTATION = {
    "image_id": 1,
    "bbox": [4, 5, 10, 10],
    "category_id": 5,
    "caption": "a mug",
    "sentences": [{"sent": "a mug"}],
    "tokens_positive": [[0, 5]],
    "segmentation": [[4, 5, 14, 5, 14, 15]],
    "attributes": {"color": "red"},
}
PICTURE = {"id": 1, "file_name": "a.jpg", "caption": "a mug"}
COCO = coco([PICTURE], [ANNOTATION], categories=[{"id": 5, "name": "mug"}])
REFS = {**COCO, "refs": [{"ann_id": 0, "split": "val", "sentences": [{"sent": "a mug"}]}]}
WITHOUT_CAPTION = coco([{"id": 1, "file_name": "a.jpg"}], [ANNOTATION])
REGION = {"region_id": 1, "image_id": 1, "x": 4, "y": 5, "width": 10, "height": 10, "phrase": "the red mug"}
TALK = {"image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A mug."}]}
SOUND: dict[str, tuple[str, Any]] = {
    "narration": ("localized_narratives", narration("a", dataset_id="x")),
    "captions": ("coco_captions", COCO),
    "instances": ("coco_instances", COCO),
    "mdetr": ("refer", COCO),
    "sentences": ("refer", WITHOUT_CAPTION),
    "refs": ("refer", REFS),
    "goldg": ("goldg", COCO),
    "regions": ("visual_genome", [{"id": 1, "regions": [REGION]}]),
    "region captions": ("visual_genome", COCO),
    "pairs": ("image_text", {"image": "a.jpg", "text": "a mug"}),
    "mask": (
        "refer",
        coco([PICTURE], [{**ANNOTATION, "segmentation": {"size": [30, 40], "counts": "m3:d000000000000000000Wh0"}}]),
    ),
    "talk": ("llava", [TALK]),
}
JUNK = st.sampled_from(
    [None, True, -1, 0, 1e300, "", "x", "a.jpg", [], [[]], [1], {}, {"id": 1}, [None], "`U1", "o3:d0"]
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def damaged(value: Any, path: tuple[Any, ...], junk: Any) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = junk
    return changed


def read(folder: Path, kind: str, document: Any) -> list[Sample]:
    lines = kind in ("localized_narratives", "image_text")
    file = write_lines(folder / "d.jsonl", [document]) if lines else write_json(folder / "d.json", document)
    return list(open_source(kind, [file], folder / "images", name="mine", losses={"text"}, max_skipped=1.0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage")
    write_picture(folder / "images" / "a.jpg")
    write_picture(folder / "images" / "1.jpg")
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    log = logging.getLogger("deixis_train.data.formats.errors")
    log.setLevel(logging.ERROR)
    yield
    log.setLevel(logging.NOTSET)


@pytest.mark.parametrize("name", SOUND)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_skipped_or_refused(name: str, folder: Path, data: st.DataObject) -> None:
    kind, document = SOUND[name]
    path = data.draw(st.sampled_from(list(places(document))))
    try:
        samples = read(folder, kind, damaged(document, path, data.draw(JUNK)))
    except DataError as error:
        assert "\n" not in str(error)
        return
    for sample in samples:
        assert decode(encode(sample)) == sample
        assert all(row.text for row in sample.rows) and sample.where.startswith(str(folder))
        for box in [row.box for row in sample.rows] + [i.box for i in sample.instances]:
            assert box is None or (0 <= box[0] < box[2] <= sample.width and 0 <= box[1] < box[3] <= sample.height)


@pytest.mark.parametrize("name", SOUND)
def test_sound_documents_survive_the_store(name: str, folder: Path) -> None:
    samples = read(folder, *SOUND[name])
    assert samples
    assert [decode(encode(sample)) for sample in samples] == samples
