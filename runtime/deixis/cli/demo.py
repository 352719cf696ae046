"""demo: every task on the shipped pictures, with overlays, a contact sheet, results.json and a page to look at them."""

from __future__ import annotations

import argparse
import html
import json
import time
from collections.abc import Callable, Container, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deixis import overlay
from deixis.cli.tasks import Result, lines_of, load, write_json
from deixis.errors import BundleError, BundleNotFoundError
from deixis.files import write_atomic
from deixis.image import load_image
from deixis.model import find_bundle
from deixis.results import Box
from deixis.scene import Scene

Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class Suggestion:
    """One shipped picture and what to ask about it; boxes and points in its pixels.

    caption: False for a picture of a kind the model was not trained to describe; its boxes are then only segmented.
    """

    path: Path
    caption: bool = True
    refer: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    points: tuple[tuple[float, ...], ...] = ()
    trace: str | None = None


@dataclass
class Album:
    """What has been made so far: pictures on disk and a record of each."""

    folder: Path
    pictures: list[Picture] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, task: str, source: Path, ask: Callable[[], Sequence[Any]], draw: Callable[[Any], Picture]
    ) -> None:
        """Ask, draw, write the picture and say so."""
        started = time.perf_counter()
        results: Sequence[Result] = ask()
        taken_ms = (time.perf_counter() - started) * 1000
        picture = draw(results)
        file = f"{len(self.records) + 1:02d}-{name}.png"
        overlay.save_image(self.folder / file, picture)
        self.pictures.append(picture)
        self.records.append(
            {
                "picture": file,
                "source": source.name,
                "task": task,
                "time_ms": round(taken_ms, 1),
                "results": [result.to_dict() for result in results],
            }
        )
        said = "; ".join(lines_of(result)[0] for result in results)
        print(f"  {file:<34} {taken_ms:6.0f} ms  {said}", flush=True)


def run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    root = find_bundle(options.bundle)
    suggestions = read_suggestions(Path(options.pictures) if options.pictures else _pictures_of(root))
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    album = Album(folder)
    with closing(load(options)) as model:
        loaded_ms = (time.perf_counter() - started) * 1000
        print(f"bundle {model.info.name} on {model.info.device}, loaded in {loaded_ms:.0f} ms", flush=True)
        encode_ms = []
        for suggestion in suggestions:
            image = load_image(suggestion.path)
            clock = time.perf_counter()
            scene = model.encode(image)
            encode_ms.append((time.perf_counter() - clock) * 1000)
            print(f"{suggestion.path.name}: encoded in {encode_ms[-1]:.0f} ms", flush=True)
            _ask_everything(album, suggestion, image, scene, model.info.tasks)
        about = {"bundle": model.info.name, "device": model.info.device}
    if album.pictures:
        overlay.save_image(folder / "contact_sheet.jpg", overlay.contact_sheet(album.pictures))
    seconds = time.perf_counter() - started
    times = {
        "load_ms": round(loaded_ms, 1),
        "encode_ms": [round(value, 1) for value in encode_ms],
        "total_s": round(seconds, 2),
    }
    write_json(str(folder / "results.json"), {**about, "times": times, "pictures": album.records})
    write_atomic(folder / "index.html", _page(album.records, about, seconds).encode())
    print(f"{len(album.records)} pictures, results.json, contact_sheet.jpg and index.html in {folder}, {seconds:.1f} s")
    return 0


def read_suggestions(folder: Path) -> list[Suggestion]:
    """Read prompts.json of a folder of pictures. Raises BundleError naming what is wrong with it."""
    path = folder / "prompts.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        found = [
            Suggestion(
                _inside(folder, entry["file"]),
                bool(entry.get("caption", True)),
                tuple(str(phrase) for phrase in entry.get("refer", ())),
                tuple(_box(box) for box in entry.get("boxes", ())),
                tuple(tuple(float(v) for v in point) for point in entry.get("points", ())),
                str(entry["trace"]) if entry.get("trace") else None,
            )
            for entry in entries
        ]
    except OSError as error:
        raise BundleNotFoundError(f"{path}: {error.strerror}; the demo needs the pictures that ship with it") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path}: not a list of suggested prompts ({type(error).__name__}: {error})") from None
    if not found:
        raise BundleError(f"{path}: suggests nothing")
    return found


def _box(values: Sequence[float]) -> Box:
    left, top, right, bottom = (float(v) for v in values)
    return left, top, right, bottom


def _inside(folder: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"{name!r} is not a plain file name")
    return folder / name


