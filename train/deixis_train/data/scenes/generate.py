"""Makes data sets of table scenes: pictures on disk and one JSON line per scene, by processes, resumable.

Layout of a data set directory::

    images/000000.jpg     pictures, JPEG quality 92
    scenes-0000.jsonl     ground truth, one line per scene, a shard of ``--shard`` scenes; appears when it is whole
    annotations/          the texts in the published formats (see `publish`); appears when all shards are whole

A line holds id, file, width, height, seed, table (box of the visible table top), objects (kind, color, size, variant,
material, box, foot, rle, visible), captions (words, boxes: the narration, one box per
word), expressions and regions (text, object: index into objects). Boxes are x0, y0, x1, y1 in px of the stored picture,
x1 and y1 exclusive, tight around the visible pixels. ``rle`` is a compressed COCO run-length encoding of the visible
pixels. All texts follow from the rest of the line (`texts.texts_of`). A scene's seed is ``--seed`` + its id: data sets
whose ranges of seeds do not meet share no scene.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from deixis_train.data.scenes import language
from deixis_train.data.scenes.publish import publish
from deixis_train.data.scenes.render import draw
from deixis_train.data.scenes.texts import say
from deixis_train.data.scenes.world import MIN_OBJECTS, build_world

MIN_VISIBLE = 0.35  # share of its outline that an object must show
MIN_PIXELS = 150  # of a picture whose longer side has 512 px
JPEG_QUALITY = 92


@dataclass(frozen=True)
class Scene:
    """A finished scene. picture: uint8 RGB [h, w, 3]. masks: bool [n, h, w], visible pixels. items: the objects as the
    texts see them. looks: variant of the mesh and material of each object. visible: share of each object's outline
    in sight. table: box of the visible table top in px."""

    seed: int
    picture: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    items: tuple[language.Item, ...]
    looks: tuple[dict[str, str], ...]
    visible: tuple[float, ...]
    table: language.Box


def tight_box(mask: NDArray[np.bool_]) -> language.Box:
    """Box x0, y0, x1, y1 (exclusive ends, px) of a mask [h, w] with at least one pixel."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def make_scene(seed: int, size: int = 512) -> Scene:
    """The scene of a seed; its longer side has ``size`` px. Every object of it shows at least ``MIN_VISIBLE`` of its
    outline and enough pixels to be talked about: objects that do not are taken away and the scene is drawn again."""
    least = MIN_PIXELS * (size / 512) ** 2
    attempt = 0
    while True:
        world = build_world(np.random.default_rng([seed, attempt, 0]), size)
        while len(world.objects) >= MIN_OBJECTS:
            drawing = draw(world, np.random.default_rng([seed, attempt, 1]))
            good = [
                share >= MIN_VISIBLE and np.count_nonzero(mask) >= least
                for share, mask in zip(drawing.visible, drawing.masks, strict=True)
            ]
            if all(good) and drawing.table is not None:
                items = []
                for placed, mask in zip(world.objects, drawing.masks, strict=True):
                    foot, _ = world.camera.project(np.array([*placed.at, 0.0]))
                    x, y = (round(float(v), 1) for v in foot)
                    items.append(language.Item(placed.kind, placed.color, placed.size, tight_box(mask), (x, y)))
                looks = tuple(
                    {"variant": str(o.variant), "material": f"{o.material.finish} {o.material.pattern}"}
                    for o in world.objects
                )
                visible = tuple(drawing.visible)
                return Scene(seed, drawing.picture, drawing.masks, tuple(items), looks, visible, drawing.table)
            keep = tuple(o for o, fine in zip(world.objects, good, strict=True) if fine)
            world = replace(world, objects=keep if len(keep) < len(good) else ())
        attempt += 1


def describe(scene: Scene, index: int) -> dict[str, Any]:
    """The scene's line: everything but the picture."""
    height, width = scene.picture.shape[:2]
    texts = say(scene.items, scene.table, width, height, scene.seed)
    objects = []
    for item, looks, mask, share in zip(scene.items, scene.looks, scene.masks, scene.visible, strict=True):
        rle: Any = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        objects.append(
            {
                "kind": item.kind,
                "color": item.color,
                "size": item.size,
                **looks,
                "box": item.box,
                "foot": item.foot,
                "rle": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                "visible": round(share, 3),
            }
        )
    narration = texts.captions[0]
    return {
        "id": index,
        "file": f"images/{index:06d}.jpg",
        "width": width,
        "height": height,
        "seed": scene.seed,
        "table": scene.table,
        "objects": objects,
        "captions": [{"words": [w.text for w in narration], "boxes": [w.box for w in narration]}],
        "expressions": [{"text": text, "object": k} for text, k in texts.expressions],
        "regions": [{"text": text, "object": k} for k, text in enumerate(texts.regions)],
    }


