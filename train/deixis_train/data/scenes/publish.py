"""Writes the texts about a data set of scenes in the layouts of the published data sets, for the same readers.

``annotations/`` of a data set appears when all of its shards are whole. Pictures are named 000000.jpg, ... in
``images/``; ``image_id`` is the scene's number, in Localized Narratives the name of the picture without ".jpg"::

    instances.json            COCO instances: category = kind, attributes, run lengths, boxes
    captions.json             COCO captions, five per picture
    narrations.jsonl          Localized Narratives: one caption per picture, objects from left to right
    traces.jsonl              Localized Narratives: texts in free order
    refer.json                COCO with the referring expressions ("sentences") of each annotation
    region_descriptions.json  Visual Genome, with image_data.json
    grounded_captions.json    GranD-f: captions with phrases, their spans of characters and masks
    goldg.json                the same captions and phrases in MDETR's layout, with boxes
    questions.json            LLaVA: conversations of one turn
    image_text.jsonl          pairs of a picture and a text: captions and traces
    scenes.json               how many scenes these files are about
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from pycocotools import mask as coco_mask
from tqdm import tqdm

from deixis_train.data.scenes.language import Box, Words, join, phrases
from deixis_train.data.scenes.objects import KINDS
from deixis_train.data.scenes.texts import texts_of

FOLDER = "annotations"
SPOKEN, STEP = 0.3, 0.4  # s: how long a word lasts, and from one word's start to the next one's

Record = dict[str, Any]
Records = dict[str, list[Record]]  # by file and, after a slash, by list in the file

_COCO = ("instances", "captions", "refer", "goldg")  # objects with the lists "images" and "annotations"
_ARRAYS = ("region_descriptions", "image_data", "grounded_captions", "questions")
_LINES = ("narrations", "traces", "image_text")


def narration(line: Record, words: Words, annotator: int) -> Record:
    """A record of Localized Narratives. Each word and mark is an utterance of its own; while it lasts the trace runs
    along a diagonal of its box, in turns from the left and from the right, so that the least and the greatest
    coordinates within the utterance are the box and their average over time its centre. A new segment starts where the
    text goes on to another thing."""
    width, height = line["width"], line["height"]
    timed: list[Record] = []
    segments: list[list[Record]] = []
    previous: Box | None = None
    for k, word in enumerate(words):
        start = round(k * STEP, 3)
        end = round(start + SPOKEN, 3)
        timed.append({"utterance": word.text, "start_time": start, "end_time": end})
        x0, y0, x1, y1 = word.box
        if word.box != previous:
            segments.append([])
        previous = word.box
        left_to_right = k % 2 == 0
        for x, y, t in ((x0 if left_to_right else x1, y0, start), (x1 if left_to_right else x0, y1, end)):
            segments[-1].append({"x": round(x / width, 5), "y": round(y / height, 5), "t": t})
    return {
        "dataset_id": "scenes",
        "image_id": Path(line["file"]).stem,
        "annotator_id": annotator,
        "caption": join([word.text for word in words]),
        "timed_caption": timed,
        "traces": segments,
    }


def _image(line: Record) -> Record:
    return {
        "id": line["id"],
        "file_name": Path(line["file"]).name,
        "width": line["width"],
        "height": line["height"],
    }


def _xywh(box: Sequence[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def records_of(line: Record) -> Records:
    """What every file says about one scene, from its line of ground truth. Ids are unique within a data set."""
    texts = texts_of(line)
    image, number = _image(line), line["id"]
    first = number * 1000  # ids of what belongs to this scene start here
    instances: list[Record] = []
    for k, thing in enumerate(line["objects"]):
        instances.append(
            {
                "id": first + k + 1,
                "image_id": number,
                "category_id": KINDS.index(thing["kind"]) + 1,
                "bbox": _xywh(thing["box"]),
                "area": int(coco_mask.area(thing["rle"])),
                "segmentation": thing["rle"],
                "iscrowd": 0,
            }
        )
    names = ("color", "size", "variant", "material")
    attributes = [{name: thing[name] for name in names if name in thing} for thing in line["objects"]]
    sentences: list[list[Record]] = [[] for _ in line["objects"]]
    for k, (text, thing) in enumerate(texts.expressions, start=1):
        sentences[thing].append({"sent_id": first + k, "sent": text, "raw": text, "tokens": text.split()})
    captions = [join([word.text for word in words]) for words in texts.captions]
    traces = [join([word.text for word in words]) for words in texts.traces]
    # Which of the five captions is grounded changes from scene to scene.
    grounded = texts.captions[number % len(captions)]
    return {
        "instances/images": [image],
        "instances/annotations": [{**o, "attributes": a} for o, a in zip(instances, attributes, strict=True)],
        "captions/images": [image],
        "captions/annotations": [
            {"id": first + k, "image_id": number, "caption": text} for k, text in enumerate(captions, start=1)
        ],
        "refer/images": [image],
        "refer/annotations": [{**o, "sentences": s} for o, s in zip(instances, sentences, strict=True) if s],
        "narrations": [narration(line, texts.captions[0], 0)],
        "traces": [narration(line, words, k) for k, words in enumerate(texts.traces, start=1)],
        "region_descriptions": [
            {
                "id": number,
                "regions": [
                    {
                        "region_id": o["id"],
                        "image_id": number,
                        "phrase": text,
                        **dict(zip(("x", "y", "width", "height"), o["bbox"], strict=True)),
                    }
                    for o, text in zip(instances, texts.regions, strict=True)
                ],
            }
        ],
        "image_data": [
            {
                "image_id": number,
                "url": line["file"],
                "width": line["width"],
                "height": line["height"],
                "coco_id": None,
                "flickr_id": None,
            }
        ],
        "grounded_captions": [_grounded(line, grounded)],
        "goldg/images": [{**image, "caption": captions[number % len(captions)]}],
        "goldg/annotations": [
            {**instances[thing], "id": first + k, "tokens_positive": [[start, end]]}
            for k, (start, end, thing) in enumerate(phrases(grounded), start=1)
        ],
        "questions": [
            {
                "id": f"{Path(line['file']).stem}-{k}",
                "image": Path(line["file"]).name,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
            for k, (question, answer) in enumerate(texts.questions)
        ],
        "image_text": [{"image": image["file_name"], "text": text} for text in (*captions, *traces)],
    }


def _grounded(line: Record, words: Words) -> Record:
    """A caption in GranD-f's layout: phrases with their span of characters and their masks."""
    caption = join([word.text for word in words])
    groundings: dict[str, Record] = {}
    for start, end, thing in phrases(words):
        # A phrase that names several things (they share kind, colour and size) has several masks.
        entry = groundings.setdefault(caption[start:end], {"token_positives": [start, end], "rle_masks": []})
        entry["rle_masks"].append(line["objects"][thing]["rle"])
    return {
        "file_name": Path(line["file"]).name,
        "image_id": line["id"],
        "width": line["width"],
        "height": line["height"],
        "caption": caption,
        "groundings": groundings,
    }


