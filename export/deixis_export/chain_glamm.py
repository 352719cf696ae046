"""The whole road through the exported graphs of glamm: pictures, boxes, a greedy answer, masks."""

from __future__ import annotations

from pathlib import Path

from deixis.bundle import ParityRecord
from deixis_train.models.glamm.glamm import Glamm


def chain_parity(model: Glamm, bundle: Path, precision: str, seed: int) -> dict[str, ParityRecord]:
    return {}
