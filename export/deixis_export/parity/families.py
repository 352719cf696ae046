"""The model families whose golden directories can be compared: what tells them apart, and their cases."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deixis_export.parity import context as pixelllm
from deixis_export.parity import registry
from deixis_export.parity.backend import Backend
from deixis_export.parity.backend_torch import TorchBackend
from deixis_export.parity.base_context import BadDirectory, BaseContext
from deixis_export.parity.glamm import backend as glamm_backend
from deixis_export.parity.glamm import context as glamm
from deixis_export.parity.glamm import registry as glamm_registry
from deixis_export.parity.report import GoldenFile, Report
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM

Case = Callable[[Any, GoldenFile, Report], None]


@dataclass(frozen=True)
class Family:
    """What makes a family.

    sizes: the file whose presence says that a directory is of this family. params: the file of parameters. endings: of
    files that hold arrays. not_covered: patterns of files without a counterpart. open: from a directory and what to
    check through (torch or onnx) to the context of the cases; raises BadDirectory, or CheckpointError if the parameters
    do not fill the model of its sizes.
    """

    sizes: str
    params: str
    endings: tuple[str, ...]
    cases: Mapping[str, Case]
    not_covered: tuple[str, ...]
    open: Callable[[Path, str], contextlib.AbstractContextManager[BaseContext[Any, Any]]]

    def files(self, directory: Path) -> list[str]:
        """Names of the files of a directory that hold arrays."""
        found = (path.name for path in directory.iterdir() if path.suffix in self.endings)
        return sorted(name for name in found if name != self.sizes)


@contextlib.contextmanager
def _open_pixelllm(directory: Path, through: str) -> Iterator[pixelllm.Context]:
    config, values = pixelllm.read_config(directory)
    model = pixelllm.load_model(directory, config)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(_pixelllm_backend(through, model)) if model is not None else None
        yield pixelllm.Context(directory, values, backend, partial(_pixelllm_backend, through))


def _pixelllm_backend(through: str, model: PixelLLM) -> contextlib.AbstractContextManager[Backend]:
    if through == "torch":
        return contextlib.nullcontext(TorchBackend(model))
    from deixis_export.parity import backend_onnx

    return backend_onnx.open_backend(model)


@contextlib.contextmanager
def _open_glamm(directory: Path, through: str) -> Iterator[glamm.GlammContext]:
    manifest = glamm.read_manifest(directory)
    model = glamm.load_model(directory, manifest)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(_glamm_backend(through, model)) if model is not None else None
        yield glamm.GlammContext(directory, manifest, backend)


def _glamm_backend(through: str, model: Glamm) -> contextlib.AbstractContextManager[glamm_backend.GlammBackend]:
    if through == "torch":
        return contextlib.nullcontext(glamm_backend.TorchGlamm(model))
    from deixis_export.parity.glamm import backend_onnx

    return backend_onnx.open_backend(model)


FAMILIES: tuple[Family, ...] = (
    Family(
        sizes=pixelllm.CONFIG,
        params=pixelllm.PARAMS,
        endings=(".npz",),
        cases=registry.CASES,
        not_covered=registry.NOT_COVERED,
        open=_open_pixelllm,
    ),
    Family(
        sizes=glamm.MANIFEST,
        params=glamm.PARAMS,
        endings=(".npz", ".json"),
        cases=glamm_registry.CASES,
        not_covered=glamm_registry.NOT_COVERED,
        open=_open_glamm,
    ),
)


def family_of(directory: Path) -> Family:
    """The family of a golden directory. Raises BadDirectory."""
    if not directory.is_dir():
        raise BadDirectory(
            f"{directory}: no such directory; give one with golden vectors (config.json, params.npz, ... or "
            "manifest.json, state_dict.npz, ...)"
        )
    found = [family for family in FAMILIES if (directory / family.sizes).is_file()]
    if len(found) != 1:
        names = " nor ".join(family.sizes for family in FAMILIES) if not found else " and ".join(f.sizes for f in found)
        has = f"neither {names}" if not found else f"both {names}"
        raise BadDirectory(f"{directory}: has {has}; a directory of golden vectors has one of them")
    return found[0]
