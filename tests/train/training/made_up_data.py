"""A data folder with a handful of pictures in every published layout, for the sources that a recipe names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from deixis_train.training.recipe import Recipe, SourceSpec

WIDTH, HEIGHT, PICTURES = 128, 96, 4
BOXES = ((8, 16, 48, 40), (64, 32, 56, 56))  # XYWH of the two things in every picture
KINDS, COLOURS = ("cube", "ball"), ("red", "blue")
PHRASES = tuple(f"the {colour} {kind}" for colour, kind in zip(COLOURS, KINDS, strict=True))


def make_data(folder: Path, recipe: Recipe) -> None:
    for stage in recipe.stages:
        for spec in (*stage.sources, *stage.held_out):
            pictures(folder / spec.images)
            for file in spec.files:
                write(folder, file, spec)
            if spec.instances:
                dump(folder / spec.instances, instances(sentences=False))


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(PICTURES):
        image = np.random.default_rng(i).integers(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        for (x, y, w, h), colour in zip(BOXES, ((0, 0, 255), (255, 0, 0)), strict=True):
            image[y : y + h, x : x + w] = colour
        cv2.imwrite(str(folder / f"{i}.jpg"), image)


def dump(path: Path, value: Any, lines: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(v) for v in value) if lines else json.dumps(value), encoding="utf-8")


def images(**more: Any) -> list[dict[str, Any]]:
    return [{"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT, **more} for i in range(PICTURES)]


def instances(*, sentences: bool) -> dict[str, Any]:
    annotations = []
    for i in range(PICTURES):
        for k, (x, y, w, h) in enumerate(BOXES):
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            record: dict[str, Any] = {"id": 2 * i + k, "image_id": i, "category_id": k, "bbox": [x, y, w, h]}
            record |= {"segmentation": [polygon], "iscrowd": 0, "attributes": {"color": COLOURS[k]}}
            if sentences:
                record["sentences"] = [PHRASES[k]]
            annotations.append(record)
    categories = [{"id": k, "name": name} for k, name in enumerate(KINDS)]
    return {"images": images(), "annotations": annotations, "categories": categories}


def narration(i: int) -> dict[str, Any]:
    timed, trace = [], []
    for k, word in enumerate(("a", "cube", "and", "a", "ball")):
        x, y, w, h = BOXES[k // 3]
        timed.append({"utterance": word, "start_time": float(k), "end_time": k + 0.5})
        trace += [{"x": x / WIDTH, "y": y / HEIGHT, "t": float(k)}]
        trace += [{"x": (x + w) / WIDTH, "y": (y + h) / HEIGHT, "t": k + 0.5}]
    record = {"dataset_id": "made_up", "image_id": str(i), "annotator_id": 0, "caption": "a cube and a ball"}
    return record | {"timed_caption": timed, "traces": [trace]}


def write(folder: Path, file: str, spec: SourceSpec) -> None:
    path = folder / file
    if spec.kind == "coco_captions":
        captions = [{"id": i, "image_id": i, "caption": "a cube and a ball"} for i in range(PICTURES)]
        dump(path, {"images": images(), "annotations": captions})
    elif spec.kind == "coco_instances":
        dump(path, instances(sentences=False))
    elif spec.kind == "localized_narratives":
        dump(path, [narration(i) for i in range(PICTURES)], lines=True)
    elif spec.kind == "refer":
        dump(path, instances(sentences=True))
    elif spec.kind == "goldg":
        annotations = [
            {"id": i, "image_id": i, "bbox": list(BOXES[0]), "tokens_positive": [[0, len(PHRASES[0])]]}
            for i in range(PICTURES)
        ]
        dump(path, {"images": images(caption=PHRASES[0]), "annotations": annotations})
    elif spec.kind == "visual_genome":
        regions = [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in BOXES]
        named = [r | {"region_id": k, "phrase": PHRASES[k]} for k, r in enumerate(regions)]
        dump(path, [{"id": i, "regions": [r | {"image_id": i} for r in named]} for i in range(PICTURES)])
        data = [{"image_id": i, "url": f"vg/{i}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(PICTURES)]
        for option, value in (("sizes", data), ("splits", {"train": list(range(PICTURES))})):
            if option in spec.options:
                dump(folder / spec.options[option], value)
    elif spec.kind == "image_text":
        dump(path, [{"image": f"{i}.jpg", "text": "a cube and a ball"} for i in range(PICTURES)], lines=True)
    elif spec.kind == "llava":
        turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cube"}]
        dump(path, [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(PICTURES)])
    elif spec.kind == "grandf":
        dump(path, [grounded(i) for i in range(PICTURES)])
    elif spec.kind in ("refcocog_gcg", "flickr_gcg", "grand", "label_maps", "parts"):
        write_masks(folder, path, spec)
    else:
        raise AssertionError(spec.kind)


def polygon(k: int) -> list[list[float]]:
    x, y, w, h = BOXES[k]
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def grounded(i: int) -> dict[str, Any]:
    caption = " and ".join(PHRASES)
    spans = [[caption.index(phrase), caption.index(phrase) + len(phrase)] for phrase in PHRASES]
    masks = [polygon(k) for k in range(len(PHRASES))]
    found = {p: {"token_positives": s, "rle_masks": [m]} for p, s, m in zip(PHRASES, spans, masks, strict=True)}
    return {"file_name": f"{i}.jpg", "caption": caption, "groundings": found}


def write_masks(folder: Path, path: Path, spec: SourceSpec) -> None:
    """Layouts that only GLaMM reads."""
    caption, phrases = " and ".join(PHRASES), list(enumerate(PHRASES))
    starts = [caption.index(phrase) for phrase in PHRASES]
    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    if spec.kind == "refcocog_gcg":
        refs = [{"sentence": phrase, "segmentation": polygon(k)} for k, phrase in phrases]
        dump(path, [{str(i): {"img_file_name": f"{i}.jpg", "caption": caption, "refs": refs}} for i in range(PICTURES)])
    elif spec.kind == "flickr_gcg":
        annotations = [
            {"id": 2 * i + k, "image_id": i, "bbox": list(BOXES[k]), "segmentation": polygon(k)}
            | {"tokens_positive": [[starts[k], starts[k] + len(phrase)]]}
            for i in range(PICTURES)
            for k, phrase in phrases
        ]
        dump(path, {"images": images(caption=caption), "annotations": annotations})
    elif spec.kind == "grand":
        things = [{"bbox": corners[k], "segmentation": polygon(k), "id": k} for k, _ in phrases]
        spans = [[starts[k], starts[k] + len(phrase)] for k, phrase in phrases]
        value: Any = {
            "referring": [thing | {"attribute": PHRASES[k]} for k, thing in enumerate(things)],
            "captions": [{"caption": caption, "details": [t | {"tokens_positive": spans[t["id"]]} for t in things]}],
            "objects": [thing | {"labels": [KINDS[k]]} for k, thing in enumerate(things)],
        }[spec.options["level"]]
        dump(path, [{"image": f"{i}.jpg", "value": value} for i in range(PICTURES)], lines=True)
    elif spec.kind == "parts":
        annotations = [{"id": i, "image_id": i, "category_id": 0, "segmentation": polygon(0)} for i in range(PICTURES)]
        dump(path, {"images": images(), "annotations": annotations, "categories": [{"id": 0, "name": "cube:side"}]})
    else:
        names = {"ade20k": ["cube", "ball"], "mapillary": {"labels": [{"readable": n} for n in ("none", *KINDS)]}}
        path.parent.mkdir(parents=True, exist_ok=True)
        layout = spec.options["layout"]
        path.write_text("none\n0: table\n1: cube\n2: ball\n" if layout == "cocostuff" else json.dumps(names[layout]))
        values = np.zeros((HEIGHT, WIDTH), np.uint8)
        for k, (x, y, w, h) in enumerate(BOXES, start=1):
            values[y : y + h, x : x + w] = k
        (folder / spec.options["labels"]).mkdir(parents=True, exist_ok=True)
        for i in range(PICTURES):
            cv2.imwrite(str(folder / spec.options["labels"] / f"{i}.png"), values)
