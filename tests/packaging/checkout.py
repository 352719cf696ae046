"""Where things are in this checkout."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "models" / "tabletop"
PICTURES = ROOT / "models" / "pictures"
