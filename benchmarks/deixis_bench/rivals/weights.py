"""The weights that all rivals share: random ones of a named shape, by a fixed seed, with a reference of what they give.

python -m deixis_bench.rivals.weights text full FOLDER

Text parts are folders in Hugging Face layout (config.json, model.safetensors, a stand-in tokenizer whose pieces are
numbered); the encoder's is a checkpoint of ours. `rivals.json` has the prompt and the ids that PyTorch continues it
with, `reference.npz` the encoder's picture and its output.

Random weights must leave no doubt about the largest logit, or rivals that round differently would part ways. Prompts
are drawn until the best logit leads the second by CLEAR of the logits' standard deviation at all 256 ids, a hundred
times what fp32 arithmetic loses. Special ids have zero rows in the vocabulary head, so that no text ever ends.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deixis_bench.rivals.contract import MOST_NEW_TOKENS, NOTES, PARTS, PROMPT_TOKENS, REFERENCE, SIZES

if TYPE_CHECKING:
    import torch

    from deixis_train.models.config import PixelLLMConfig, T5Config
    from deixis_train.models.glamm.config import LlamaConfig, SpecialIds
    from deixis_train.models.glamm.llama import Llama
    from deixis_train.models.t5 import T5

SEED = 20
CLEAR = 5e-4
SPECIAL_IDS = 3  # padding, end and unknown of T5; unknown, begin and end of LLaMA
_PROMPTS = 200
_TENSORS, _CONFIG = "model.safetensors", "config.json"


def t5_sizes(size: str) -> T5Config:
    """Flan-T5-small's shape, or a tiny one; without LoRA."""
    from deixis_train.models.config import T5_SIZES, T5Config

    if size == "full":
        return dataclasses.replace(T5_SIZES["small"], enc_rank=0, dec_rank=0)
    return T5Config(vocab=320, emb=32, heads=2, head_dim=16, layers=2, mlp=48, enc_rank=0, dec_rank=0)


def llama_sizes(size: str) -> tuple[LlamaConfig, SpecialIds]:
    """The language model of glamm-135m (SmolLM2-135M's shape), or a tiny one, and the ids of GLaMM's special tokens."""
    from deixis_train.models.glamm.config import GLAMM_PRESETS

    preset = GLAMM_PRESETS["glamm-135m" if size == "full" else "glamm-tiny"]
    return preset.llama, preset.ids


def vision_sizes(size: str) -> PixelLLMConfig:
    """A PixelLLM whose SAM branch is ViT-B at 384 px; its other parts are tiny. Or all of it tiny."""
    from deixis_train.models.config import PRESETS, SAM_SIZES

    tiny = dataclasses.replace(PRESETS["tiny"], mask_decoder=None, mask_adapter=None)
    if size == "tiny":
        return tiny
    sam = SAM_SIZES["base"]
    return dataclasses.replace(tiny, name="sam-b-384", image_size=384, prompt_embed_dim=sam.out_chans, sam=sam)


def make_weights(part: str, size: str, folder: Path) -> None:
    """Write the weights of a part; the folder appears only when it is whole."""
    import torch

    torch.manual_seed(SEED)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    makers = {"text": _make_t5, "llama": _make_llama, "encoder": _make_encoder}
    with torch.no_grad():
        makers[part](size, temporary)
    temporary.replace(folder)


def _make_t5(size: str, folder: Path) -> None:
    from deixis_train.loaders.t5 import STACKS, t5_names
    from deixis_train.models.t5 import T5

    config = t5_sizes(size)
    model = T5(config).eval()
    model.vocabulary_head.weight[:SPECIAL_IDS] = 0.0
    own, names = model.state_dict(), t5_names(config.layers)
    turned = {f"{stack}.relpos_bias.rel_embedding" for stack in STACKS}
    tensors = {theirs: own[ours].T if ours in turned else own[ours] for ours, theirs in names.items()}
    values = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab,
        "d_model": config.emb,
        "d_kv": config.head_dim,
        "d_ff": config.mlp,
        "num_layers": config.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": config.relpos_buckets,
        "relative_attention_max_distance": config.relpos_max_distance,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }
    _write(folder, tensors, values, config.vocab, {"pad_token": 0, "eos_token": 1, "unk_token": 2})
    _write_notes(folder, config.vocab, lambda prompt: _continue_t5(model, prompt))


def _make_llama(size: str, folder: Path) -> None:
    from torch import nn

    from deixis_train.models.glamm.llama import Llama

    config, special = llama_sizes(size)
    model = Llama(config).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):  # else the tied head would only ever repeat the last id
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    head.weight[:SPECIAL_IDS] = 0.0
    head.weight[special.image_start :] = 0.0  # GLaMM's own ids, which would ask for pictures and boxes
    tensors = {
        name if name.startswith("lm_head.") else f"model.{name}": value for name, value in model.state_dict().items()
    }
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.emb,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": config.rms_eps,
        "rope_theta": config.rope_base,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
    }
    _write(folder, tensors, values, config.vocab, {"unk_token": 0, "bos_token": 1, "eos_token": 2})
    _write_notes(folder, special.image_start, lambda prompt: _continue_llama(model, prompt))