def _shard_texts(path: Path) -> dict[str, list[str]]:
    """The records about a shard's scenes as JSON, in the scenes' order."""
    out: dict[str, list[str]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            for name, records in records_of(json.loads(line)).items():
                out.setdefault(name, []).extend(json.dumps(r, separators=(",", ":")) for r in records)
    return out


def _all_shards(shards: Sequence[Path], workers: int) -> Iterator[dict[str, list[str]]]:
    if workers == 1 or len(shards) == 1:
        yield from map(_shard_texts, shards)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(shards))) as pool:
        yield from pool.imap(_shard_texts, shards)


class _ListWriter:
    """A JSON array that grows in a file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.empty = file, True

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.file.write("\n" if self.empty else ",\n")
            self.file.write(text)
            self.empty = False


def _write(folder: Path, shards: Sequence[Path], workers: int) -> int:
    """Writes all files into ``folder``, a shard at a time; returns how many scenes they are about."""
    categories = json.dumps([{"id": k, "name": kind, "supercategory": "object"} for k, kind in enumerate(KINDS, 1)])
    count = 0
    with ExitStack() as stack:

        def start(name: str, begin: str) -> TextIO:
            file = stack.enter_context((folder / name).open("w", encoding="utf-8"))
            file.write(begin)
            return file

        lines = {name: start(f"{name}.jsonl", "") for name in _LINES}
        arrays = {name: _ListWriter(start(f"{name}.json", "[")) for name in _ARRAYS}
        coco = {name: _ListWriter(start(f"{name}.json", '{"annotations":[')) for name in _COCO}
        images: dict[str, list[str]] = {name: [] for name in _COCO}
        for texts in tqdm(_all_shards(shards, workers), total=len(shards), unit="shard", desc="texts written"):
            count += len(texts["image_data"])
            for name, file in lines.items():
                file.writelines(f"{text}\n" for text in texts.get(name, ()))
            for name, array in arrays.items():
                array.add(texts.get(name, ()))
            for name, array in coco.items():
                array.add(texts.get(f"{name}/annotations", ()))
                images[name] += texts[f"{name}/images"]
        for array in arrays.values():
            array.file.write("\n]\n")
        for name, array in coco.items():
            array.file.write("\n],\n")
            if name != "captions":
                array.file.write(f'"categories":{categories},\n')
            array.file.write('"images":[\n' + ",\n".join(images[name]) + "\n]}\n")
    return count


def publish(out: Path, shards: Sequence[Path], workers: int = 1, anew: bool = False) -> bool:
    """Writes ``out``/annotations from whole shards, unless it is there and about as many scenes; ``anew`` writes it in
    any case. The folder appears whole. Returns whether it was written."""
    target = out / FOLDER
    count = sum(1 for path in shards for _ in path.open(encoding="utf-8"))
    if not anew and _count_of(target) == count:
        return False
    fresh, stale = (out / f".{FOLDER}.{os.getpid()}.{kind}" for kind in ("part", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    written = _write(fresh, shards, workers)
    (fresh / "scenes.json").write_text(json.dumps({"scenes": written}) + "\n", encoding="utf-8")
    if target.exists():
        target.rename(stale)
    fresh.rename(target)
    shutil.rmtree(stale, ignore_errors=True)
    return True


def _count_of(folder: Path) -> int | None:
    """How many scenes the published files are about, None where there are none."""
    try:
        return int(json.loads((folder / "scenes.json").read_text(encoding="utf-8"))["scenes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
