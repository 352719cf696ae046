"""Published LLaMA and GLaMM files into our models: made-up folders of the same layout, and SmolLM2's real weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from deixis_export.shells import shell
from deixis_export.sources import published as published_weights
from deixis_train.checkpoint import load_checkpoint, save_checkpoint
from deixis_train.loaders.files import SafetensorsFiles
from deixis_train.loaders.glamm import load_glamm_folder, merged, open_glamm_folder
from deixis_train.loaders.glamm_names import CLIP, config_from_golden, load_glamm_state
from deixis_train.loaders.llama import GgufFile, gguf_tokenizer_json, llama_config, load_llama_folder, load_llama_gguf
from deixis_train.loaders.real_weights import real_weight
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.config import PRESETS
from deixis_train.models.glamm.config import GLAMM_PRESETS, GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.llama import Llama
from deixis_train.models.pixelllm import PixelLLM

GOLDEN = Path(__file__).parents[1] / "golden" / "glamm"
BASE = config_from_golden(json.loads((GOLDEN / "manifest.json").read_text()))
ADDED = json.loads((GOLDEN / "text.json").read_text())["special_ids"]
ROWS = 607  # of the golden tokenizer, whose ids the golden model's table is too short for
CONFIG_JSON = {
    "model_type": "llava",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": ROWS,
    "rms_norm_eps": 3e-6,
    "hidden_act": "silu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_hidden_size": 32,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "num_level_reg_features": 4,
    "out_dim": 32,
    "with_region": True,
}
Q = "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """The golden parameters under their published names, with a vocabulary table of the tokenizer's length."""
    with np.load(GOLDEN / "state_dict.npz", allow_pickle=False) as file:
        tensors = {name: torch.from_numpy(file[name]) for name in file.files}
    generator = torch.Generator().manual_seed(0)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(ROWS, 64, generator=generator).half()
    return tensors


def write_folder(folder: Path, tensors: dict[str, Tensor], form: str = "safetensors", **changes: object) -> Path:
    folder.mkdir(parents=True)
    names = sorted(tensors)
    parts = [{n: tensors[n].contiguous() for n in names[k::2]} for k in range(2)]
    if form == "safetensors":
        files = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            save_file(part, folder / file)
        index = "model.safetensors.index.json"
    elif form == "bin shards":
        files = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
        for file, part in zip(files, parts, strict=True):
            torch.save(part, folder / file)
        index = "pytorch_model.bin.index.json"
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
        files, index = [], ""
    if index:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    values = {key: value for key, value in {**CONFIG_JSON, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    return folder


def write_clip(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """CLIP as OpenAI's is published: another prefix, the text half, all blocks."""
    folder.mkdir()
    vision = {f"vision_model.{name.removeprefix(CLIP)}": own for name, own in tensors.items() if name.startswith(CLIP)}
    extra = {"logit_scale": torch.tensor(4.6), "text_model.final_layer_norm.weight": torch.ones(16)}
    save_file({**vision, **extra}, folder / "model.safetensors")
    sizes = {"hidden_size": 32, "num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 72}
    vision_config = {**sizes, "image_size": 336, "patch_size": 14}
    (folder / "config.json").write_text(
        json.dumps({"vision_config": vision_config, "text_config": {"hidden_size": 16}})
    )
    return folder


def without_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: own for name, own in tensors.items() if "vision_tower" not in name}


def expected(tensors: dict[str, Tensor]) -> Glamm:
    config = dataclasses.replace(BASE, llama=dataclasses.replace(BASE.llama, vocab=ROWS))
    model = Glamm(config)
    load_glamm_state(model, tensors).raise_if_incomplete()
    return model


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("form", ["safetensors", "bin shards", "one bin"])
def test_a_published_folder_and_clip(form: str, published: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "GLaMM", without_clip(published), form)
    loaded = load_glamm_folder(folder, write_clip(tmp_path / "clip", published), BASE)
    wanted = expected(published)
    assert_same(loaded.model.state_dict(), wanted.state_dict())
    assert_same(dict(loaded.model.named_buffers()), dict(wanted.named_buffers()))  # those that no file holds, too
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.model.parameters())
    config = loaded.model.config
    assert not loaded.model.training
    assert (config.name, config.llama.rms_eps, config.llama.vocab) == ("GLaMM", 3e-6, ROWS)
    assert config.clip == BASE.clip  # read from CLIP's own configuration
    assert dataclasses.astuple(config.ids) == (1, 2, 0, 0, 600, 601, 602, 604, 605, 606)
    assert loaded.tokenizer.added == ADDED


def test_a_training_checkpoint_with_factors_and_clip_inside(published: dict[str, Tensor], tmp_path: Path) -> None:
    """Names behind PEFT's prefix, W + alpha / r B A still to be added, CLIP in the file."""
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(8, 64, generator=generator) / 8, torch.randn(64, 8, generator=generator) / 8
    tensors = {f"base_model.model.{name}": own for name, own in published.items()}
    tensors[f"base_model.model.{Q}.base_layer.weight"] = tensors.pop(f"base_model.model.{Q}.weight")
    tensors[f"base_model.model.{Q}.lora_A.default.weight"] = a
    tensors[f"base_model.model.{Q}.lora_B.default.weight"] = b
    folder = write_folder(tmp_path / "run", tensors)
    wanted = dict(published)
    for factor, alpha in ((2.0, None), (0.5, 4)):
        if alpha is not None:
            (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "lora_alpha": alpha}))
        wanted[f"{Q}.weight"] = published[f"{Q}.weight"].float() + factor * (b @ a)
        assert_same(load_glamm_folder(folder, None, BASE).model.state_dict(), expected(wanted).state_dict(), 1e-6)


