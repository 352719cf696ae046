"""Bookkeeping that the training stages share: resumable state, learning rate, progress lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn


def cosine(step: int, total: int, base: float, warmup: int) -> float:
    """base * min(1, step / warmup) * (1 + cos(pi * step / total)) / 2, as in section 13."""
    return base * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / total))


class Stage:
    """State of one stage on disk: modules, optimizer and step, written under a temporary name, then renamed."""

    def __init__(self, out: Path, name: str, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.path, self.log_path = out / f"{name}.pt", out / f"{name}.log.jsonl"
        self.name, self.modules, self.optimizer = name, modules, optimizer
        self.step = 0
        self._started, self._start_step = time.monotonic(), 0

    def resume(self) -> int:
        """Load the last saved state, if any, and return the step to go on from."""
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        self._started, self._start_step = time.monotonic(), self.step
        return self.step

    def save(self, step: int) -> None:
        modules = {name: module.state_dict() for name, module in self.modules.items()}
        temporary = self.path.with_suffix(".tmp")
        torch.save({"modules": modules, "optimizer": self.optimizer.state_dict(), "step": step}, temporary)
        temporary.replace(self.path)

    def report(self, step: int, total: int, values: dict[str, Any]) -> None:
        """One progress line: step, rate, time left, values. The same goes to `<stage>.log.jsonl`."""
        rate = (step - self._start_step) / max(1e-9, time.monotonic() - self._started)
        left_min = (total - step) / max(rate, 1e-9) / 60
        text = "  ".join(f"{key} {value:.4f}" for key, value in values.items())
        print(f"{self.name} {step}/{total}  {rate:.2f} steps/s  {left_min:.1f} min left  {text}", flush=True)
        with self.log_path.open("a", encoding="utf-8") as log:
            log.write(json.dumps({"step": step, **values}) + "\n")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["pace"]


def adamw(modules: list[nn.Module], weight_decay: float, slow: Iterable[nn.Module] = ()) -> torch.optim.AdamW:
    """AdamW whose decay leaves one-dimensional parameters alone (section 13).

    `slow` modules learn at a fifth of the rate.
    """
    groups = []
    for part, pace in ((modules, 1.0), (slow, 0.2)):
        parameters = [p for module in part for p in module.parameters() if p.requires_grad]
        groups.append({"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "pace": pace})
        groups.append({"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "pace": pace})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0)
