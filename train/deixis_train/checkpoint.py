"""Our own checkpoint of either family: a directory of `config.json`, `model.safetensors` and `tokenizer.json`.

Parts that were never trained (SAM's encoder, say) may be left out. The configuration then records the file that they
come from, and loading takes them from that file: a published checkpoint, or a safetensors file with our own names.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from deixis.bundle import sha256_of
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.loaders.real_weights import default_cache
from deixis_train.loaders.report import CheckpointError
from deixis_train.loaders.sam import load_sam
from deixis_train.models.config import PixelLLMConfig, SamVitConfig
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.sam_vit import SamVit
from deixis_train.models.tiny_vit import TinyVit

FORMAT = "deixis-checkpoint"
VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
DOCUMENTS = ("MODEL_CARD.md", "NOTICE")
SAM_PARTS = ("sam_encoder", "prompt_encoder", "mask_decoder")

Dtype = Literal["fp32", "fp16"]
Family = Literal["pixelllm", "glamm"]


@dataclass(frozen=True)
class FrozenSource:
    """The file that the omitted parts come from."""

    file: str
    sha256: str
    bytes: int


@dataclass
class Checkpoint:
    """A loaded checkpoint. `model` is in evaluation mode and float32.

    tasks: overrides of the bundle's task table, by task name and field. documents: text of the model card and the
    notice. `pixelllm` and `glamm` are the model where one family is needed; the other raises CheckpointError.
    """

    model: PixelLLM | Glamm
    tokenizer_json: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    documents: dict[str, str] = field(default_factory=dict)
    source: str = ""  # directory name and sha256 of the weights
    frozen: FrozenSource | None = None

    @property
    def config(self) -> PixelLLMConfig | GlammConfig:
        return self.model.config

    @property
    def family(self) -> Family:
        return family_of(self.model)

    @property
    def pixelllm(self) -> PixelLLM:
        if isinstance(self.model, PixelLLM):
            return self.model
        raise CheckpointError(f"{self.source or 'checkpoint'}: of the family {self.family}; this needs a pixelllm")

    @property
    def glamm(self) -> Glamm:
        if isinstance(self.model, Glamm):
            return self.model
        raise CheckpointError(f"{self.source or 'checkpoint'}: of the family {self.family}; this needs a glamm")


def family_of(model: PixelLLM | Glamm) -> Family:
    """The name that `config.json` and the manifest of a bundle give the model's kind."""
    return "glamm" if isinstance(model, Glamm) else "pixelllm"


def save_checkpoint(
    directory: str | os.PathLike[str],
    model: PixelLLM | Glamm,
    tokenizer_json: str,
    tasks: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    dtype: Dtype = "fp16",
    omit: Sequence[str] = (),
    frozen_from: str | os.PathLike[str] | None = None,
    documents: Mapping[str, str] | None = None,
) -> None:
    """Write a checkpoint; an existing one is replaced at once or stays as it was.

    Args:
        directory: where to.
        model: its parameters and buffers; matrices are stored in `dtype`, everything else in float32.
        tokenizer_json: text of the tokenizer file.
        tasks: overrides of the task table, e.g. {"caption": {"instruction": "describe"}}.
        omit: parts to leave out, by the model's attribute names, e.g. `SAM_PARTS`.
        frozen_from: the file that holds the omitted parts; its name, size and sha256 are recorded.
        documents: MODEL_CARD.md and NOTICE by name; those already in the directory are kept.

    Raises:
        ValueError: unknown parts in `omit`, or parts omitted without `frozen_from`.
        FileExistsError: the directory holds something that is no checkpoint.
        OverflowError: a weight that fp16 cannot hold.
    """
    unknown = [part for part in omit if getattr(model, part, None) is None]
    if unknown:
        raise ValueError(f"cannot omit {', '.join(unknown)}: the model has no such part")
    if omit and frozen_from is None:
        raise ValueError("name the file that holds the omitted parts (frozen_from)")
    target = Path(directory)
    texts = {name: (target / name).read_text(encoding="utf-8") for name in DOCUMENTS if (target / name).is_file()}
    texts |= dict(documents or {})
    prefixes = tuple(f"{part}." for part in omit)
    tensors = {
        name: _stored(name, value, dtype)
        for name, value in model.state_dict().items()
        if not name.startswith(prefixes or ("\0",))
    }
    values: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "family": family_of(model),
        "dtype": dtype,
        "model": model.config.to_dict(),
        "tokenizer": TOKENIZER,
        "tasks": {name: dict(fields) for name, fields in (tasks or {}).items()},
    }
    if omit:
        source = Path(os.fspath(frozen_from))  # type: ignore[arg-type]
        values["omitted"] = {
            "parts": list(omit),
            "file": source.name,
            "sha256": _sha256(source),
            "bytes": source.stat().st_size,
        }
    with _replacing(target) as work:
        save_file(tensors, work / WEIGHTS, metadata={"format": "pt"})
        (work / TOKENIZER).write_text(tokenizer_json, encoding="utf-8")
        for name, text in texts.items():
            (work / name).write_text(text, encoding="utf-8")
        text = json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False)
        (work / CONFIG).write_text(text + "\n", encoding="utf-8")


