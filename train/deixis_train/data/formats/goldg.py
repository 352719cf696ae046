"""MDETR's mixtures of grounded captions (GoldG, Flickr30k entities), one row per phrase and box (section 14.2)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deixis_train.data.formats import fields
from deixis_train.data.formats.coco_document import entries_of, read_coco
from deixis_train.data.formats.errors import DataError, MalformedError, Skips
from deixis_train.data.formats.reader import Reader
from deixis_train.data.formats.refer import group_by_picture
from deixis_train.data.samples import Row, Sample


class GroundedCaptions(Reader):
    """final_mixed_train.json, final_flickr_separateGT_*.json and their like, read as a whole (up to 1 GB of JSON).

    Each entry of "images" has a caption; annotations name characters of it in "tokens_positive". A row per annotation:
    the phrase (its pieces joined by a space) with the box. A phrase with several boxes makes several rows. The
    captions of one picture come together in one sample.
    """

    def read(self, path: Path, skips: Skips) -> Iterator[Sample]:
        entries = entries_of(read_coco(path), path, skips)
        if not any("tokens_positive" in annotation for e in entries for _, annotation in e.annotations):
            raise DataError(f"{path}: no annotation has 'tokens_positive', the places of its phrase in the caption")
        for canvas, group in group_by_picture(entries, self, skips):
            rows: list[Row] = []
            for entry in group:
                for where, annotation in entry.annotations:
                    with skips.record(where):
                        phrase = _phrase(entry.record, annotation)
                        box = fields.box_from_xywh(annotation.get("bbox"), canvas.width, canvas.height)
                        rows.append(Row(phrase, box=box))
            if rows:
                yield Sample(canvas.path, canvas.width, canvas.height, tuple(rows), where=group[0].where)


def _phrase(image: dict[str, Any], annotation: dict[str, Any]) -> str:
    caption = image.get("caption")
    if not isinstance(caption, str) or not caption.strip():
        raise MalformedError("its picture's entry has no 'caption'")
    fields.whole_characters(caption, "caption")
    pieces: list[str] = []
    for span in fields.items(annotation, "tokens_positive"):
        if (
            not isinstance(span, list)
            or len(span) != 2
            or not all(isinstance(end, int) for end in span)
            or not 0 <= span[0] < span[1] <= len(caption)
        ):
            raise MalformedError(
                f"'tokens_positive' {span!r:.40} is no stretch of a caption of {len(caption)} characters"
            )
        pieces.append(caption[span[0] : span[1]].strip())
    phrase = " ".join(piece for piece in pieces if piece)
    if not phrase:
        raise MalformedError("'tokens_positive' names no characters")
    return phrase
