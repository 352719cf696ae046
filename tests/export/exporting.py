"""The random model that the export's tests share, and its export."""

from __future__ import annotations

from pathlib import Path

from deixis.bundle import Bundle
from deixis_export.export import ExportOptions, export_bundle
from deixis_export.presets import preset, random_model, random_tokenizer

TINY = preset("tiny")


def export(destination: Path, precision: str = "fp32", **options: object) -> Bundle:
    return export_bundle(
        random_model(TINY),
        destination,
        tokenizer_json=random_tokenizer(TINY.t5.vocab),
        options=ExportOptions(precision),  # type: ignore[arg-type]
        **options,  # type: ignore[arg-type]
    )
