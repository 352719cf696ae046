"""The model that a run of GLaMM begins with: sizes, weights and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from deixis_train.checkpoint import TOKENIZER, load_checkpoint
from deixis_train.files import write_text
from deixis_train.glamm.vocabulary import ADDED, build_glamm_tokenizer
from deixis_train.loaders.files import read_tensors
from deixis_train.loaders.glamm import load_glamm_folder
from deixis_train.loaders.glamm_names import load_clip_state
from deixis_train.loaders.llama import load_llama_folder
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.loaders.report import CheckpointError
from deixis_train.loaders.sam import load_sam
from deixis_train.loaders.unfilled import unfilled
from deixis_train.models.glamm.config import GLAMM_PRESETS, GlammConfig, LlamaConfig
from deixis_train.models.glamm.eva_vision import EvaVision
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.llama import Llama
from deixis_train.models.tiny_vit import TinyVit
from deixis_train.training.initial import find_file
from deixis_train.training.recipe import Recipe, RecipeError

PROJECTOR = "mm_projector."


@dataclass
class GlammStart:
    """sam_file: the published file that holds SAM's frozen parts, if the recipe names one."""

    model: Glamm
    tokenizer_json: str
    sam_file: Path | None


def model_config(recipe: Recipe) -> GlammConfig:
    """The recipe's preset with what it changes of it. Raises RecipeError."""
    if recipe.preset not in GLAMM_PRESETS:
        raise RecipeError(f"preset {recipe.preset!r} is no GLaMM; known are {', '.join(GLAMM_PRESETS)}")
    spec = recipe.model
    others = ("text", "vocab", "mask_adapter", "box_decoder", "caption_proposals", "max_detections")
    if given := [name for name in others if getattr(spec, name) is not None]:
        raise RecipeError(f"model.{given[0]}: GLaMM has no such choice")
    if given := [name for name in ("eva02", "t5") if getattr(recipe.init, name)]:
        raise RecipeError(f"init.{given[0]}: GLaMM has no such part")
    config = replace(GLAMM_PRESETS[recipe.preset], system=recipe.conversation.system)
    return with_lora(config, config.llama.lora_rank if spec.lora_rank is None else spec.lora_rank)


def with_lora(config: GlammConfig, rank: int) -> GlammConfig:
    """The configuration with LoRA of that rank, 0 for none. Its scale is 16 / rank (section 9.3)."""
    scale = 16.0 / rank if rank else LlamaConfig().lora_scale
    return replace(config, llama=replace(config.llama, lora_rank=rank, lora_scale=scale))


def start(
    recipe: Recipe, data: Path, out: Path, texts: Callable[[], Iterable[str]], questions: Iterable[str]
) -> GlammStart:
    """Build the model, fill it, and get its tokenizer; texts are read only if a vocabulary is to be made of them.

    Raises:
        RecipeError, CheckpointError: one line.
    """
    init, config = recipe.init, model_config(recipe)

    def find(name: str | None) -> Path | None:
        return find_file(name, data, out) if name else None

    # A file that is not there is said before a model of gigabytes is built.
    sam_file, former, named = find(init.mobile_sam or init.sam), find(init.checkpoint), find(init.tokenizer)
    published, clip, llama, projector = (find(n) for n in (init.glamm, init.clip, init.llama, init.projector))
    pixelllm = find(init.pixelllm)
    if (published or llama) and named is None:
        raise RecipeError(
            "init.tokenizer: published weights need their tokenizer as tokenizer.json (`deixis export` writes it)"
        )
    torch.manual_seed(recipe.seed)
    if published is not None:
        model = _from_other(config, load_glamm_folder(published, clip, config).model, published)
    elif former is not None:
        model = _from_other(config, load_checkpoint(former, sam_file).glamm, former)
    else:
        model = Glamm(config)
        if llama is not None:
            _fill_llama(model, load_llama_folder(llama), llama)
        if projector is not None:
            _fill_projector(model, projector)
        if pixelllm is not None:
            _fill_eva(model, pixelllm, sam_file)
        if clip is not None:
            load_clip_state(model.clip, read_tensors(clip)).raise_if_incomplete(clip)
        if sam_file is not None:
            encoder, parts = model.sam_encoder, (model.prompt_encoder, model.mask_decoder)
            if isinstance(encoder, TinyVit):
                load_mobile_sam(sam_file, encoder, *parts).raise_if_incomplete(sam_file)
            else:
                load_sam(sam_file, encoder, *parts).raise_if_incomplete(sam_file)
    own = out / TOKENIZER
    if not own.exists():
        if named is not None:
            write_text(own, named.read_text(encoding="utf-8"))
        elif former is not None:
            write_text(own, (former / TOKENIZER).read_text(encoding="utf-8"))
        else:
            write_text(own, build_glamm_tokenizer(texts(), questions, model.config).to_str())
    text = own.read_text(encoding="utf-8")
    _check_marks(text, model.config, own)
    return GlammStart(model, text, sam_file)


