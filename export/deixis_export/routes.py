"""From what a user names to a bundle: our checkpoints, published folders of GLaMM, presets of random weights.

A GLaMM that is larger than memory goes the streamed way, any other model the ordinary one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deixis.bundle import Bundle
from deixis.errors import ExportError
from deixis_export.bundle_parts import ExportOptions
from deixis_export.export import export_bundle
from deixis_export.precision_search import SearchSettings, search_precisions
from deixis_export.presets import random_parts
from deixis_export.presets_glamm import random_glamm_tokenizer
from deixis_export.sentencepiece import tokenizer_json_from_sentencepiece
from deixis_export.sources import published, random_weights
from deixis_export.streamed import export_streamed, is_large
from deixis_train.checkpoint import CONFIG, load_checkpoint
from deixis_train.loaders.files import read_json
from deixis_train.loaders.glamm import MODEL_FILE, load_glamm_folder, open_glamm_folder
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.glamm.config import GLAMM_PRESETS, GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.pixelllm import PixelLLM


def is_published(folder: Path) -> bool:
    """Whether a folder is a published model: it has a SentencePiece file, or Hugging Face's kind of `config.json`."""
    if (folder / MODEL_FILE).is_file():
        return True
    try:
        return "model_type" in read_json(folder / CONFIG)
    except CheckpointError:
        return False  # loading our own format says what is wrong


@dataclass(frozen=True)
class Loaded:
    """A model with what its bundle needs beside it: arguments of `export_bundle`."""

    model: PixelLLM | Glamm
    tokenizer_json: str
    source: str
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    documents: Mapping[str, str] = field(default_factory=dict)


def export_checkpoint(
    folder: Path,
    destination: Path,
    *,
    frozen: Path | None,
    options: ExportOptions,
    force: bool,
    search: SearchSettings | None = None,
) -> Bundle:
    """Export a checkpoint of our own format, with `search` in the precisions that it finds.

    Raises as `load_checkpoint`, `export_bundle` and `search_precisions`.
    """

    def load() -> Loaded:
        found = load_checkpoint(folder, frozen)
        return Loaded(found.model, found.tokenizer_json, found.source, found.tasks, found.documents)

    return _export(load, destination, options, force, search)


def _export(
    load: Callable[[], Loaded],
    destination: Path,
    options: ExportOptions,
    force: bool,
    search: SearchSettings | None,
) -> Bundle:
    evidence = None
    if search is not None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{destination.name}-search-", dir=destination.parent) as folder:
            loaded = load()
            precisions, evidence = search_precisions(
                loaded.model,
                Path(folder),
                tokenizer_json=loaded.tokenizer_json,
                options=options,
                tasks=loaded.tasks,
                settings=search,
            )
            del loaded  # an export changes a model, so the bundle is made of a fresh one
        options = replace(options, precision_of=precisions)
    loaded = load()
    return export_bundle(
        loaded.model,
        destination,
        tokenizer_json=loaded.tokenizer_json,
        options=options,
        tasks=loaded.tasks,
        documents=loaded.documents,
        source=loaded.source,
        force=force,
        evidence=evidence,
    )


def export_published(
    folder: Path,
    destination: Path,
    *,
    clip: Path | None,
    options: ExportOptions,
    force: bool = False,
    base: GlammConfig | None = None,
    search: SearchSettings | None = None,
) -> Bundle:
    """Export a published folder of GLaMM; its tokenizer becomes `tokenizer.json`.

    Args:
        folder, clip, base: as `open_glamm_folder`.
        destination, options, force: as `export_bundle`.
        search: as `export_checkpoint`.

    Raises:
        CheckpointError: files are absent or do not fit the model.
        ValueError: a tokenizer of another kind than LLaMA's.
        ExportError, FileExistsError: as `export_bundle`.
    """
    opened = open_glamm_folder(folder, clip, base)
    tokenizer_json = tokenizer_json_from_sentencepiece(opened.tokenizer.model_file, opened.tokenizer.added)
    source = f"published folder {folder.resolve().name}"
    if clip is not None:
        source += f", CLIP from {clip.resolve().name}"
    if is_large(opened.config):
        _check_not_searched(search)
        return export_streamed(
            opened.config,
            lambda shell: published(shell, opened.tensors, opened.clip),
            destination,
            tokenizer_json=tokenizer_json,
            options=options,
            source=source,
            force=force,
        )

    def load() -> Loaded:
        return Loaded(load_glamm_folder(folder, clip, base).model, tokenizer_json, source)

    return _export(load, destination, options, force, search)


def _check_not_searched(search: SearchSettings | None) -> None:
    if search is not None:
        raise ExportError("a model this large is not searched for precisions; give --precision fp16 or fp32")


def export_random(
    name: str, destination: Path, *, options: ExportOptions, force: bool, search: SearchSettings | None = None
) -> Bundle:
    """Export a model of random weights at the sizes of a preset. Raises ValueError for an unknown name, and as
    `export_bundle`.
    """
    source = f"random weights, preset {name}, seed {options.seed}"
    sizes = GLAMM_PRESETS.get(name)
    if sizes is not None and is_large(sizes):
        _check_not_searched(search)
        return export_streamed(
            sizes,
            lambda shell: random_weights(shell, options.seed),
            destination,
            tokenizer_json=random_glamm_tokenizer(sizes),
            options=options,
            source=source,
            force=force,
        )
    return _export(lambda: Loaded(*random_parts(name, options.seed), source), destination, options, force, search)