def load_checkpoint(directory: str | os.PathLike[str], frozen_from: str | os.PathLike[str] | None = None) -> Checkpoint:
    """Read a checkpoint and build its model.

    Args:
        directory: of `save_checkpoint`.
        frozen_from: file with the parts that the checkpoint leaves out: the published file itself, or a `.safetensors`
            file with our names. None looks for the published file by its recorded name beside the checkpoint and in
            the cache directory ($DEIXIS_CACHE or ~/.cache/deixis).

    Raises:
        CheckpointError: one line saying which file is absent, damaged, foreign or does not fit, and what to do.
    """
    root = Path(directory)
    values = _read_config(root)
    try:
        model = _build(values)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{root / CONFIG}: not a configuration that this version builds: {error}") from None
    omitted = values.get("omitted") or {}
    parts = tuple(omitted.get("parts", ()))
    left_out = tuple(f"{part}." for part in parts)
    _fill(model, root / WEIGHTS, lambda name: not name.startswith(left_out), whole=True)
    source = None
    if parts:
        source = FrozenSource(str(omitted["file"]), str(omitted["sha256"]), int(omitted["bytes"]))
        _fill_frozen(model, parts, root, source, Path(frozen_from) if frozen_from is not None else None)
    tokenizer = root / str(values.get("tokenizer", TOKENIZER))
    if not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}: no such file; a checkpoint needs its tokenizer")
    documents = {name: (root / name).read_text(encoding="utf-8") for name in DOCUMENTS if (root / name).is_file()}
    return Checkpoint(
        model.eval(),
        tokenizer.read_text(encoding="utf-8"),
        dict(values.get("tasks", {})),
        documents,
        f"{root.resolve().name} (sha256 {_sha256(root / WEIGHTS)})",
        source,
    )


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` to fill; it takes that name when the block ends well.

    Raises FileExistsError when `target` holds something that is no checkpoint.
    """
    if target.exists() and not (target / CONFIG).is_file() and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not a checkpoint, so it is not replaced; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        for path in work.iterdir():
            path.chmod(0o644)  # safetensors writes private files
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            target.replace(old / target.name)
            work.replace(target)
            shutil.rmtree(old)
        else:
            work.replace(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _stored(name: str, value: Tensor, dtype: Dtype) -> Tensor:
    value = value.detach().cpu().contiguous()
    if dtype == "fp32" or not value.is_floating_point() or value.ndim < 2:
        return value.float() if value.is_floating_point() else value
    half = value.half()
    if not torch.isfinite(half).all():
        raise OverflowError(f"{name} has values that fp16 cannot hold; save the checkpoint with dtype='fp32'")
    return half


def _read_config(root: Path) -> dict[str, Any]:
    path = root / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{root}: no {CONFIG}, so this is not a checkpoint; give the folder that holds it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a deixis checkpoint (no format {FORMAT!r})")
    if values.get("version") != VERSION:
        raise CheckpointError(f"{path}: version {values.get('version')!r} is not {VERSION}; upgrade deixis")
    return values


def _build(values: dict[str, Any]) -> PixelLLM | Glamm:
    family = values.get("family", "pixelllm")  # checkpoints made before there were families do not say
    if family == "pixelllm":
        return PixelLLM(PixelLLMConfig.from_dict(values["model"]))
    if family == "glamm":
        return Glamm(GlammConfig.from_dict(values["model"]))
    raise ValueError(f"there is no family {family!r}")


@torch.no_grad()
def _fill(model: nn.Module, path: Path, wanted: Callable[[str], bool], *, whole: bool) -> None:
    """Copy the tensors whose names are `wanted` from a safetensors file with our names; all of them must be there.

    With `whole` the file may hold nothing else.
    """
    own = {name: value for name, value in model.state_dict(keep_vars=True).items() if wanted(name)}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            _require(not (missing := sorted(set(own) - names)), path, "lacks", missing)
            extra = sorted(names - set(own)) if whole else []
            _require(not extra, path, "holds names the model has not:", extra)
            for name, receiver in own.items():
                value = file.get_tensor(name)
                found, needed = tuple(value.shape), tuple(receiver.shape)
                _require(found == needed, path, f"has {found} where the model has {needed}:", [name])
                receiver.copy_(value)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; the checkpoint is not complete") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors file ({error}); copy it again") from None


def _require(good: bool, path: Path, text: str, names: list[str]) -> None:
    if not good:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise CheckpointError(f"{path}: {text} {names[0]}{more}")


def _fill_frozen(
    model: PixelLLM | Glamm, parts: tuple[str, ...], root: Path, source: FrozenSource, given: Path | None
) -> None:
    unknown = [part for part in parts if getattr(model, part, None) is None]
    if unknown:
        raise CheckpointError(f"{root / CONFIG}: omits {unknown[0]}, which the model does not have")
    cache = default_cache()
    places = [given] if given is not None else [root / source.file, cache / source.file]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{root}: takes {', '.join(parts)} from {source.file} (sha256 {source.sha256[:16]}...), which is not at "
            f"{' or '.join(str(p) for p in places)}; `make real-weights` fetches it, or name the file with --frozen"
        )
    if found.suffix == ".safetensors":
        prefixes = tuple(f"{part}." for part in parts)
        _fill(model, found, lambda name: name.startswith(prefixes), whole=False)
        return
    if found.stat().st_size != source.bytes or _sha256(found) != source.sha256:
        raise CheckpointError(
            f"{found}: not the file that the checkpoint was made with (sha256 {source.sha256[:16]}...)"
        )
    wanted: dict[str, Any] = {part: getattr(model, part) for part in parts}
    if not set(parts) <= set(SAM_PARTS):
        raise CheckpointError(f"{root}: {found.name} can only fill {', '.join(SAM_PARTS)}")
    load = load_sam if isinstance(model.config.sam, SamVitConfig) else load_mobile_sam
    encoder = wanted.get("sam_encoder")
    assert encoder is None or isinstance(encoder, SamVit | TinyVit)
    prompt_encoder, mask_decoder = wanted.get("prompt_encoder"), wanted.get("mask_decoder")
    report = load(found, encoder, prompt_encoder, mask_decoder)  # type: ignore[arg-type]
    report.raise_if_incomplete(found)


def _sha256(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