def _pictures_of(root: Path) -> Path:
    """The folder `pictures` in the bundle's folder or beside it."""
    inside, beside = root / "pictures", root.parent / "pictures"
    return inside if inside.is_dir() or not beside.is_dir() else beside


def _ask_everything(album: Album, asked: Suggestion, image: Picture, scene: Scene, tasks: Container[str]) -> None:
    stem, path = asked.path.stem, asked.path

    def draw_caption(results: Sequence[Any]) -> Picture:
        return overlay.draw_caption(image, results[0])

    def draw_grounded(results: Sequence[Any]) -> Picture:
        return overlay.draw_grounded(image, results[0])

    if asked.caption and "caption" in tasks:
        album.add(f"{stem}-caption", "caption", path, lambda: [scene.caption()], draw_caption)
    if asked.caption and "grounded_caption" in tasks:
        album.add(f"{stem}-grounded", "grounded caption", path, partial(_one, scene.grounded_caption), draw_grounded)
    if asked.caption and "dense_captions" in tasks:
        draw_all = partial(overlay.draw_dense_captions, image)
        album.add(f"{stem}-dense", "dense captions", path, lambda: list(scene.dense_captions(min_score=0.3)), draw_all)
    if asked.trace and "trace" in tasks:
        ask = partial(scene.trace, asked.trace)
        album.add(f"{stem}-trace", "trace", path, partial(_one, ask), lambda r: overlay.draw_trace(image, r[0]))
    if asked.trace and "ground_phrases" in tasks:
        ask = partial(scene.ground_phrases, asked.trace)
        album.add(f"{stem}-phrases", "phrases of a text", path, partial(_one, ask), draw_grounded)
    if asked.refer and "refer" in tasks:
        album.add(
            f"{stem}-refer",
            "refer",
            path,
            lambda: [scene.refer(phrase) for phrase in asked.refer],
            lambda r: overlay.draw_grounding(image, r),
        )
    for i, box in enumerate(asked.boxes, 1):
        region, cut = partial(scene.caption, box=box), partial(scene.segment, box=box)
        if asked.caption and "region_caption" in tasks:
            album.add(f"{stem}-region-{i}", "caption of a region", path, partial(_one, region), draw_caption)
        if "segment" in tasks:
            draw = partial(overlay.draw_segments, image, box=box)
            album.add(f"{stem}-box-{i}", "segment by box", path, partial(_one, cut), draw)
    for i, point in enumerate(asked.points if "segment" in tasks else (), 1):
        prompt = {"points": [point[:2]], "labels": [int(point[2]) if len(point) > 2 else 1]}
        cut, draw = partial(scene.segment, **prompt), partial(overlay.draw_segments, image, **prompt)
        album.add(f"{stem}-point-{i}", "segment by point", path, partial(_one, cut), draw)


def _one(ask: Callable[[], Any]) -> list[Any]:
    return [ask()]


_STYLE = """
body { margin: 0; padding: 2rem; background: #12141a; color: #eceef2; font: 16px/1.5 system-ui, sans-serif }
h1 { font-weight: 600; margin: 0 } p { color: #868c98; margin: .3rem 0 2rem }
main { display: grid; gap: 1.4rem; grid-template-columns: repeat(auto-fill, minmax(22rem, 1fr)) }
figure { margin: 0; background: #181b22; border-radius: 10px; overflow: hidden }
img { width: 100%; display: block } figcaption { padding: .7rem 1rem; color: #868c98; font-size: .88rem }
b { color: #eceef2; font-weight: 600 } a { color: #7fb4ff }
"""


def _page(records: Sequence[dict[str, Any]], about: dict[str, str], seconds: float) -> str:
    figures = "\n".join(map(_figure, records))
    told = f"{len(records)} pictures from bundle {about['bundle']} on {about['device']} in {seconds:.1f} s."
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f"<title>deixis demo</title><style>{_STYLE}</style>\n<h1>Pointing with words</h1>\n"
        f'<p>{html.escape(told)} The same as data: <a href="results.json">results.json</a>.</p>\n'
        f"<main>\n{figures}\n</main></html>\n"
    )


def _figure(record: dict[str, Any]) -> str:
    picture, task, source = (html.escape(record[key]) for key in ("picture", "task", "source"))
    return (
        f'<figure><a href="{picture}"><img src="{picture}" loading="lazy" alt="{task} on {source}"></a>'
        f"<figcaption><b>{task}</b> on {source}, {record['time_ms']:.0f} ms</figcaption></figure>"
    )
