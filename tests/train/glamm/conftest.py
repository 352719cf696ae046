"""The made-up data folder of the other training tests, with captions whose phrases have masks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
