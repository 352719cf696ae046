"""Captions whose phrases have masks: GranD-f and the sets that were made alike (GLaMM section 9.5)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import entries_of, open_canvas, read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.json_files import read_records
from deixis_train.data.formats.masks import run_lengths
from deixis_train.data.formats.reader import Reader
from deixis_train.data.samples import Phrase, Row, Sample

SHORTEST_CAPTION = 3  # words
SMALLEST_PICTURE = 32  # px of a side


class Grandf(Reader):
    """GranD-f's human annotations and OpenPSG: a JSON array (or a record per line) of pictures with a caption and
    "groundings", by phrase: its characters in the caption ("token_positives") and run lengths ("rle_masks").

    A sample per picture, a row with its caption. Of phrases that overlap the first one is kept; pictures that keep none
    are passed over.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        for where, value in read_records(path, skips):
            sample = None
            with skips.record(where):
                record = fields.record(value)
                name = fields.text(record, "file_name")
                image, width, height = self.pictures.find(name, fields.size(record))
                caption = caption_of(record)
                groundings = fields.record(record.get("groundings"), "'groundings'")
                phrases = [_grandf_phrase(value, caption, width, height) for value in groundings.values()]
                sample = _grounded(image, width, height, caption, phrases, where)
            if sample is not None:
                yield sample


def _grandf_phrase(value: Any, caption: str, width: int, height: int) -> Phrase:
    grounding = fields.record(value, "a grounding")
    start, end = span_of(grounding.get("token_positives"), caption)
    return Phrase(start, end, tuple(run_lengths(m, width, height) for m in fields.items(grounding, "rle_masks")))


class RefCocogGcg(Reader):
    """RefCOCOg made to captions: a JSON array of objects with one key, the picture's id; below it "img_file_name", the
    "caption", and "refs", each a "sentence" with polygons ("segmentation").

    Sentences are looked for in the caption, both in lower case; those that are not in it are left out. Where one
    reaches into the next, it ends before that.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        for where, value in read_records(path, skips):
            sample = None
            with skips.record(where):
                outer = fields.record(value)
                if len(outer) != 1:
                    raise MalformedError(f"{len(outer)} keys where one is expected, the picture's id")
                record = fields.record(next(iter(outer.values())), "the picture's entry")
                image, width, height = self.pictures.find(fields.text(record, "img_file_name"), fields.size(record))
                caption = caption_of(record).lower()
                found: list[Phrase] = []
                for ref in fields.items(record, "refs"):
                    ref = fields.record(ref, "a ref")
                    sentence = fields.text(ref, "sentence").lower()
                    start = caption.find(sentence)
                    if start >= 0:
                        mask = run_lengths(ref.get("segmentation"), width, height)
                        found.append(Phrase(start, start + len(sentence), (mask,)))
                sample = _grounded(image, width, height, caption, list(_cut_short(found)), where)
            if sample is not None:
                yield sample


def _cut_short(phrases: Iterable[Phrase]) -> Iterator[Phrase]:
    """Phrases by their start, each ending a character before the next one begins; what is left of none is dropped."""
    ordered = sorted(phrases, key=lambda phrase: phrase.start)
    for number, phrase in enumerate(ordered):
        end = phrase.end
        if number + 1 < len(ordered) and end >= ordered[number + 1].start:
            end = ordered[number + 1].start - 1
        if end > phrase.start:
            yield Phrase(phrase.start, end, phrase.masks)


class FlickrGcg(Reader):
    """Flickr30k entities with SAM's masks, COCO-style: pictures with a "caption", annotations with "tokens_positive"
    (the first stretch of characters counts), "bbox" and "sam_mask" (run lengths; "segmentation" works as well).

    A sample per entry of "images", a row with its caption. Annotations of the same stretch become one phrase.
    Captions of fewer than 3 words and pictures of less than 32 px are passed over. Without masks the captions can
    still teach regions (MDETR's final_flickr_mergedGT_*.json).
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        entries = entries_of(read_coco(path), path, skips)
        if not any("tokens_positive" in annotation for e in entries for _, annotation in e.annotations):
            raise DataError(f"{path}: no annotation has 'tokens_positive', the places of its phrase in the caption")
        for entry in entries:
            caption = ""
            with skips.record(entry.where):
                caption = caption_of(entry.record)
            if len(caption.split()) < SHORTEST_CAPTION:
                continue
            canvas = open_canvas(entry, self.pictures, skips)
            if canvas is None or min(canvas.width, canvas.height) < SMALLEST_PICTURE:
                continue
            found: dict[tuple[int, int], Phrase] = {}
            for where, annotation in entry.annotations:
                with skips.record(where):
                    spans = fields.items(annotation, "tokens_positive")
                    start, end = span_of(spans[0] if spans else None, caption)
                    box = fields.box_from_xywh(annotation.get("bbox"), canvas.width, canvas.height)
                    segmentation = annotation.get("sam_mask", annotation.get("segmentation"))
                    masks = (run_lengths(segmentation, canvas.width, canvas.height),) if segmentation else ()
                    known = found.get((start, end), Phrase(start, end, (), box))
                    found[start, end] = Phrase(start, end, known.masks + masks, known.box)
            sample = _grounded(
                canvas.path, canvas.width, canvas.height, caption, list(found.values()), entry.where, masked=False
            )
            if sample is not None:
                yield sample


def caption_of(record: dict[str, Any]) -> str:
    """The caption as it stands, since characters are counted in it."""
    fields.text(record, "caption")
    return str(record["caption"])


def span_of(value: Any, caption: str) -> tuple[int, int]:
    """A stretch of characters that a record names."""
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(end) is int for end in value)
        or not 0 <= value[0] < value[1] <= len(caption)
        or not caption[value[0] : value[1]].strip()
    ):
        raise MalformedError(f"{value!r:.40} is no stretch of words of a caption of {len(caption)} characters")
    return value[0], value[1]


def apart(phrases: Iterable[Phrase]) -> tuple[Phrase, ...]:
    """Phrases by their start; of those that overlap, the first."""
    kept: list[Phrase] = []
    for phrase in sorted(phrases, key=lambda p: (p.start, p.end)):
        if not kept or phrase.start >= kept[-1].end:
            kept.append(phrase)
    return tuple(kept)


def _grounded(
    image: Path, width: int, height: int, caption: str, phrases: list[Phrase], where: str, *, masked: bool = True
) -> Sample | None:
    """The sample, or None if no phrase (with a mask, where `masked`) is left."""
    kept = apart(phrase for phrase in phrases if phrase.masks or not masked)
    return Sample(image, width, height, (Row(caption, phrases=kept),), where=where) if kept else None
