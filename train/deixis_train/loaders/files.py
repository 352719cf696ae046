"""Reading named tensors out of published checkpoint files, without ever running code from them."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deixis_train.loaders.report import CheckpointError

SAFETENSORS_INDEX = "model.safetensors.index.json"
SAFETENSORS_SINGLE = "model.safetensors"


def read_tensors(path: Path) -> Mapping[str, Tensor]:
    """Open a `.safetensors` file, a sharded model's index, a directory holding either, or a flat PyTorch state dict.

    Raises:
        CheckpointError: absent, truncated, or something else than named tensors.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / name for name in (SAFETENSORS_INDEX, SAFETENSORS_SINGLE) if (path / name).is_file()]
        if not inside:
            raise CheckpointError(f"{path}: holds neither {SAFETENSORS_SINGLE} nor {SAFETENSORS_INDEX}")
        path = inside[0]
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".json":
        return _open_shards(path)
    if path.suffix == ".safetensors":
        return SafetensorsFiles({path: None})
    return _read_state_dict(path)


class SafetensorsFiles(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, read from disk when asked for.

    Args:
        files: path -> the names promised to be in it, or None to take what is there.
    """

    def __init__(self, files: Mapping[Path, list[str] | None]) -> None:
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


def _open_shards(index: Path) -> SafetensorsFiles:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, list[str] | None] = {}
        for name, file in weight_map.items():
            if Path(file).name != file:
                raise CheckpointError(f"{index}: shard {file!r} is not a plain file name")
            names = shards.setdefault(index.parent / file, [])
            assert names is not None
            names.append(name)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{index}: not the index of a sharded safetensors model") from None
    return SafetensorsFiles(shards)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path}: not a PyTorch file of plain tensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged, or not a PyTorch file: {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path}: not a flat state dict of tensors")
    return loaded
