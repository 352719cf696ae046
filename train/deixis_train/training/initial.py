"""What a run starts from: the model of the recipe, filled from checkpoints and published weights, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

from deixis_train.checkpoint import TOKENIZER, load_checkpoint
from deixis_train.files import write_text
from deixis_train.loaders.eva02 import load_eva02
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.loaders.real_weights import default_cache
from deixis_train.loaders.report import CheckpointError
from deixis_train.loaders.sam import load_sam
from deixis_train.loaders.t5 import load_t5
from deixis_train.models.config import PRESETS, T5_SIZES, BoxDecoderConfig, MaskAdapterConfig, PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.tiny_vit import TinyVit
from deixis_train.training.recipe import Recipe, RecipeError
from deixis_train.training.vocabulary import build_tokenizer, extend_tokenizer, words_of

# Grow with the vocabulary: rows of new pieces come behind those of the checkpoint.
VOCABULARY = ("text.token_embedder.weight", "text.decoder.logits_dense.weight")

OF_WORDS = 10_000  # a tokenizer of fewer pieces was made of the words of its data, and takes in new ones


@dataclass
class Start:
    """sam_file: the published file that holds SAM's frozen parts, if the recipe names one. from_checkpoint: the prompt
    extractor has learned before."""

    model: PixelLLM
    tokenizer_json: str
    sam_file: Path | None
    from_checkpoint: bool


def model_config(recipe: Recipe) -> PixelLLMConfig:
    """The recipe's preset with what it changes of it."""
    if recipe.preset not in PRESETS:
        raise RecipeError(f"preset {recipe.preset!r} is unknown; known are {', '.join(PRESETS)}")
    config, spec = PRESETS[recipe.preset], recipe.model
    if config.bert is not None:
        _check_bert(recipe)
    t5 = config.t5
    if spec.text:
        if spec.text not in T5_SIZES:
            raise RecipeError(f"model.text: no T5 of size {spec.text!r}; known are {', '.join(T5_SIZES)}")
        t5 = T5_SIZES[spec.text]
    if spec.lora_rank is not None:
        t5 = replace(t5, enc_rank=spec.lora_rank, dec_rank=spec.lora_rank)
    if spec.vocab is not None:
        t5 = replace(t5, vocab=spec.vocab)
    config = replace(config, t5=t5)
    if spec.mask_adapter is not None:
        config = replace(
            config, mask_adapter=(config.mask_adapter or MaskAdapterConfig()) if spec.mask_adapter else None
        )
    if spec.box_decoder is not None:
        config = replace(config, box_decoder=(config.box_decoder or BoxDecoderConfig()) if spec.box_decoder else None)
    boxes = {k: getattr(spec, k) for k in ("caption_proposals", "max_detections") if getattr(spec, k) is not None}
    if boxes and config.box_decoder is not None:
        config = replace(config, box_decoder=replace(config.box_decoder, **boxes))
    return config


def _check_bert(recipe: Recipe) -> None:
    """Raise RecipeError for what only T5 has."""
    spec, init = recipe.model, recipe.init
    of_t5 = {"model.text": spec.text, "model.lora_rank": spec.lora_rank, "model.vocab": spec.vocab, "init.t5": init.t5}
    if given := [key for key, value in of_t5.items() if value]:
        raise RecipeError(f"{given[0]}: the preset {recipe.preset!r} has a BERT text head, not a T5")
    if not (init.tokenizer or init.checkpoint):
        raise RecipeError(
            f"init.tokenizer: the preset {recipe.preset!r} needs the tokenizer.json of its BERT text head"
        )
    for stage in recipe.stages:
        helped = {"auxiliary.look": stage.auxiliary.look, "auxiliary.match": stage.auxiliary.match}
        wants = {**helped, "fused_attention": stage.fused_attention, "train 'lora'": "lora" in stage.train}
        if given := [key for key, value in wants.items() if value]:
            raise RecipeError(
                f"stages ({stage.name}): {given[0]} needs a T5; the preset {recipe.preset!r} has a BERT text head"
            )
    if recipe.localisation != "regression":
        raise RecipeError(
            f"localisation: {recipe.localisation!r} needs a T5; with the BERT text head of the preset "
            f"{recipe.preset!r}, say 'regression'"
        )


