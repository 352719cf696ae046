"""Models without memory: sizes and structure of any model, however large, to trace graphs from.

Every parameter of a shell is one number in every place, a tensor whose strides are all zero. `without_arithmetic`
makes whatever is computed from such tensors one of them again, of the right shape. So tracing a model costs neither
the memory of its weights nor the time of a forward pass. Positions, indices and lengths are computed as ever, for they
decide what is traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

M = TypeVar("M", bound=nn.Module)

_SMALL = 1 << 10  # values; what is smaller may as well be real while a model is built


def blank(shape: tuple[int, ...], value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of any shape in the memory of a single value."""
    # Not `expand`: a view of another tensor could not be returned from a dispatch mode.
    tensor = torch.empty_strided(shape, (0,) * len(shape), dtype=dtype)
    if not tensor.numel():
        return tensor
    tensor.as_strided((1,), (1,)).fill_(value)
    return tensor


def is_blank(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > 1 and not any(x.stride())


class _Building(TorchFunctionMode):
    """Large tensors are created blank, and what would fill them in place does nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            shape = tuple(args) if args and isinstance(args[0], int) else tuple(args[0] if args else kwargs["size"])
            if math.prod(shape) > _SMALL:
                return blank(shape)
        name = getattr(func, "__name__", "")
        target = args[0] if args else kwargs.get("tensor")
        if func is torch.empty_like and is_blank(target):
            return blank(tuple(target.shape))
        if name in ("lt", "gt", "__lt__", "__gt__") and is_blank(target):
            return torch.tensor(False)  # a truncated normal looks for what it has to draw again
        if name.endswith("_") and not name.endswith("__") and is_blank(target):
            return target
        return func(*args, **kwargs)


def shell(build: Callable[[], M]) -> M:
    """Build a model in evaluation mode without memory for its parameters; buffers are real.

    Parameters get values that differ from each other: the exporter makes one of equal ones.
    """
    with _Building():
        model = build().eval()
    blanks: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in blanks:
                value = (len(blanks) + 1) * 2.0**-20
                blanks[id(parameter)] = nn.Parameter(blank(tuple(parameter.shape), value), requires_grad=False)
            setattr(module, name, blanks[id(parameter)])
    return model


class _RecordedConvolutions(TorchFunctionMode):
    """Lets the tracer record convolutions, which it does too far down, below where `_NoArithmetic` takes over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and not kwargs:
            x, weight, bias, stride, padding, dilation, groups = args
            transposed, output_padding = False, (0, 0)
        elif func is torch.conv_transpose2d and not kwargs:
            x, weight, bias, stride, padding, output_padding, groups, dilation = args
            transposed = True
        else:
            return func(*args, **(kwargs or {}))
        flags = (False, False, False, False)  # of the device that computes
        return torch._convolution(  # pyright: ignore[reportPrivateImportUsage]
            x, weight, bias, stride, padding, dilation, transposed, output_padding, groups, *flags
        )


class _NoArithmetic(TorchDispatchMode):
    """Within this context manager, operations on blank tensors give blank tensors of the right shape."""

    def __init__(self, aside: ThreadPoolExecutor) -> None:
        super().__init__()
        # While a graph is traced, asking a tensor for its shape is recorded too. The tracer's state belongs to a
        # thread, so shapes are looked at in another one.
        self._aside = aside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not func.is_view:
            found = self._aside.submit(_blank_result, func, args, kwargs).result()
            if found is not None:
                return args[0] if func._schema.is_mutable else found[0]
        return func(*args, **kwargs)


def without_arithmetic(module: M) -> M:
    """Let a module's forward pass run without arithmetic on blank tensors.

    Only the forward pass, for the exporter looks at numbers afterwards.
    """
    forward = module.forward

    def quiet(*inputs: Tensor) -> Any:
        aside = ThreadPoolExecutor(1, initializer=lambda: torch.set_grad_enabled(False))
        with aside, _RecordedConvolutions(), _NoArithmetic(aside):
            return forward(*inputs)

    module.forward = quiet
    return module


def _blank_result(func: Any, args: Any, kwargs: Any) -> tuple[Any] | None:
    """The result of an operation on blank tensors; None when none of its arguments is blank."""
    if not any(is_blank(x) for x in tree_flatten((args, kwargs))[0]):
        return None
    args, kwargs = tree_map_only(
        Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), (args, dict(kwargs))
    )
    if "device" in kwargs:
        kwargs["device"] = torch.device("meta")
    return (tree_map_only(Tensor, lambda x: blank(tuple(x.shape), dtype=x.dtype), func(*args, **kwargs)),)
