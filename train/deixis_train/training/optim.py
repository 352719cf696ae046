"""Which parameters learn, and how fast (section 13)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.t5 import LoraLinear

SEMANTIC = "semantic_encoder"


def learning_rate(step: int, total: int, base: float, warmup: int) -> float:
    """base * min(1, step / warmup) * (1 + cos(pi * step / total)) / 2, steps counted from 0."""
    return base * (min(1.0, step / warmup) if warmup else 1.0) * 0.5 * (1 + math.cos(math.pi * step / total))


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Factor on the rate of a parameter of the semantic encoder with `depth` blocks, by its name within the encoder.

    Block b, from 0: decay ** (depth - b). The patch embedding and the positions come before all blocks; the class
    token and the last norm are not slowed down.
    """
    if block := re.match(r"blocks\.(\d+)\.", name):
        return decay ** (depth - int(block[1]))
    return decay ** (depth + 1) if name.startswith(("patch_embed.", "pos_embed")) else 1.0


def part_parameters(model: PixelLLM, part: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a part by their names in the model; "lora" means the LoRA factors of the text model.

    Raises:
        ValueError: the model has no such part.
    """
    if part == "lora":
        found = False
        lora = {n for n, m in model.text.named_modules() if isinstance(m, LoraLinear)}
        for name, parameter in model.text.named_parameters():
            if name.rpartition(".")[0] in lora and not name.endswith(".weight"):
                found = True
                yield f"text.{name}", parameter
        if not found:
            raise ValueError("the recipe trains lora, but the text model has no LoRA: set model.lora_rank")
        return
    module = getattr(model, part, None)
    if not isinstance(module, nn.Module):
        raise ValueError(f"the recipe trains {part}, which the model {model.config.name!r} does not have")
    yield from ((f"{part}.{name}", parameter) for name, parameter in module.named_parameters())


def choose_trained(model: PixelLLM, parts: Sequence[str], *, fixed: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Freeze everything, then let `parts` learn but for names that begin with one of `fixed`. Returns what learns."""
    model.requires_grad_(False)
    trained: dict[str, nn.Parameter] = {}
    for part in parts:
        for name, parameter in part_parameters(model, part):
            if not name.startswith(tuple(fixed)):
                parameter.requires_grad_(True)
                trained[name] = parameter
    return trained


def training_modes(model: PixelLLM, parts: Sequence[str], *, dropout: bool, frozen_too: bool) -> None:
    """Training mode, in which dropout and drop-path act, for the parts that learn; for all of them with `frozen_too`.

    Without `dropout` everything is in evaluation mode.
    """
    model.train(dropout and frozen_too)
    if dropout:
        for part in parts:
            module = model.text if part == "lora" else getattr(model, part)
            module.train()


def make_optimizer(
    model: PixelLLM,
    trained: Mapping[str, nn.Parameter],
    helpers: nn.Module,
    *,
    weight_decay: float,
    layer_decay: float = 0.0,
    paces: Mapping[str, float] | None = None,
) -> torch.optim.AdamW:
    """AdamW with one group per pace; weight decay leaves one-dimensional parameters alone.

    Each group's "pace" multiplies the stage's learning rate (`set_rate`).
    """
    depth = len(model.semantic_encoder.blocks)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    everything = [*trained.items(), *(("helpers." + n, p) for n, p in helpers.named_parameters() if p.requires_grad)]
    for name, parameter in everything:
        part, _, inner = name.partition(".")
        pace = (paces or {}).get(part, 1.0)
        if layer_decay and part == SEMANTIC:
            pace *= layer_factor(inner, depth, layer_decay)
        groups.setdefault((pace, weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": members, "pace": pace, "weight_decay": decay} for (pace, decay), members in groups.items()],
        lr=0.0,
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["pace"]
