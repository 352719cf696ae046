"""What a stage leaves on disk: its state, which resumes it, and its progress, which people read."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deixis_train.files import replacing


class StageState:
    """`<out>/<stage>.pt`: what learned, the optimizer and the step. Written under a temporary name, then renamed.

    Random numbers need no state: they follow from seed and step.
    """

    def __init__(self, out: Path, name: str) -> None:
        self.path = out / f"{name}.pt"

    def load(self) -> dict[str, Any] | None:
        """{"trained": tensors by name, "helpers": ..., "optimizer": ... or None, "step": int, "done": bool}."""
        if not self.path.exists():
            return None
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def save(
        self, step: int, trained: Mapping[str, Tensor], helpers: nn.Module, optimizer: torch.optim.Optimizer, done: bool
    ) -> None:
        state = {
            "trained": {name: value.detach() for name, value in trained.items()},
            "helpers": helpers.state_dict(),
            "optimizer": None if done else optimizer.state_dict(),
            "step": step,
            "done": done,
        }
        with replacing(self.path) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())


class Progress:
    """Lines on the terminal, JSON lines in `<out>/<stage>.log.jsonl`, and TensorBoard below `<out>/tensorboard`.

    A resumed stage logs some steps again; the later line counts. Quiet processes (all but the first) write nothing.
    """

    def __init__(self, out: Path, stage: str, first: int, total: int, quiet: bool = False) -> None:
        self.stage, self.first, self.total, self.quiet = stage, first, total, quiet
        self._log = out / f"{stage}.log.jsonl"
        self._started = time.monotonic()
        self._board = None
        if not quiet:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to import

            self._board = SummaryWriter(str(out / "tensorboard" / stage), purge_step=first or None)

    def report(self, step: int, values: Mapping[str, float], group: str = "train") -> None:
        """One line: step, rate, time left, values."""
        if self.quiet or self._board is None:
            return
        rate = (step - self.first) / max(1e-9, time.monotonic() - self._started)
        left = (self.total - step) / max(rate, 1e-9)
        text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        what = "" if group == "train" else f"  {group}"
        print(f"{self.stage} {step}/{self.total}  {rate:.2f} steps/s  {_time(left)} left{what}  {text}", flush=True)
        record = {"step": step, "group": group, "steps_per_s": round(rate, 4)}
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        with self._log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        for key, value in values.items():
            self._board.add_scalar(f"{group}/{key}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
