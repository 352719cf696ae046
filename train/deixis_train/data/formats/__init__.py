"""Readers of published data sets, torch-free. `open_source` opens one by its kind; docs/data.md describes each."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from deixis_train.data.formats.coco import CocoCaptions, CocoInstances
from deixis_train.data.formats.errors import DataError
from deixis_train.data.formats.goldg import GroundedCaptions
from deixis_train.data.formats.grand import Grand
from deixis_train.data.formats.grandf import FlickrGcg, Grandf, RefCocogGcg
from deixis_train.data.formats.image_text import ImageText
from deixis_train.data.formats.llava import Conversations
from deixis_train.data.formats.localized_narratives import LocalizedNarratives
from deixis_train.data.formats.reader import Reader
from deixis_train.data.formats.refer import ReferringExpressions
from deixis_train.data.formats.semantic import LabelMaps, ObjectParts
from deixis_train.data.formats.visual_genome import VisualGenome
from deixis_train.data.samples import Loss, Source

KINDS: dict[str, type[Reader]] = {
    "localized_narratives": LocalizedNarratives,
    "coco_captions": CocoCaptions,
    "coco_instances": CocoInstances,
    "refer": ReferringExpressions,
    "goldg": GroundedCaptions,
    "visual_genome": VisualGenome,
    "image_text": ImageText,
    "llava": Conversations,
    "grandf": Grandf,
    "refcocog_gcg": RefCocogGcg,
    "flickr_gcg": FlickrGcg,
    "label_maps": LabelMaps,
    "parts": ObjectParts,
    "grand": Grand,
}
# Options of readers that are files or folders: recipes name them below the data folder, like a source's own files.
FILE_OPTIONS = frozenset({"sizes", "splits", "labels"})
_COMMON = {"self", "files", "images", "name", "losses", "instances", "max_skipped", "common"}


def open_source(
    kind: str,
    files: Sequence[Path],
    images: Path,
    *,
    name: str,
    losses: Collection[Loss],
    instances: Path | None = None,
    max_skipped: float = 0.01,
    **options: Any,
) -> Source:
    """Open a data set for reading.

    Args:
        kind: one of `KINDS`.
        files: its annotations, read one after the other.
        images: folder of the pictures; they lie in it or in the folders directly inside it.
        name, losses: see `Source`.
        instances: COCO instances JSON, joined to the samples by the pictures' file names.
        max_skipped: share of malformed records that is tolerated, 0 to 1.
        options: what the reader of this kind takes besides, see its class.

    Raises DataError for an unknown kind or option, a file or folder that does not exist, and pickles.
    """
    reader = KINDS.get(kind)
    if reader is None:
        raise DataError(f"source {name!r}: unknown kind {kind!r}; known are {', '.join(KINDS)}")
    known = sorted(set(inspect.signature(reader.__init__).parameters) - _COMMON)
    unknown = sorted(set(options) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise DataError(f"source {name!r}: kind {kind!r} has no option {unknown[0]!r}; {takes}")
    return reader(
        list(files), images, name=name, losses=losses, instances=instances, max_skipped=max_skipped, **options
    )