def read_t5(folder: Path) -> T5:
    """The T5 of a folder of weights, in float32 and evaluation mode."""
    from deixis_train.loaders.t5 import load_t5
    from deixis_train.models.config import T5Config
    from deixis_train.models.t5 import T5

    values = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    config = T5Config(
        vocab=values["vocab_size"],
        emb=values["d_model"],
        heads=values["num_heads"],
        head_dim=values["d_kv"],
        layers=values["num_layers"],
        mlp=values["d_ff"],
        enc_rank=0,
        dec_rank=0,
    )
    model = T5(config).eval()
    load_t5(folder, model).raise_if_incomplete(folder)
    return model


def _make_encoder(size: str, folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models

    from deixis_train.checkpoint import save_checkpoint
    from deixis_train.models.pixelllm import PixelLLM

    config = vision_sizes(size)
    model = PixelLLM(config).eval()
    for parameter in model.parameters():  # tables and biases that start at zero are to do something too
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.t5.vocab)}, unk_token="t2"))
    save_checkpoint(folder, model, tokenizer.to_str(), dtype="fp32")
    side = config.image_size
    image = torch.rand(1, 8, 8, 3).mul(255).floor().repeat_interleave(side // 8, 1).repeat_interleave(side // 8, 2)
    valid = torch.tensor([[side * 3 // 4, side]], dtype=torch.float32)
    image[:, int(valid[0, 0]) :] = 0
    sam = model.encode_sam(image, valid)[1]
    np.savez(folder / REFERENCE, image=image.numpy(), valid_hw=valid.numpy(), sam=sam.numpy())
    _write_json(folder / NOTES, {"seed": SEED, "shape": dataclasses.asdict(config.sam), "image_size": side})


def _write(
    folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], vocab: int, special: dict[str, int]
) -> None:
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / _TENSORS, {"format": "pt"})
    _write_json(folder / _CONFIG, config)
    names = {name: f"t{number}" for name, number in special.items()}
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token=names["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.add_special_tokens(list(names.values()))
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **names})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _write_notes(folder: Path, most: int, continued: Any) -> None:
    """Draw prompts of ids below `most` until one is continued without doubt; `continued` gives ids, None in doubt."""
    generator = np.random.default_rng(SEED)
    for _ in range(_PROMPTS):
        prompt = generator.integers(SPECIAL_IDS, most, PROMPT_TOKENS).tolist()
        ids = continued(prompt)
        if ids is not None:
            _write_json(folder / NOTES, {"seed": SEED, "clear": CLEAR, "prompt": prompt, "ids": ids})
            return
    raise RuntimeError(f"none of {_PROMPTS} prompts was continued without doubt; take another seed")


def _continue_t5(model: T5, prompt: list[int]) -> list[int] | None:
    import torch

    encoded, valid = model.encode(model.token_embedder(torch.tensor([prompt])))
    cross, cache = model.cross_kv(encoded), model.empty_cache(1, MOST_NEW_TOKENS + 1)
    ids = [0]
    for position in range(MOST_NEW_TOKENS + 1):
        logits, _, cache = model.step(torch.tensor([ids[-1:]]), torch.tensor([position]), cache, cross, valid)
        if (best := _clear_best(logits[0])) is None:
            return None
        ids.append(best)
    return ids[1:]


def _continue_llama(model: Llama, prompt: list[int]) -> list[int] | None:
    import torch

    cache = model.empty_cache(1, PROMPT_TOKENS + MOST_NEW_TOKENS + 1)
    new, ids, position = prompt, [], 0
    while len(ids) <= MOST_NEW_TOKENS:
        states, cache = model.step(model.embed(torch.tensor([new])), torch.tensor([position]), cache)
        position += len(new)
        if (best := _clear_best(model.head(states[0, -1]))) is None:
            return None
        ids.append(best)
        new = [best]
    return ids


def _clear_best(logits: torch.Tensor) -> int | None:
    (best, second), (number, _) = (values.tolist() for values in logits.topk(2))
    return number if best - second >= CLEAR * float(logits.std()) else None


def main(argv: list[str]) -> int:
    if len(argv) != 3 or argv[0] not in PARTS or argv[1] not in SIZES:
        print(
            f"usage: python -m deixis_bench.rivals.weights {{{','.join(PARTS)}}} {{full,tiny}} FOLDER", file=sys.stderr
        )
        return 2
    make_weights(argv[0], argv[1], Path(argv[2]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
