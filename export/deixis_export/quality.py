"""How good a bundle is at its tasks: metrics of `deixis eval`, run as a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deixis.bundle import Manifest
from deixis.errors import ExportError

# What is judged: the metric of each task of `deixis eval`, the task of the bundle that it needs, and its file of a
# folder of rendered scenes.
_JUDGED = {
    "refer": ("P@0.5", "refer", "refer.json"),
    "masks": ("cIoU", "refer", "refer.json"),
    "caption": ("caption CIDEr", "caption", "captions.json"),
    "regions": ("region CIDEr", "region_caption", "region_descriptions.json"),
}
LIMIT_POINTS = 0.5  # hundredths that a metric may lose
# CIDEr has no upper end at 100 points; where fp32 is beyond, it may lose this part of its value.
_LIMIT_SHARE = LIMIT_POINTS / 100


@dataclass(frozen=True)
class Judge:
    """Asks a bundle about the first pictures of a folder of rendered scenes.

    data: the folder, of pictures that training has not seen. pictures: how many. threads: of one run of a graph, None
    for the engine's own number.
    """

    data: Path
    pictures: int
    threads: int | None = None

    def __str__(self) -> str:
        return f"{self.pictures} pictures of {self.data.resolve().name}"

    def tasks(self, manifest: Manifest) -> list[str]:
        """What can be asked. Raises ExportError where nothing can."""
        tasks = [
            name
            for name, (_, needed, file) in _JUDGED.items()
            if needed in manifest.tasks and (self.data / "annotations" / file).is_file()
        ]
        if not tasks:
            raise ExportError(
                f"{self.data}: has nothing that this model can be asked about; it should be a folder that "
                "'deixis train scenes' rendered"
            )
        return tasks

    def measure(self, bundle: Path, manifest: Manifest) -> dict[str, float]:
        """Metrics by name, as fractions. Raises ExportError where `deixis eval` fails."""
        tasks = self.tasks(manifest)
        with tempfile.TemporaryDirectory(prefix="deixis-eval-") as folder:
            report = Path(folder) / "report.json"
            command = [sys.executable, "-m", "deixis.cli", "eval", str(bundle), "--task", *tasks, "--device", "cpu"]
            command += ["--data", str(self.data), "--limit", str(self.pictures), "--json", str(report)]
            command += ["--threads", str(self.threads)] if self.threads else []
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                told = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
                raise ExportError(
                    f"the candidate could not be measured: {told[-1].removeprefix('deixis eval: error: ')}"
                )
            metrics = json.loads(report.read_text(encoding="utf-8"))["metrics"]
        return {name: metrics[name] for name, _, _ in (_JUDGED[task] for task in tasks)}


def points(found: Mapping[str, float], fp32: Mapping[str, float]) -> dict[str, float]:
    """Change of each metric in hundredths; below 0 is worse."""
    return {name: round(100 * (found[name] - value), 3) for name, value in fp32.items()}


def lost(found: Mapping[str, float], fp32: Mapping[str, float]) -> dict[str, float]:
    """Metrics that lose more than they may, with their change in points."""
    allowed = {name: max(LIMIT_POINTS, 100 * _LIMIT_SHARE * value) for name, value in fp32.items()}
    return {name: change for name, change in points(found, fp32).items() if not change >= -allowed[name]}
