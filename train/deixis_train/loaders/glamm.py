"""GLaMM's published checkpoint folders (section 13), and the training checkpoints they are merged from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from deixis.conversation import IMAGE_END, IMAGE_START, MASK, PHRASE_END, PHRASE_START, REGION
from deixis_train.loaders.files import read_json, read_tensors
from deixis_train.loaders.glamm_names import CLIP, load_clip_state, load_glamm_state, mask_prompt_channels
from deixis_train.loaders.llama import llama_config
from deixis_train.loaders.report import CheckpointError
from deixis_train.loaders.unfilled import unfilled
from deixis_train.models.glamm.config import GLAMM_PRESETS, ClipConfig, GlammConfig, SpecialIds
from deixis_train.models.glamm.glamm import Glamm

ADAPTER_PREFIX = "base_model.model."  # what PEFT puts before every name
LORA_ALPHA = 16.0  # of the published training (section 9.3); `adapter_config.json` may say otherwise
MODEL_FILE = "tokenizer.model"


@dataclass(frozen=True)
class PublishedTokenizer:
    """The tokenizer files of a folder.

    model_file: the SentencePiece model. added: text to id of the tokens behind its pieces. `ids`: what the model's
    marks are in this folder.
    """

    model_file: Path
    added: dict[str, int]
    ids: SpecialIds


@dataclass(frozen=True)
class OpenedGlamm:
    """A published folder with its weights still on disk.

    config: the model's sizes. tensors: the weights by published name, LoRA merged; each is read when it is asked for,
    in the file's dtype. clip: CLIP's weights by Hugging Face's names, likewise; None where `tensors` hold them.
    """

    config: GlammConfig
    tensors: Mapping[str, Tensor]
    clip: Mapping[str, Tensor] | None
    tokenizer: PublishedTokenizer


@dataclass(frozen=True)
class PublishedGlamm:
    """A folder's model (float32, evaluation mode) and tokenizer."""

    model: Glamm
    tokenizer: PublishedTokenizer


def open_glamm_folder(folder: Path, clip: Path | None = None, base: GlammConfig | None = None) -> OpenedGlamm:
    """Open a published folder without reading its weights, for models that do not fit into memory.

    Args:
        folder: `config.json`, weights as safetensors or `pytorch_model*.bin` (sharded with an index, or one file), and
            the tokenizer's files. LoRA factors that are not merged yet are merged: W + alpha / r * B A.
        clip: OpenAI's CLIP in Hugging Face's naming, a file or a folder; the published folders leave it out. None takes
            it from `folder`, which training checkpoints hold.
        base: sizes that no file says (SAM, region encoder, mask decoder, and CLIP's unless `clip` is a folder with its
            own `config.json`); None: those that the published code fixes.

    Raises:
        CheckpointError: a file is absent, unreadable, or says sizes that no model has. One line. Whether the weights
            fill the model is not looked at.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    tokenizer = read_tokenizer(folder)
    tensors = merged(read_tensors(folder), _lora_alpha(folder))
    config = _config(base or GLAMM_PRESETS["glamm-7b"], values, folder, tensors, tokenizer.ids, clip)
    try:
        unfilled(lambda: Glamm(config))
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    if clip is None and not any(name.startswith(CLIP) for name in tensors):
        raise CheckpointError(
            f"{folder}: holds no CLIP; give its file or folder (openai/clip-vit-large-patch14-336): --clip of "
            "`deixis export`, init.clip of a recipe"
        )
    return OpenedGlamm(config, tensors, None if clip is None else read_tensors(clip), tokenizer)


def load_glamm_folder(folder: Path, clip: Path | None = None, base: GlammConfig | None = None) -> PublishedGlamm:
    """Read a published folder; arguments as those of `open_glamm_folder`.

    Weights are copied one at a time, so the model's own float32 is nearly all the memory this takes.

    Raises:
        CheckpointError: as `open_glamm_folder`, or the files do not fill the model. One line.
    """
    opened = open_glamm_folder(folder, clip, base)
    model = unfilled(lambda: Glamm(opened.config))
    load_glamm_state(model, opened.tensors, () if clip is None else ("clip",)).raise_if_incomplete(folder)
    if opened.clip is not None:
        load_clip_state(model.clip, opened.clip).raise_if_incomplete(clip)
    return PublishedGlamm(model.eval(), opened.tokenizer)


def read_tokenizer(folder: Path) -> PublishedTokenizer:
    """The tokenizer of a folder: `tokenizer.model`, with added tokens from `added_tokens.json` or, in newer folders,
    `tokenizer_config.json`. Padding is the unknown token (section 5.1).

    Raises:
        CheckpointError: a file is absent or unreadable, or a mark of the conversation has no id.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(f"{folder}: its tokenizer needs the package sentencepiece") from None
    path = Path(folder) / MODEL_FILE
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        pieces = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise CheckpointError(f"{path}: not a SentencePiece model") from None
    every = _added_tokens(Path(folder))
    added = {text: number for text, number in every.items() if number >= pieces.vocab_size()}
    if absent := [mark for mark in (IMAGE_START, IMAGE_END, MASK, PHRASE_START, PHRASE_END) if mark not in added]:
        raise CheckpointError(f"{folder}: its tokenizer lacks {', '.join(absent)}")
    ids = SpecialIds(
        begin=pieces.bos_id(),
        end=pieces.eos_id(),
        pad=pieces.unk_id(),
        unknown=pieces.unk_id(),
        image_start=added[IMAGE_START],
        image_end=added[IMAGE_END],
        region=added.get(REGION, pieces.unk_id()),
        mask=added[MASK],
        phrase_start=added[PHRASE_START],
        phrase_end=added[PHRASE_END],
    )
    return PublishedTokenizer(path, added, ids)