@torch.no_grad()
def _from_other(config: GlammConfig, other: Glamm, where: Path) -> Glamm:
    """The other model's weights (not copies) and sizes, with fresh LoRA factors as the recipe wants them."""
    other.llama.merge_lora()
    if config.name != other.config.name and config.clip.embed_dim != other.config.clip.embed_dim:
        raise RecipeError(
            f"init: {where} holds the model {other.config.name!r}, the recipe's preset is {config.name!r}"
        )
    system = other.config.system if config.system is None else config.system
    model = unfilled(lambda: Glamm(with_lora(replace(other.config, system=system), config.llama.lora_rank)))
    left = model.load_state_dict(other.state_dict(), strict=False, assign=True)
    assert not left.unexpected_keys and all(".lora_" in name for name in left.missing_keys)  # the sizes are the same
    model.llama.init_lora()
    return model


@torch.no_grad()
def _fill_llama(model: Glamm, llama: Llama, where: Path) -> None:
    """A language model without GLaMM's tokens: their rows begin as the mean of all others."""
    own = model.llama.state_dict(keep_vars=True)
    for name, value in llama.state_dict().items():
        target = own[name]
        if target.shape[1:] != value.shape[1:] or len(target) < len(value):
            raise CheckpointError(f"{where}: {name} has {tuple(value.shape)} where the model has {tuple(target.shape)}")
        target[: len(value)] = value
        if len(target) > len(value):
            target[len(value) :] = value.mean(0)


def _fill_eva(model: Glamm, where: Path, sam_file: Path | None) -> None:
    """The semantic encoder of a PixelLLM as the global encoder."""
    theirs = load_checkpoint(where, sam_file).pixelllm.semantic_encoder.state_dict()
    if not isinstance(model.clip, EvaVision):
        raise RecipeError(f"init.pixelllm: the global encoder of the preset {model.config.name!r} is no EVA02")
    own = model.clip.state_dict()
    if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in theirs.items()}:
        raise RecipeError(f"init.pixelllm: {where} has a semantic encoder of other sizes than {model.config.name!r}")
    model.clip.load_state_dict(theirs)


@torch.no_grad()
def _fill_projector(model: Glamm, path: Path) -> None:
    """LLaVA's projector: "…mm_projector.0.weight" and its like, and nothing else is looked at."""
    tensors = read_tensors(path)
    own = model.projector.state_dict(keep_vars=True)
    for name, target in own.items():
        found = [theirs for theirs in tensors if theirs.endswith(PROJECTOR + name)]
        if len(found) != 1 or tensors[found[0]].shape != target.shape:
            raise CheckpointError(f"{path}: no {PROJECTOR}{name} of {tuple(target.shape)}; take LLaVA 1.5's projector")
        target.copy_(tensors[found[0]])


def _check_marks(tokenizer_json: str, config: GlammConfig, where: Path) -> None:
    """Raise RecipeError unless the tokenizer's marks have the configuration's ids."""
    ids, tokenizer = config.ids, Tokenizer.from_str(tokenizer_json)
    wanted = (ids.image_start, ids.image_end, ids.region, None, ids.mask, ids.phrase_start, ids.phrase_end)
    for mark, number in zip(ADDED, wanted, strict=True):
        if number is not None and tokenizer.token_to_id(mark) != number:
            raise RecipeError(f"{where}: {mark} has id {tokenizer.token_to_id(mark)}, the model's is {number}")
