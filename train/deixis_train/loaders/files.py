"""Reading named tensors out of published checkpoint files, without ever running code from them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deixis_train.loaders.report import CheckpointError

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"
PYTORCH_INDEX = "pytorch_model.bin.index.json"
PYTORCH_SINGLE = "pytorch_model.bin"


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Open a `.safetensors` file, a flat PyTorch state dict, the index of a sharded model, or a directory of either.

    A directory may hold both kinds; safetensors are taken then.

    Raises:
        CheckpointError: absent, truncated, or something else than named tensors.
    """
    path = Path(path)
    if path.is_dir():
        names = (SAFETENSORS_INDEX, SAFETENSORS_SINGLE, PYTORCH_INDEX, PYTORCH_SINGLE)
        inside = [path / name for name in names if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path}: holds neither {' nor '.join(names)}")
        path = inside[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".json":
        shards = _read_index(path)
        return _read_state_dicts(shards) if ".bin." in path.name else SafetensorsFiles(shards)
    if path.suffix == ".safetensors":
        return SafetensorsFiles({path: None})
    return _read_state_dict(path)


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, read from disk when asked for.

    Args:
        files: path -> the names promised to be in it, or None to take what is there.
    """

    def __init__(self, files: Mapping[Path, Sequence[str] | None]) -> None:
        self._where: dict[str, Path] = {}
        self._open = {}
        for path, promised in files.items():
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path}: no such file") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path}: not a whole safetensors file: {error}") from None
            names = set(self._open[path].keys())
            absent = sorted(set(promised or ()) - names)
            if absent:
                raise CheckpointError(f"{path}: lacks {absent[0]}, which the index places there")
            self._where.update(dict.fromkeys(names, path))

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self._where[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object beside published weights. Raises CheckpointError when absent or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return values


def _read_index(index: Path) -> dict[Path, list[str]]:
    """Shard -> the names that the index of a sharded model places there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: not the index of a sharded model")
    shards: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
        shards.setdefault(index.parent / file, []).append(name)
    return shards


def _read_state_dicts(shards: Mapping[Path, list[str]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path, promised in shards.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file")
        found = _read_state_dict(path)
        if absent := sorted(set(promised) - set(found)):
            raise CheckpointError(f"{path}: lacks {absent[0]}, which the index places there")
        tensors |= found
    return tensors


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped where the format allows it: of a large model only what is used comes into memory.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: not a PyTorch file of plain tensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: not a flat state dict of tensors")
    return loaded