def shard_path(out: Path, shard: int) -> Path:
    """Where shard number ``shard`` of the data set ``out`` lies."""
    return out / f"scenes-{shard:04d}.jsonl"


def _is_complete(path: Path, indices: range, seed: int, size: int) -> bool:
    """Whether ``path`` holds the scenes ``indices`` of this data set. Shards appear whole, so another content means
    that the directory belongs to another data set: ValueError."""
    if not path.exists():
        return False
    try:
        with path.open(encoding="utf-8") as lines:
            found = [(o["id"], o["seed"], max(o["width"], o["height"])) for o in map(json.loads, lines)]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from None
    if found != [(i, seed + i, size) for i in indices]:
        raise ValueError(f"{path} was made with another seed, count, size or shard; choose another directory")
    return True


def write_shard(job: tuple[int, range], out: Path, seed: int, size: int) -> int:
    """Makes and writes the scenes ``job[1]`` as shard ``job[0]``; returns how many these are."""
    shard, indices = job
    path = shard_path(out, shard)
    cv2.setNumThreads(1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with temporary.open("w", encoding="utf-8") as lines:
        for index in indices:
            scene = make_scene(seed + index, size)
            line = describe(scene, index)
            ok, data = cv2.imencode(".jpg", scene.picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
            if not ok:
                raise OSError(f"cannot encode {line['file']}")
            (out / line["file"]).write_bytes(data.tobytes())
            lines.write(json.dumps(line, separators=(",", ":")) + "\n")
    temporary.replace(path)
    return len(indices)


def generate(out: Path, seed: int, count: int, size: int = 512, workers: int = 2, shard: int = 500) -> int:
    """Makes scenes 0..count-1 under ``out``, skipping complete shards, and publishes their texts in ``annotations``
    unless these are there already; returns how many scenes were made. Raises ValueError for numbers that make no data
    set, and where ``out`` holds another one."""
    for name, value, least in (("seed", seed, 0), ("count", count, 1), ("size", size, 128), ("shard", shard, 1)):
        if value < least:
            raise ValueError(f"--{name} is {value}; it starts at {least}")
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it starts at 1")
    jobs = [(k, range(first, min(first + shard, count))) for k, first in enumerate(range(0, count, shard))]
    paths = [shard_path(out, k) for k, _ in jobs]
    if set(out.glob("scenes-*.jsonl")) - set(paths):
        raise ValueError(f"{out} holds more than {count} scenes; choose another directory")
    (out / "images").mkdir(parents=True, exist_ok=True)
    missing = [job for job, path in zip(jobs, paths, strict=True) if not _is_complete(path, job[1], seed, size)]
    made = sum(len(indices) for _, indices in missing)
    run = partial(write_shard, out=out, seed=seed, size=size)
    with tqdm(total=count, initial=count - made, unit="scene", desc="rendered") as progress:
        if workers == 1 or len(missing) < 2:
            for job in missing:
                progress.update(run(job))
        else:
            with multiprocessing.get_context("spawn").Pool(min(workers, len(missing))) as pool:
                for fresh in pool.imap_unordered(run, missing):
                    progress.update(fresh)
    publish(out, paths, workers, anew=made > 0)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status, after one line on stderr where something is wrong."""
    parser = argparse.ArgumentParser(
        prog="deixis train scenes", description="Render a data set of table scenes. The same command resumes it."
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the data set; resumed if it has shards")
    parser.add_argument("--seed", type=int, required=True, help="scene i has seed SEED + i")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--size", type=int, default=512, help="longer side of the pictures in px (default 512)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--shard", type=int, default=500, help="scenes per JSONL file (default 500)")
    options = parser.parse_args(arguments)
    try:
        made = generate(**vars(options))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.out}: {made} scenes made, {options.count - made} were there; texts in {options.out}/annotations")
    return 0