def find_file(name: str, data: Path, out: Path) -> Path:
    """Where a file or folder that a recipe names lies: as it is, in the data folder, beside the run, or in the cache.

    Raises:
        RecipeError: nowhere.
    """
    places = [Path(name), data / name, out.resolve().parent / name, default_cache() / name]
    for place in places:
        if place.exists():
            return place
    raise RecipeError(
        f"init: {name} is neither there, nor in {data}, {places[2].parent} or {places[3].parent}; "
        "put it there, or name another one with --set init.KEY=PATH"
    )


def start(recipe: Recipe, data: Path, out: Path, texts: Iterable[str]) -> Start:
    """Build the model, fill it, and get its tokenizer; `texts` are read only if a vocabulary is to be made of them.

    Raises:
        RecipeError, CheckpointError: one line.
    """
    init = recipe.init
    config = model_config(recipe)
    sam_name = init.mobile_sam or init.sam
    # A file that is not there is said before a model of gigabytes is built.
    sam_file = find_file(sam_name, data, out) if sam_name else None
    former = find_file(init.checkpoint, data, out) if init.checkpoint else None
    eva02 = find_file(init.eva02, data, out) if init.eva02 else None
    t5 = find_file(init.t5, data, out) if init.t5 else None
    named = find_file(init.tokenizer, data, out) if init.tokenizer else None
    torch.manual_seed(recipe.seed)
    model = PixelLLM(config)
    own = out / TOKENIZER
    if former is not None:
        _from_checkpoint(model, former, sam_file)
        text = (former / TOKENIZER).read_text(encoding="utf-8")
        pieces = Tokenizer.from_str(text).get_vocab_size()
        if named is None and pieces < OF_WORDS:
            if config.bert is not None:
                raise RecipeError(
                    f"init.tokenizer: the vocabulary of a BERT text head takes in no new words; to keep the one of the "
                    f"checkpoint, name {former / TOKENIZER}"
                )
            _fresh_rows(model, pieces)
            if not own.exists():
                text, _ = extend_tokenizer(text, words_of(texts), config.t5.vocab)
        if named is None and not own.exists():
            write_text(own, text)
    if sam_file is not None:
        encoder = model.sam_encoder
        parts = (model.prompt_encoder, model.mask_decoder)
        if isinstance(encoder, TinyVit):
            load_mobile_sam(sam_file, encoder, *parts).raise_if_incomplete(sam_file)
        else:
            load_sam(sam_file, encoder, *parts).raise_if_incomplete(sam_file)
    if eva02 is not None:
        load_eva02(eva02, model.semantic_encoder).raise_if_incomplete(eva02)
    if t5 is not None:
        load_t5(t5, model.t5).raise_if_incomplete(t5)
    if not own.exists():
        if named is not None:
            write_text(own, named.read_text(encoding="utf-8"))
        else:
            write_text(own, build_tokenizer(words_of(texts), model.config.t5.vocab).to_str())
    return Start(model, own.read_text(encoding="utf-8"), sam_file, former is not None)


@torch.no_grad()
def _from_checkpoint(model: PixelLLM, path: Path, sam_file: Path | None) -> None:
    """Copy what the checkpoint has; parts that are new keep their values, and the vocabulary may have grown."""
    found = load_checkpoint(path, sam_file).model.state_dict()
    own = model.state_dict(keep_vars=True)
    parts = {name.partition(".")[0] for name in own}
    for name, value in found.items():
        if name.partition(".")[0] not in parts:
            continue
        if name not in own:
            raise CheckpointError(f"{path}: {name} has no place in the recipe's model")
        target = own[name]
        if name in VOCABULARY and target.shape[1:] == value.shape[1:] and len(target) >= len(value):
            target[: len(value)] = value
        elif target.shape == value.shape:
            target.copy_(value)
        else:
            sizes = f"{tuple(value.shape)} where the recipe's model has {tuple(target.shape)}"
            raise CheckpointError(f"{path}: {name} has {sizes}")


@torch.no_grad()
def _fresh_rows(model: PixelLLM, pieces: int) -> None:
    """Rows of pieces that the checkpoint's tokenizer did not have start anew: they had learned never to be said."""
    text = model.t5
    if pieces < text.config.vocab:
        nn.init.normal_(text.token_embedder.weight[pieces:], std=1.0)
        nn.init.normal_(text.decoder.logits_dense.weight[pieces:], std=text.config.emb**-0.5)