@pytest.mark.parametrize("clip_inside", [False, True])
@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_a_folder_that_stays_on_disk(
    form: str, clip_inside: bool, published: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening reads what tells a size and no more; then every weight of the model is there by its name."""
    folder = write_folder(tmp_path / "m", published if clip_inside else without_clip(published), form)
    clip = None if clip_inside else write_clip(tmp_path / "clip", published)
    read, get = [], SafetensorsFiles.__getitem__
    monkeypatch.setattr(SafetensorsFiles, "__getitem__", lambda files, name: read.append(name) or get(files, name))
    opened = open_glamm_folder(folder, clip, BASE)
    assert len(read) <= 2
    wanted = expected(published)
    assert opened.config == load_glamm_folder(folder, clip, BASE).model.config
    read.clear()
    weights = published_weights(shell(lambda: Glamm(opened.config)), opened.tensors, opened.clip)
    assert not read
    assert_same({name: weights(name) for name in wanted.state_dict()}, wanted.state_dict())


def test_folders_without_the_part_for_masks(published: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {name: own for name, own in published.items() if ".mask_downscaling." not in name}
    assert load_glamm_folder(write_folder(tmp_path / "m", tensors), None, BASE).model.config.mask_prompt_channels == 0


def test_without_regions(published: dict[str, Tensor], tmp_path: Path) -> None:
    tensors = {name: own for name, own in published.items() if "region_encoder" not in name}
    folder = write_folder(tmp_path / "m", tensors, with_region=False)
    added = {mark: number for mark, number in ADDED.items() if mark != "<bbox>"}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    model = load_glamm_folder(folder, None, BASE).model
    assert model.region_encoder is None and model.config.region is None


def test_tokens_of_newer_folders(published: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", published)
    (folder / "added_tokens.json").unlink()
    every = {"<unk>": 0, "<s>": 1, "</s>": 2, **ADDED}
    decoder = {str(number): {"content": mark} for mark, number in every.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    loaded = load_glamm_folder(folder, None, BASE)
    assert loaded.tokenizer.added == ADDED and loaded.model.config.ids.mask == 604


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"mm_hidden_size": 48}, "width 48"),
        ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
        ({"mm_vision_select_layer": -9}, "levels"),
        ({"num_attention_heads": "x"}, "not the configuration"),
        ({"num_hidden_layers": 3}, "layers.2"),
    ],
)
def test_configurations_that_do_not_fit(
    changes: dict[str, object], reason: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "m", published, **changes)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_glamm_folder(folder, None, BASE)
    assert "\n" not in str(caught.value)


def test_folders_that_lack_something(published: dict[str, Tensor], tmp_path: Path) -> None:
    def refused(reason: str, clip: Path | None = None) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            load_glamm_folder(folder, clip, BASE)
        assert "\n" not in str(caught.value)

    folder = write_folder(tmp_path / "m", without_clip(published))
    refused("holds no CLIP")
    refused("no such file", tmp_path / "absent.safetensors")
    (folder / "added_tokens.json").write_text(json.dumps({**ADDED, "[SEG]": 2}))
    refused(r"lacks \[SEG\]")
    (folder / "added_tokens.json").write_text(json.dumps({**ADDED, "<more>": 700, "[SEG]": 700}))
    refused("token 700")
    (folder / "tokenizer.model").write_bytes(b"none")
    refused("not a SentencePiece model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "tokenizer.model").unlink()
    shutil.copy(GOLDEN / "tokenizer.model", folder)
    refused("00002.*no such file")


def test_factors_without_their_partner() -> None:
    with pytest.raises(CheckpointError, match="belong together"):
        merged({f"{Q}.weight": torch.ones(2, 2), f"{Q}.lora_A.default.weight": torch.ones(1, 2)})
    with pytest.raises(CheckpointError, match="twice"):
        merged({f"{Q}.weight": torch.ones(2, 2), f"base_model.model.{Q}.weight": torch.ones(2, 2)})


# --- our own checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_a_checkpoint_of_glamm_comes_back(rank: int, tmp_path: Path) -> None:
    preset = GLAMM_PRESETS["glamm-tiny"]
    model = Glamm(dataclasses.replace(preset, llama=dataclasses.replace(preset.llama, lora_rank=rank)))
    save_checkpoint(tmp_path / "c", model, "{}", {"ask": {"max_length": 9}}, dtype="fp32")
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.family == "glamm" and loaded.glamm is loaded.model
    assert isinstance(loaded.config, GlammConfig) and loaded.config == model.config
    assert loaded.tasks == {"ask": {"max_length": 9}}
    assert_same(loaded.model.state_dict(), model.state_dict())
    with pytest.raises(CheckpointError, match="needs a pixelllm"):
        _ = loaded.pixelllm


def test_families_in_checkpoints(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c", PixelLLM(PRESETS["tiny"]), "{}")
    config = tmp_path / "c" / "config.json"
    values = json.loads(config.read_text())
    assert values.pop("family") == "pixelllm"
    config.write_text(json.dumps(values))  # as checkpoints were before there were families
    assert load_checkpoint(tmp_path / "c").family == "pixelllm"
    with pytest.raises(CheckpointError, match="needs a glamm"):
        _ = load_checkpoint(tmp_path / "c").glamm
    config.write_text(json.dumps({**values, "family": "other"}))
    with pytest.raises(CheckpointError, match="no family 'other'"):
        load_checkpoint(tmp_path / "c")


# --- LLaMA --------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 80,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
}


def transformers_llama(tied: bool = False):
    """Transformers' LLaMA of `SIZES` with random weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))
    return model.to(torch.float32).eval()


def transformers_copy(model: Llama):
    """Transformers' LLaMA on our weights, which it shares."""
    transformers = pytest.importorskip("transformers")
    names = {"vocab": "vocab_size", "emb": "hidden_size", "mlp": "intermediate_size", "layers": "num_hidden_layers"}
    names |= {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}
    names |= {"rms_eps": "rms_norm_eps", "rope_base": "rope_theta"}
    values = {theirs: getattr(model.config, ours) for ours, theirs in names.items()}
    config = transformers.LlamaConfig(**values, tie_word_embeddings=model.config.tied)
    with torch.device("meta"):  # its start values would only be thrown away
        theirs = transformers.LlamaForCausalLM(config)
    theirs.model.load_state_dict(model.state_dict(), assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)
    return theirs.eval()


@torch.inference_mode()
def assert_same_logits(model: Llama, theirs) -> None:
    ids = torch.randint(0, SIZES["vocab_size"], (2, 9), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model.head(model(model.embed(ids))), theirs(ids).logits, rtol=0, atol=2e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("safe", [False, True])
def test_a_hugging_face_folder(tied: bool, safe: bool, tmp_path: Path) -> None:
    theirs = transformers_llama(tied=tied)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB", safe_serialization=safe)
    model = load_llama_folder(tmp_path)
    assert (model.lm_head is None) is tied
    assert_same_logits(model, theirs)


def test_a_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="attention_bias"):
        llama_config({**SIZES, "attention_bias": True}, tmp_path)
    with pytest.raises(CheckpointError, match="hidden_size"):
        llama_config({key: value for key, value in SIZES.items() if key != "hidden_size"}, tmp_path)


def write_gguf(path: Path, state: dict[str, Tensor], **changes: object) -> Path:
    """As llama.cpp converts: rotary pairs side by side; matrices in eight bits where their width allows it."""
    writer = gguf.GGUFWriter(path, str(changes.get("architecture", "llama")))
    writer.add_block_count(2)
    writer.add_embedding_length(48)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5e4)
    writer.add_rope_dimension_count(int(str(changes.get("rotated", 12))))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, own in state.items():
        value = own.numpy()
        for end, heads in (("q_proj.weight", 4), ("k_proj.weight", 2)):
            if name.endswith(end):
                value = value.reshape(heads, 2, 6, 48).swapaxes(1, 2).reshape(value.shape)
        stored = table.get_name(name, try_suffixes=(".weight",))
        assert stored is not None
        if stored == "blk.0.ffn_down.weight":
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(stored, gguf.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_a_gguf_file(tied: bool, tmp_path: Path) -> None:
    theirs = transformers_llama(tied=tied)
    state = {name: own for name, own in theirs.state_dict().items() if not (tied and name == "lm_head.weight")}
    # What eight bits hold exactly, so that nothing is lost: whole multiples of one step in each block of 32.
    down = "model.layers.0.mlp.down_proj.weight"
    steps = torch.randint(-126, 127, state[down].shape, generator=torch.Generator().manual_seed(3)).float()
    steps[:, ::32] = 127
    state[down].copy_(steps / 1024)
    model = load_llama_gguf(write_gguf(tmp_path / "m.gguf", state))
    assert (model.lm_head is None) is tied
    assert_same_logits(model, theirs)


def test_gguf_files_that_are_none(tmp_path: Path) -> None:
    state = transformers_llama().state_dict()
    with pytest.raises(CheckpointError, match="no such file"):
        load_llama_gguf(tmp_path / "absent.gguf")
    (tmp_path / "text.gguf").write_text("nothing of the kind, but long enough to be looked at")
    with pytest.raises(CheckpointError, match="GGUF"):
        load_llama_gguf(tmp_path / "text.gguf")
    with pytest.raises(CheckpointError, match="architecture 'phi2'"):
        load_llama_gguf(write_gguf(tmp_path / "phi.gguf", state, architecture="phi2"))
    with pytest.raises(CheckpointError, match="part of each head"):
        load_llama_gguf(write_gguf(tmp_path / "part.gguf", state, rotated=6))


# --- SmolLM2, real weights ----------------------------------------------------------------------------------

PROMPTS = (
    "What is the capital of France?",
    "Describe a kitchen table in three sentences.",
    "Write a short poem about the sea.",
)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[tuple[Llama, Tokenizer]]:
    path = real_weight("smollm2.gguf")
    if path is None:
        pytest.skip("smollm2.gguf is not in the cache; `make real-weights` fetches it")
    file = GgufFile(path)
    yield load_llama_gguf(file), Tokenizer.from_str(gguf_tokenizer_json(file))


def asked(tokenizer: Tokenizer, question: str) -> list[int]:
    return tokenizer.encode(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").ids


@torch.inference_mode()
def greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    """Ids after the prompt, step by step through the cache; no end stops it."""
    cache = model.empty_cache(1, len(prompt) + count)
    ids, position, answer = torch.tensor([prompt]), 0, []
    for _ in range(count):
        states, cache = model.step(model.embed(ids), torch.tensor([position]), cache)
        position += ids.shape[1]
        ids = model.head(states[:, -1:]).argmax(-1)
        answer.append(int(ids))
    return answer


def theirs_greedy(theirs, prompt: list[int], count: int) -> list[int]:
    """The same through transformers' own generation."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with torch.inference_mode():
        return theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def test_smollm2_answers_as_with_transformers(smollm2: tuple[Llama, Tokenizer]) -> None:
    model, tokenizer = smollm2
    theirs = transformers_copy(model)
    prompt = asked(tokenizer, PROMPTS[0])
    answer = greedy(model, prompt, 20)
    assert answer == theirs_greedy(theirs, prompt, 20)
    assert tokenizer.decode(answer).startswith("The capital of France is Paris.")


@pytest.mark.slow
def test_smollm2_long_answers_as_with_transformers_own_reading_of_the_file(smollm2: tuple[Llama, Tokenizer]) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokenizer = smollm2
    path = real_weight("smollm2.gguf")
    assert path is not None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    ).eval()
    for name, own in model.state_dict().items():
        assert torch.equal(own, theirs.state_dict()[f"model.{name}"]), name
    for question in PROMPTS:
        prompt = asked(tokenizer, question)
        assert greedy(model, prompt, 200) == theirs_greedy(theirs, prompt, 200)


@pytest.mark.parametrize("text", ["a  b\n\n c", "1234 apples, it's 5 o'clock", "日本語 🙂 ", " <|im_end|>"])
def test_smollm2_text_comes_back(text: str, smollm2: tuple[Llama, Tokenizer]) -> None:
    _, tokenizer = smollm2
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    digits = [tokenizer.id_to_token(i) for i in ids if any(c.isdigit() for c in tokenizer.decode([i]))]
    assert all(len(digit) == 1 for digit in digits)
