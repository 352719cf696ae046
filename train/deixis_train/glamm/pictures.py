"""The two inputs that GLaMM sees of a picture (section 2), resized by Pillow as the reference does.

Sizes are (height, width) px; pictures RGB uint8 [H, W, 3] as stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deixis_train.data.preparation.geometry import Placement, Size, decode_mask
from deixis_train.data.samples import Instance, Sample

Picture = NDArray[np.uint8]
Fit = Literal["center_crop", "stretch"]  # see `ClipConfig.fit`


def global_size(original: Size, size: int, fit: Fit = "center_crop") -> Size:
    """Size before the cut: the shorter side becomes `size`, the other int(size * long / short) (section 2.1). With
    "stretch" both become `size`, and nothing is cut."""
    if fit == "stretch":
        return size, size
    height, width = original
    long = int(size * max(original) / min(original))
    return (size, long) if height <= width else (long, size)


def global_input(image: Picture, size: int, fit: Fit = "center_crop") -> Picture:
    """What CLIP sees: the middle of the picture, or all of it, uint8 [size, size, 3]."""
    height, width = global_size((image.shape[0], image.shape[1]), size, fit)
    resized = _resized(image, (height, width), Image.Resampling.BICUBIC)
    top, left = (height - size) // 2, (width - size) // 2
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def clip_placement(original: Size, size: int, fit: Fit = "center_crop") -> Placement:
    """Where a stored picture lies in CLIP's input."""
    height, width = global_size(original, size, fit)
    return Placement(original, (height, width), ((height - size) // 2, (width - size) // 2), (size, size))


def grounding_size(original: Size, size: int) -> Size:
    """Real size of the grounding input: the longer side becomes `size`, both are rounded (section 2.2)."""
    scale = size / max(original)
    return int(original[0] * scale + 0.5), int(original[1] * scale + 0.5)


def grounding_input(image: Picture, size: int) -> tuple[Picture, Size]:
    """What the grounding encoder sees, zero padded right and bottom: uint8 [size, size, 3], and its real size."""
    height, width = grounding_size((image.shape[0], image.shape[1]), size)
    padded = np.zeros((size, size, 3), np.uint8)
    padded[:height, :width] = _resized(image, (height, width), Image.Resampling.BILINEAR)
    return padded, (height, width)


def _resized(image: Picture, size: Size, kernel: Image.Resampling) -> Picture:
    """Width first, then height: in one call, versions of Pillow differ in which they take first where the two change
    by different factors, and the first one rounds."""
    if image.shape[:2] == size:
        return image
    wide = Image.fromarray(image).resize((size[1], image.shape[0]), kernel)
    return np.asarray(wide.resize((size[1], size[0]), kernel))


def seen_by_clip(sample: Sample, size: int, fit: Fit = "center_crop") -> Sample:
    """The sample as if its picture were the square that CLIP sees: instances with masks and boxes in px of that.

    Instances outside of it keep no area, so that their order stays.
    """
    placement = clip_placement((sample.height, sample.width), size, fit)
    instances = tuple(_moved(thing, placement, size) for thing in sample.instances)
    return replace(sample, width=size, height=size, instances=instances)


def _moved(thing: Instance, placement: Placement, size: int) -> Instance:
    from pycocotools import mask as coco_mask

    x0, y0, x1, y1 = (float(v) for v in placement.place_boxes(thing.box))
    mask = None
    if thing.mask is not None:
        placed = placement.place_mask(decode_mask(thing.mask), size)
        coded = coco_mask.encode(np.asfortranarray(placed))
        mask = {"size": [size, size], "counts": coded["counts"].decode("ascii")}  # pyright: ignore
    return replace(thing, box=(x0, y0, x1, y1), mask=mask)
