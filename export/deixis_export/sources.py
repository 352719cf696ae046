"""Where the weights of a model come from when they are not all in memory: one at a time, by the parameter's name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deixis.errors import ExportError
from deixis_export.shells import blank
from deixis_export.weights import stored_low
from deixis_train.loaders.glamm_names import glamm_names
from deixis_train.models.glamm.glamm import Glamm

# The value of a parameter or persistent buffer, float32, by its name in the model's state.
WeightSource = Callable[[str], Tensor]


def from_module(model: nn.Module) -> WeightSource:
    """The weights of a model that is in memory."""
    state = model.state_dict()
    return lambda name: state[name].detach().float()


def published(shell: Glamm, tensors: Mapping[str, Tensor], clip: Mapping[str, Tensor] | None = None) -> WeightSource:
    """The weights of a published checkpoint, read from its files when they are asked for.

    Args:
        shell: a shell of the checkpoint's sizes.
        tensors: by published name, LoRA merged (`loaders.glamm.merged` of `loaders.files.read_tensors`).
        clip: OpenAI's CLIP by Hugging Face's names, for checkpoints that leave it out.

    Raises:
        ExportError: a tensor is missing. When one is asked for: it has another shape than the model's.
    """
    shapes = {name: tuple(value.shape) for name, value in shell.state_dict().items()}
    files = dict.fromkeys(shapes, tensors)
    names = glamm_names(shell)
    if clip is not None:
        own = [name for name in shapes if name.startswith("clip.")]
        names |= {name: f"vision_model.{name.removeprefix('clip.')}" for name in own}
        files |= dict.fromkeys(own, clip)
    missing = [theirs for ours, theirs in names.items() if theirs not in files[ours]]
    if missing:
        raise ExportError(f"the checkpoint lacks {missing[0]} and {len(missing) - 1} other weights of {len(names)}")

    def fetch(name: str) -> Tensor:
        value = files[name][names[name]]
        if tuple(value.shape) != shapes[name]:
            raise ExportError(f"{names[name]} is {tuple(value.shape)} in the checkpoint, {shapes[name]} in the model")
        return value.float()

    return fetch


def random_weights(shell: nn.Module, seed: int) -> WeightSource:
    """Random weights for the sizes of a shell; the same name and seed give the same values, in any order.

    Matrices keep the scale of what they are multiplied with, norms are near 1, biases near 0.
    """
    shapes = {name: tuple(value.shape) for name, value in shell.state_dict().items()}

    def make(name: str) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        shape = shapes[name]
        value = torch.empty(shape).normal_(generator=generator)
        if len(shape) >= 2:
            return value.mul_(max(1, value[0].numel()) ** -0.5)
        return value.mul_(0.05) + (1.0 if name.endswith("weight") else 0.0)

    return make


def rounded(source: WeightSource) -> WeightSource:
    """The same weights as fp16 holds them, where they are stored in fp16.

    Raises ExportError for a parameter beyond fp16's range.
    """

    def make(name: str) -> Tensor:
        value = source(name)
        if not stored_low(tuple(value.shape), value.numel() * 4):
            return value
        value = value.half()
        if not torch.isfinite(value).all():
            raise ExportError(f"parameter {name} has values that fp16 cannot hold; export it with --precision fp32")
        return value.float()

    return make


def fill(shell: nn.Module, part: str, source: WeightSource) -> None:
    """Give a part of a shell its weights, parameters and persistent buffers, to keep."""
    part_module = shell.get_submodule(part)
    for name, module in part_module.named_modules(prefix=part):
        for key in list(module._parameters):
            if module._parameters[key] is not None:
                setattr(module, key, nn.Parameter(source(f"{name}.{key}"), requires_grad=False))
        for key, buffer in module._buffers.items():
            if buffer is not None and key not in module._non_persistent_buffers_set:
                setattr(module, key, source(f"{name}.{key}").to(buffer.dtype))


@contextmanager
def lent(shell: nn.Module, part: str, source: WeightSource) -> Iterator[None]:
    """Within the block, every module below `part` has its weights while it runs, and not longer.

    For parts whose parameters are used by the module that holds them only, as LLaMA's are (`keep` tied tables by
    `fill`).
    """
    handles: list[Any] = []
    for name, module in shell.get_submodule(part).named_modules(prefix=part):
        if next(module.parameters(recurse=False), None) is None:
            continue

        def take(module: nn.Module, _: Any, name: str = name) -> None:
            for key in list(module._parameters):
                if module._parameters[key] is not None:
                    setattr(module, key, nn.Parameter(source(f"{name}.{key}"), requires_grad=False))

        def give_back(module: nn.Module, _: Any, __: Any) -> None:
            for key, value in list(module._parameters.items()):
                if value is not None:
                    setattr(module, key, nn.Parameter(blank(tuple(value.shape)), requires_grad=False))

        handles += [module.register_forward_pre_hook(take), module.register_forward_hook(give_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
