"""Shared by the packaging tests."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkout import PICTURES


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the documents' examples run: two shipped pictures under the names that the documents use."""
    entries = json.loads((PICTURES / "prompts.json").read_text(encoding="utf-8"))
    for name, entry in zip(("table.jpg", "other.jpg"), entries, strict=False):
        shutil.copy(PICTURES / entry["file"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEIXIS_MODELS", raising=False)
    return tmp_path
