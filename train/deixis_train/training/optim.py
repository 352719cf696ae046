"""Which parameters learn, and how fast (section 13)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from deixis_train.models.layers import LoraLinear

SEMANTIC = "semantic_encoder"


def learning_rate(
    step: int, total: int, base: float, warmup: int, schedule: Literal["cosine", "linear"] = "cosine"
) -> float:
    """The rate of a step, counted from 0.

    "cosine": base * min(1, step / warmup) * (1 + cos(pi * step / total)) / 2. "linear": up to the base in `warmup`
    steps, then down to 0 at `total` (GLaMM section 9.4).
    """
    if schedule == "linear":
        return base * (step / warmup if step < warmup else (total - step) / max(1, total - warmup))
    return base * (min(1.0, step / warmup) if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * step / total))


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Factor on the rate of a parameter of the semantic encoder with `depth` blocks, by its name within the encoder.

    Block b, from 0: decay ** (depth - b). The patch embedding and the positions come before all blocks; the class
    token and the last norm are not slowed down.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return decay ** (depth - int(block[1]))
    return decay ** (depth + 1) if name.startswith(("patch_embed.", "pos_embed")) else 1.0


def part_parameters(model: nn.Module, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a part by their names in the model; "lora" means the LoRA factors of the text model.

    Raises:
        ValueError: the model has no such part.
    """
    module, prefix = _module_of(model, part)
    if part != "lora":
        yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())
        return
    lora = {name for name, inner in module.named_modules() if isinstance(inner, LoraLinear)}
    if not lora:
        raise ValueError("the recipe trains lora, but the text model has no LoRA: set model.lora_rank")
    for name, parameter in module.named_parameters():
        if name.rpartition(".")[0] in lora and not name.endswith(".weight"):
            yield f"{prefix}.{name}", parameter


def _module_of(model: nn.Module, part: str) -> tuple[nn.Module, str]:
    """The module of a part, for "lora" the text model, and its name in the model. Raises ValueError."""
    text = "llama" if hasattr(model, "llama") else "text"
    name = {"lora": text, "embed_tokens": f"{text}.embed_tokens", "lm_head": f"{text}.lm_head"}.get(part, part)
    module: object = model
    for step in name.split("."):
        module = getattr(module, step, None)
    if not isinstance(module, nn.Module):
        config: Any = model.config
        raise ValueError(f"the recipe trains {part}, which the model {config.name!r} does not have")
    return module, name


def choose_trained(model: nn.Module, parts: Sequence[str], *, fixed: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Freeze everything, then let `parts` learn but for names that begin with one of `fixed`. Returns what learns."""
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for part in parts:
        for name, parameter in part_parameters(model, part):
            if not name.startswith(tuple(fixed)):
                parameter.requires_grad_(True)
                trained[name] = parameter
    return trained


def training_modes(model: nn.Module, parts: Sequence[str], *, dropout: bool, frozen_too: bool) -> None:
    """Training mode, in which dropout and drop-path act, for the parts that learn; for all of them with `frozen_too`.

    Without `dropout` everything is in evaluation mode.
    """
    model.train(dropout and frozen_too)
    if dropout:
        for part in parts:
            _module_of(model, part)[0].train()


def make_optimizer(
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    helpers: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 0.0,
    paces: Mapping[str, float] | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """AdamW with one group per pace; weight decay leaves one-dimensional parameters alone.

    Each group's "pace" multiplies the stage's learning rate (`set_rate`).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    everything = [*trained.items(), *(("helpers." + n, p) for n, p in helpers.named_parameters() if p.requires_grad)]
    for name, parameter in everything:
        part, _, inner = name.partition(".")
        pace = (paces or {}).get(part, 1.0)
        if layer_decay and part == SEMANTIC:
            blocks = model.get_submodule(f"{SEMANTIC}.blocks")
            pace *= layer_factor(inner, sum(1 for _ in blocks.children()), layer_decay)
        groups.setdefault((pace, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "pace": pace, "weight_decay": decay} for (pace, decay), members in groups.items()],
        lr=0.0,
        betas=betas,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["pace"]
