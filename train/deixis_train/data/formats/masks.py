"""COCO masks, checked before pycocotools sees them: its C code trusts what it is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deixis_train.data.formats.errors import MalformedError
from deixis_train.data.formats.fields import is_finite
from deixis_train.data.samples import Rle


def run_lengths(segmentation: Any, width: int, height: int) -> Rle:
    """Compressed COCO run lengths from polygons, or from run lengths of either kind, for a picture of that size px.

    Raises MalformedError when the mask is of another size, does not fill the picture, or is no mask.
    """
    from pycocotools import mask  # imported here: most sources have no masks

    coco_mask: Any = mask  # its stubs know texts for counts where the library has bytes
    if isinstance(segmentation, dict):
        size, counts = segmentation.get("size"), segmentation.get("counts")
        if size != [height, width]:
            raise MalformedError(f"mask of size {size!r:.40} for a picture of {width}x{height} px")
        if isinstance(counts, str):
            _check_runs(_decompress(counts), width * height)
            return {"size": [height, width], "counts": counts}
        _check_runs(counts, width * height)
        rle = coco_mask.frPyObjects({"size": size, "counts": counts}, height, width)
    else:
        _check_polygons(segmentation, width, height)
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    return {"size": [height, width], "counts": rle["counts"].decode("ascii")}


def union(masks: Sequence[Rle], width: int, height: int) -> Rle:
    """What any of some masks covers; of none, an empty mask of that size px."""
    from pycocotools import mask

    if not masks:
        return run_lengths({"size": [height, width], "counts": [width * height]}, width, height)
    merged: Any = mask.merge(list(masks))  # pyright: ignore[reportArgumentType]
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def _check_runs(counts: Any, pixels: int) -> None:
    if not isinstance(counts, list) or not all(type(run) is int and run >= 0 for run in counts):
        raise MalformedError("run lengths of the mask are not whole numbers")
    if sum(counts) != pixels:
        raise MalformedError(f"run lengths of the mask cover {sum(counts)} px of {pixels}")


def _decompress(counts: str) -> list[int]:
    """The runs of COCO's text form: five bits per character from '0' on, bit 5 says that more follow, the last one's
    bit 4 is the sign; from the fourth run on, the difference to the run before the previous one."""
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise MalformedError("run lengths of the mask are garbled")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise MalformedError("run lengths of the mask break off")
    return runs


def _check_polygons(polygons: Any, width: int, height: int) -> None:
    if not isinstance(polygons, list) or not polygons:
        raise MalformedError("segmentation is neither polygons nor run lengths")
    for polygon in polygons:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise MalformedError("a polygon of the mask is not a list of at least three x, y pairs")
        if not all(is_finite(v) for v in polygon):
            raise MalformedError("a polygon of the mask has coordinates that are no finite numbers")
        # A little outside is common and harmless, far outside means another picture or unit.
        if not all(-width <= x <= 2 * width for x in polygon[::2]) or not all(
            -height <= y <= 2 * height for y in polygon[1::2]
        ):
            raise MalformedError(f"a polygon of the mask lies far outside the picture of {width}x{height} px")
