"""Writes tests/golden/tiny_bundle and tests/golden/tiny_glamm, bundles of random weights that drive the fast tests:
a PixelLLM of the preset `tiny` and a GLaMM of the preset `glamm-tiny`.

python tests/make_tiny_bundle.py [DIRECTORY]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"
TINY_BUNDLE = GOLDEN / "tiny_bundle"
TINY_GLAMM = GOLDEN / "tiny_glamm"
SEED = 7  # answers of this random GLaMM end, show masks, and differ between pictures and questions


def make_tiny_bundle(destination: Path, preset: str = "tiny") -> None:
    import torch

    from deixis_export.export import ExportOptions, export_bundle
    from deixis_export.presets import random_parts

    torch.set_num_threads(1)
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1763683200")
    model, tokenizer_json = random_parts(preset, SEED)
    export_bundle(
        model,
        destination,
        tokenizer_json=tokenizer_json,
        options=ExportOptions("fp16", SEED, licence="Apache-2.0"),
        source=f"random weights, preset {preset}, seed {SEED}",
        force=True,
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN
    make_tiny_bundle(folder / TINY_BUNDLE.name)
    make_tiny_bundle(folder / TINY_GLAMM.name, "glamm-tiny")
