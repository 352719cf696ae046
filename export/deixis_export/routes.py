"""From what a user names to a bundle: our checkpoints, published folders of GLaMM, presets of random weights.

A GLaMM that is larger than memory goes the streamed way, any other model the ordinary one.
"""

from __future__ import annotations

from pathlib import Path

from deixis.bundle import Bundle
from deixis_export.bundle_parts import ExportOptions
from deixis_export.export import export_bundle
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


def is_published(folder: Path) -> bool:
    """Whether a folder is a published model: it has a SentencePiece file, or Hugging Face's kind of `config.json`."""
    if (folder / MODEL_FILE).is_file():
        return True
    try:
        return "model_type" in read_json(folder / CONFIG)
    except CheckpointError:
        return False  # loading our own format says what is wrong


def export_checkpoint(
    folder: Path, destination: Path, *, frozen: Path | None, options: ExportOptions, force: bool
) -> Bundle:
    """Export a checkpoint of our own format. Raises as `load_checkpoint` and `export_bundle`."""
    checkpoint = load_checkpoint(folder, frozen)
    return export_bundle(
        checkpoint.model,
        destination,
        tokenizer_json=checkpoint.tokenizer_json,
        options=options,
        tasks=checkpoint.tasks,
        documents=checkpoint.documents,
        source=checkpoint.source,
        force=force,
    )


def export_published(
    folder: Path,
    destination: Path,
    *,
    clip: Path | None,
    options: ExportOptions,
    force: bool = False,
    base: GlammConfig | None = None,
) -> Bundle:
    """Export a published folder of GLaMM; its tokenizer becomes `tokenizer.json`.

    Args:
        folder, clip, base: as `open_glamm_folder`.
        destination, options, force: as `export_bundle`.

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
        return export_streamed(
            opened.config,
            lambda shell: published(shell, opened.tensors, opened.clip),
            destination,
            tokenizer_json=tokenizer_json,
            options=options,
            source=source,
            force=force,
        )
    model = load_glamm_folder(folder, clip, base).model
    return export_bundle(model, destination, tokenizer_json=tokenizer_json, options=options, source=source, force=force)


def export_random(name: str, destination: Path, *, options: ExportOptions, force: bool) -> Bundle:
    """Export a model of random weights at the sizes of a preset. Raises ValueError for an unknown name, and as
    `export_bundle`.
    """
    source = f"random weights, preset {name}, seed {options.seed}"
    sizes = GLAMM_PRESETS.get(name)
    if sizes is not None and is_large(sizes):
        return export_streamed(
            sizes,
            lambda shell: random_weights(shell, options.seed),
            destination,
            tokenizer_json=random_glamm_tokenizer(sizes),
            options=options,
            source=source,
            force=force,
        )
    model, tokenizer_json = random_parts(name, options.seed)
    return export_bundle(model, destination, tokenizer_json=tokenizer_json, options=options, source=source, force=force)