def merged(tensors: Mapping[str, Tensor], alpha: float = LORA_ALPHA) -> Mapping[str, Tensor]:
    """Tensors under the published names: PEFT's prefix taken off, LoRA factors folded into their matrices.

    Raises:
        CheckpointError: factors without their partner or matrix, or the same name with and without prefix.
    """
    names: dict[str, str] = {}
    for name in tensors:
        plain = name.removeprefix(ADAPTER_PREFIX).replace(".base_layer.", ".")
        if plain in names:
            raise CheckpointError(f"{plain} is there twice, once as {name}")
        names[plain] = name
    factors = {name: own for name, own in names.items() if ".lora_" in name}
    pairs: dict[str, tuple[str, str]] = {}
    for name in factors:
        matrix = f"{name.partition('.lora_')[0]}.weight"
        a, b = (next((n for n in factors if n.startswith(f"{matrix[:-6]}lora_{part}")), None) for part in "AB")
        if a is None or b is None or matrix not in names:
            raise CheckpointError(
                f"{name}: LoRA factors A and B and the matrix {matrix} belong together; one is absent"
            )
        pairs[matrix] = (factors[a], factors[b])
    return _Merged(tensors, {name: own for name, own in names.items() if name not in factors}, pairs, alpha)


class _Merged(Mapping[str, Tensor]):
    """Tensors by other names, some with a product of two factors added; each is made when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, Tensor], names: dict[str, str], pairs: dict[str, tuple[str, str]], alpha: float
    ) -> None:
        self._tensors, self._names, self._pairs, self._alpha = tensors, names, pairs, alpha

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensors[self._names[name]]
        if name not in self._pairs:
            return value
        a, b = (self._tensors[factor].float() for factor in self._pairs[name])
        return value.float() + self._alpha / a.shape[0] * (b @ a)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


def _config(
    base: GlammConfig,
    values: dict[str, Any],
    folder: Path,
    tensors: Mapping[str, Tensor],
    ids: SpecialIds,
    clip: Path | None,
) -> GlammConfig:
    where = folder / "config.json"
    if "model.embed_tokens.weight" not in tensors:
        raise CheckpointError(f"{folder}: not a GLaMM checkpoint: no model.embed_tokens.weight")
    if (feature := values.get("mm_vision_select_feature", "patch")) != "patch":
        raise CheckpointError(f"{where}: mm_vision_select_feature is {feature!r}; only patch is computed")
    region = base.region if values.get("with_region", True) else None
    if region is not None:
        levels = values.get("num_level_reg_features", values.get("num_reg_features", region.levels))
        region = dataclasses.replace(region, levels=int(levels))
        if ids.region == ids.unknown:
            raise CheckpointError(f"{folder}: takes boxes, yet its tokenizer lacks {REGION}")
    sizes = _clip_config(base.clip, clip, int(values.get("mm_vision_select_layer", base.clip.select_layer)))
    if (width := int(values.get("mm_hidden_size", sizes.embed_dim))) != sizes.embed_dim:
        raise CheckpointError(f"{where}: was trained with a CLIP of width {width}, not {sizes.embed_dim}")
    rows = tensors["model.embed_tokens.weight"].shape[0]
    if (highest := max(dataclasses.astuple(ids))) >= rows:
        raise CheckpointError(f"{folder}: its tokenizer has a token {highest}, the model only {rows}")
    return dataclasses.replace(
        base,
        name=folder.resolve().name,
        clip=sizes,
        region=region,
        llama=llama_config(values, where, vocab=rows),
        prompt_embed_dim=int(values.get("out_dim", base.prompt_embed_dim)),
        mask_prompt_channels=mask_prompt_channels(tensors),
        ids=ids,
    )


def _clip_config(base: ClipConfig, clip: Path | None, select_layer: int) -> ClipConfig:
    """Sizes of CLIP from its folder's own `config.json`, where there is one."""
    path = Path(clip) / "config.json" if clip is not None else None
    if path is None or not path.is_file():
        return dataclasses.replace(base, select_layer=select_layer)
    values = read_json(path)
    vision = values.get("vision_config", values)
    if not isinstance(vision, dict) or vision.get("hidden_act", "quick_gelu") != "quick_gelu":
        raise CheckpointError(f"{path}: not the configuration of OpenAI's CLIP")
    # CLIP's configuration files may leave out what is as in ViT-B/32.
    return ClipConfig(
        embed_dim=int(vision.get("hidden_size", 768)),
        depth=int(vision.get("num_hidden_layers", 12)),
        num_heads=int(vision.get("num_attention_heads", 12)),
        mlp_dim=int(vision.get("intermediate_size", 3072)),
        patch_size=int(vision.get("patch_size", 32)),
        image_size=int(vision.get("image_size", 224)),
        select_layer=select_layer,
    )


def _added_tokens(folder: Path) -> dict[str, int]:
    path = folder / "added_tokens.json"
    if path.is_file():
        added: dict[Any, Any] = read_json(path)
    else:
        path = folder / "tokenizer_config.json"
        decoder = read_json(path).get("added_tokens_decoder")
        if not isinstance(decoder, dict):
            raise CheckpointError(f"{folder}: neither added_tokens.json nor added_tokens_decoder in {path.name}")
        added = {entry.get("content"): number for number, entry in decoder.items() if isinstance(entry, dict)}
    try:
        return {str(text): int(number) for text, number in added.items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a table of tokens and ids: {error}") from None


def _lora_alpha(folder: Path) -> float:
    path = folder / "adapter_config.json"
    return float(read_json(path).get("lora_alpha", LORA_ALPHA)) if path.is_file() else LORA_ALPHA
