"""Writes tests/golden/tiny_bundle: a PixelLLM of the `tiny` preset with random weights. Drives the fast tests.

python tests/make_tiny_bundle.py [DIRECTORY]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TINY_BUNDLE = Path(__file__).parent / "golden" / "tiny_bundle"
SEED = 7


def make_tiny_bundle(destination: Path) -> None:
    import torch

    from deixis_export.export import ExportOptions, export_bundle
    from deixis_export.presets import preset, random_model, random_tokenizer

    torch.set_num_threads(1)
    os.environ.setdefault("SOURCE_DATE_EPOCH", "1763683200")
    config = preset("tiny")
    export_bundle(
        random_model(config, SEED),
        destination,
        tokenizer_json=random_tokenizer(config.t5.vocab),
        options=ExportOptions("fp16", SEED, licence="Apache-2.0"),
        source=f"random weights, preset tiny, seed {SEED}",
        force=True,
    )


if __name__ == "__main__":
    make_tiny_bundle(Path(sys.argv[1]) if len(sys.argv) > 1 else TINY_BUNDLE)
