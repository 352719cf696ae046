"""Names of what stands on the table (kinds, colours, sizes) and the meshes behind them: ``VARIANTS`` procedural meshes
per kind. Nothing is loaded from disk, so a scene depends on its seed alone."""

from __future__ import annotations

from functools import cache

import numpy as np

from deixis_train.data.scenes.kinds import BUILDERS
from deixis_train.data.scenes.shapes import Floats, Mesh

COLORS: dict[str, tuple[int, int, int]] = {  # sRGB
    "red": (205, 28, 34),
    "orange": (245, 122, 14),
    "yellow": (246, 214, 36),
    "green": (36, 150, 58),
    "blue": (32, 84, 210),
    "purple": (128, 46, 168),
    "white": (238, 238, 234),
    "black": (34, 34, 38),
}
SIZES: dict[str, float] = {"small": 0.68, "large": 1.12}  # factors on the kind's canonical size
KINDS: tuple[str, ...] = tuple(BUILDERS)
VARIANTS = 40  # meshes per kind


@cache
def mesh(kind: str, variant: int = 0) -> Mesh:
    """The mesh of one of ``KINDS``, the same for the same 0 <= variant < ``VARIANTS`` in every process; raises
    KeyError for another name and ValueError for another variant."""
    if not 0 <= variant < VARIANTS:
        raise ValueError(f"variant {variant} of {kind} is not in 0..{VARIANTS - 1}")
    return BUILDERS[kind](np.random.default_rng([KINDS.index(kind), variant]))


def face_palette(kind: str, main: Floats) -> Floats:
    """Albedo of each paint code for an object of ``kind`` with the main colour ``main`` [3]: sRGB 0..1, float64 [6, 3].
    The tints stay near enough to the colour that its name stays true."""
    dark, white = float(main.mean()) < 0.25, float(main.min()) > 0.8
    lighter = 0.12 if kind == "plate" or dark else 0.26
    return np.array(
        [
            main,
            main + (1 - main) * lighter,
            (0.85, 0.85, 0.85) if dark else (0.1, 0.09, 0.09),
            (0.75, 0.12, 0.05) if main[0] > 0.85 and main[2] < 0.12 and main[1] < 0.55 else (0.93, 0.45, 0.08),
            (0.45, 0.45, 0.47) if white else (0.93, 0.93, 0.92),
            main + 0.06 if dark else main * (0.88 if white else 0.8),
        ]
    )
