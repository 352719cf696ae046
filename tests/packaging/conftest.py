"""Shared by the packaging tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkout import PICTURES


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the documents' examples run, with the shipped pictures where a checkout has them."""
    shutil.copytree(PICTURES, tmp_path / "models" / "pictures")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DEIXIS_MODELS", raising=False)
    return tmp_path
