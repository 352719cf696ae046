"""Loaders of published checkpoint formats, on small made-up files of the same layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from deixis_train.loaders.eva02 import load_eva02
from deixis_train.loaders.mobile_sam import load_mobile_sam
from deixis_train.loaders.report import CheckpointError, LoadReport
from deixis_train.loaders.sam import load_sam
from deixis_train.loaders.t5 import load_t5
from deixis_train.models.config import PRESETS, T5Config, TinyVitConfig
from deixis_train.models.eva02 import Eva02
from deixis_train.models.mask import MaskDecoder
from deixis_train.models.prompt_encoder import PromptEncoder
from deixis_train.models.sam_vit import SamVit
from deixis_train.models.t5 import T5
from deixis_train.models.tiny_vit import TinyVit

Tensors = dict[str, Tensor]
TINY = PRESETS["tiny"]
DIM = TINY.prompt_embed_dim
SMALL_VIT = TinyVitConfig(embed_dims=(8, 12, 16, 20), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), out_chans=DIM)
SMALL_T5 = T5Config(vocab=96, emb=32, heads=2, head_dim=16, layers=2, mlp=40, enc_rank=0, dec_rank=0)


def filled(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def sam_image_encoder() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `image_encoder` as SAM's files have them, at the size of the tiny preset."""
    c = TINY.sam
    d, table, head = c.embed_dim, c.img_size // c.patch_size, c.embed_dim // c.num_heads
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, table, table, d),
        "patch_embed.proj.weight": (d, 3, c.patch_size, c.patch_size),
        "patch_embed.proj.bias": (d,),
        "neck.0.weight": (c.out_chans, d, 1, 1),
        "neck.2.weight": (c.out_chans, c.out_chans, 3, 3),
        **{f"neck.{i}.{n}": (c.out_chans,) for i in (1, 3) for n in ("weight", "bias")},
    }
    for i in range(c.depth):
        side = 2 * (c.window_size if i in c.window_block_indexes else table) - 1
        block = {f"{norm}.{n}": (d,) for norm in ("norm1", "norm2") for n in ("weight", "bias")}
        block |= {"attn.rel_pos_h": (side, head), "attn.rel_pos_w": (side, head)}
        linears = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.lin1": (4 * d, d), "mlp.lin2": (d, 4 * d)}
        for name, shape in linears.items():
            block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {f"image_encoder.{name}": shape for name, shape in shapes.items()}


def sam_heads() -> tuple[PromptEncoder, MaskDecoder]:
    assert TINY.mask_decoder is not None
    return PromptEncoder(DIM, TINY.image_size), MaskDecoder(TINY.mask_decoder, DIM)


def heads_file() -> Tensors:
    """Prompt encoder and mask decoder carry SAM's names already; that these are right is tested on the real file."""
    prompt_encoder, mask_decoder = sam_heads()
    shapes = {f"prompt_encoder.{n}": tuple(t.shape) for n, t in prompt_encoder.state_dict().items()}
    shapes |= {f"mask_decoder.{n}": tuple(t.shape) for n, t in mask_decoder.state_dict().items()}
    shapes |= {"prompt_encoder.mask_downscaling.0.weight": (4, 1, 2, 2), "prompt_encoder.mask_downscaling.0.bias": (4,)}
    return filled(shapes, seed=1)


def eva02_file(timm: bool) -> Tensors:
    """EVA02 under the original's names, or under timm's."""
    c = TINY.semantic
    d, hidden = c.embed_dim, int(c.embed_dim * c.mlp_ratio)
    gate, value, norm, down = ("fc1_g", "fc1_x", "norm", "fc2") if timm else ("w1", "w2", "ffn_ln", "w3")
    bias = "{}_proj.bias" if timm else "{}_bias"
    last = "fc_norm" if timm else "norm"
    table = (c.pretrain_img_size // c.patch_size) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, table + 1, d),
        "patch_embed.proj.weight": (d, 3, c.patch_size, c.patch_size),
        "patch_embed.proj.bias": (d,),
        f"{last}.weight": (d,),
        f"{last}.bias": (d,),
        "head.weight": (10, d),
        "head.bias": (10,),
        "rope.freqs_cos": (4, 4),
        "blocks.0.attn.rope.freqs_sin": (4, 4),
        "mask_token": (1, 1, d),
    }
    for i in range(c.depth):
        block: dict[str, tuple[int, ...]] = {f"attn.{p}_proj.weight": (d, d) for p in "qkv"}
        block |= {f"attn.{bias.format(p)}": (d,) for p in "qv"}
        block |= {"attn.proj.weight": (d, d), "attn.proj.bias": (d,)}
        block |= {f"{n}.{p}": (d,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
        block |= {f"mlp.{n}.weight": (hidden, d) for n in (gate, value)}
        block |= {f"mlp.{n}.bias": (hidden,) for n in (gate, value, norm)}
        block |= {f"mlp.{norm}.weight": (hidden,), f"mlp.{down}.weight": (d, hidden), f"mlp.{down}.bias": (d,)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return filled(shapes)


def t5_file() -> Tensors:
    c = SMALL_T5
    inner, buckets = c.heads * c.head_dim, c.relpos_buckets
    tables = ("shared.weight", "encoder.embed_tokens.weight", "lm_head.weight")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tables, (c.vocab, c.emb))
    for stack, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        shapes[f"{stack}.final_layer_norm.weight"] = (c.emb,)
        shapes[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (buckets, c.heads)
        for i in range(c.layers):
            for j, attention in enumerate(attentions):
                layer = f"{stack}.block.{i}.layer.{j}"
                shapes |= {f"{layer}.{attention}.{p}.weight": (inner, c.emb) for p in "qkv"}
                shapes |= {f"{layer}.{attention}.o.weight": (c.emb, inner), f"{layer}.layer_norm.weight": (c.emb,)}
            layer = f"{stack}.block.{i}.layer.{len(attentions)}"
            shapes |= {f"{layer}.DenseReluDense.{p}.weight": (c.mlp, c.emb) for p in ("wi_0", "wi_1")}
            shapes[f"{layer}.DenseReluDense.wo.weight"] = (c.emb, c.mlp)
            shapes[f"{layer}.layer_norm.weight"] = (c.emb,)
    return filled(shapes)


@dataclass
class Case:
    """A format: a whole file of it, how to load it into fresh modules, and a name to spoil."""

    file: Tensors
    load: Callable[[Path], tuple[LoadReport, list[nn.Module]]]
    suffix: str
    victim: str  # a name of the file, two-dimensional
    reported: str  # the name under which the report speaks of it
    ignored: tuple[str, ...]


def _sam(path: Path) -> tuple[LoadReport, list[nn.Module]]:
    modules = [SamVit(TINY.sam, TINY.image_size), *sam_heads()]
    return load_sam(path, *modules), modules


def _mobile_sam(path: Path) -> tuple[LoadReport, list[nn.Module]]:
    encoder = TinyVit(SMALL_VIT, 64)
    heads = sam_heads()
    return load_mobile_sam(path, encoder, *heads), [encoder, *heads]


def _eva02(path: Path) -> tuple[LoadReport, list[nn.Module]]:
    model = Eva02(TINY.semantic, TINY.image_size)
    return load_eva02(path, model), [model]


def _t5(path: Path) -> tuple[LoadReport, list[nn.Module]]:
    model = T5(SMALL_T5)
    return load_t5(path, model), [model]


def make_case(kind: str) -> Case:
    if kind == "sam":
        file = filled(sam_image_encoder()) | heads_file()
        victim, ignored = "image_encoder.blocks.1.mlp.lin2.weight", ("prompt_encoder.mask_downscaling.0.bias",)
        return Case(file, _sam, ".pth", victim, victim, ignored)
    if kind == "mobile_sam":
        encoder = {f"image_encoder.{n}": tuple(t.shape) for n, t in TinyVit(SMALL_VIT, 64).state_dict().items()}
        encoder |= {"image_encoder.norm_head.weight": (20,), "image_encoder.head.weight": (10, 20)}
        victim, ignored = "image_encoder.layers.1.blocks.0.attn.attention_biases", ("image_encoder.head.weight",)
        return Case(filled(encoder) | heads_file(), _mobile_sam, ".pt", victim, victim, ignored)
    if kind == "t5":
        victim = "decoder.block.1.layer.1.EncDecAttention.q.weight"
        return Case(t5_file(), _t5, ".safetensors", victim, victim, ("encoder.embed_tokens.weight",))
    timm = kind == "eva02_timm"
    victim = "blocks.1.mlp.fc1_x.weight" if timm else "blocks.1.mlp.w2.weight"
    ignored = ("head.weight", "rope.freqs_cos", "blocks.0.attn.rope.freqs_sin", "mask_token")
    suffix = ".safetensors" if timm else ".pt"
    return Case(eva02_file(timm), _eva02, suffix, victim, "blocks.1.mlp.w2.weight", ignored)


@pytest.fixture(params=["sam", "mobile_sam", "eva02", "eva02_timm", "t5"])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def write(case: Case, folder: Path) -> Path:
    path = folder / f"weights{case.suffix}"
    if case.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in case.file.items()}, path)
    else:
        torch.save(case.file, path)
    return path


def test_whole_file(case: Case, tmp_path: Path) -> None:
    report, modules = case.load(write(case, tmp_path))
    assert report.raise_if_incomplete() is report
    assert report.unexpected == ()
    assert set(case.ignored) <= set(report.ignored)
    # Every value of the file that is not ignored has arrived somewhere, and nothing else is in the modules.
    arrived = sorted(
        float(tensor.double().sum())
        for module in modules
        for name, tensor in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    )
    counted = [n for n in case.file if n not in report.ignored and not n.endswith("num_batches_tracked")]
    sent = sorted(float(case.file[name].double().sum()) for name in counted)
    assert arrived == pytest.approx(sent, abs=1e-9)


def test_missing(case: Case, tmp_path: Path) -> None:
    del case.file[case.victim]
    report, _ = case.load(write(case, tmp_path))
    assert report.missing == (case.reported,)
    with pytest.raises(CheckpointError, match="1 missing") as error:
        report.raise_if_incomplete("weights.bin")
    assert str(error.value).startswith("weights.bin: ") and "\n" not in str(error.value)


def test_unexpected(case: Case, tmp_path: Path) -> None:
    case.file["image_encoder.extra.weight"] = torch.zeros(2)
    case.file["somewhere.else"] = torch.zeros(2)
    report, _ = case.load(write(case, tmp_path))
    assert set(report.unexpected) == {"image_encoder.extra.weight", "somewhere.else"}
    report.raise_if_incomplete()


def test_misshapen(case: Case, tmp_path: Path) -> None:
    rows, columns = case.file[case.victim].shape
    case.file[case.victim] = torch.zeros(rows, columns + 1)
    report, _ = case.load(write(case, tmp_path))
    assert report.misshapen == (f"{case.reported}: file {(rows, columns + 1)}, model {(rows, columns)}",)
    with pytest.raises(CheckpointError, match="1 misshapen"):
        report.raise_if_incomplete()


def test_truncated(case: Case, tmp_path: Path) -> None:
    path = write(case, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError) as error:
        case.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_foreign(case: Case, tmp_path: Path) -> None:
    case.file = {"weight": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"not an? .* checkpoint"):
        case.load(write(case, tmp_path))


def test_absent(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        case.load(tmp_path / f"nowhere{case.suffix}")


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_junk(case: Case, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / f"junk{case.suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        case.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": {"a": torch.zeros(1)}}, Path("/")])
def test_pickles_other_than_tensors_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"not a (flat state dict|PyTorch file)"):
        load_sam(path, SamVit(TINY.sam, TINY.image_size))


def test_mask_prompts_are_filled_where_a_model_has_them(tmp_path: Path) -> None:
    theirs, ours = (
        PromptEncoder(DIM, TINY.image_size, mask_channels=8),
        PromptEncoder(DIM, TINY.image_size, mask_channels=8),
    )
    tensors = {f"prompt_encoder.{name}": value.clone() for name, value in theirs.state_dict().items()}
    with torch.no_grad():
        for name, value in tensors.items():
            value.copy_(filled({name: tuple(value.shape)}, seed=3)[name])
    path = tmp_path / "sam.pth"
    torch.save(tensors, path)
    report = load_sam(path, prompt_encoder=ours)
    report.raise_if_incomplete(path)
    assert not report.ignored
    assert all(torch.equal(value, tensors[f"prompt_encoder.{name}"]) for name, value in ours.state_dict().items())


def test_parts_not_asked_for_are_ignored(tmp_path: Path) -> None:
    case = make_case("sam")
    prompt_encoder, _ = sam_heads()
    report = load_sam(write(case, tmp_path), prompt_encoder=prompt_encoder)
    assert report.complete and not report.unexpected
    assert "mask_decoder.iou_token.weight" in report.ignored and "image_encoder.pos_embed" in report.ignored


def test_batchnorm_counters_are_not_needed(tmp_path: Path) -> None:
    case = make_case("mobile_sam")
    case.file = {name: tensor for name, tensor in case.file.items() if not name.endswith("num_batches_tracked")}
    report, _ = case.load(write(case, tmp_path))
    assert report.complete


def test_eva02_under_both_names_at_once(tmp_path: Path) -> None:
    case = make_case("eva02")
    case.file["blocks.0.attn.q_proj.bias"] = torch.zeros_like(case.file["blocks.0.attn.q_bias"])
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.q_bias is there twice"):
        case.load(write(case, tmp_path))


@pytest.mark.parametrize("shard_size", ["1GB", "40KB"])
def test_t5_equals_transformers(tmp_path: Path, shard_size: str) -> None:
    """A file written by transformers, whole and sharded, gives the logits transformers computes."""
    transformers = pytest.importorskip("transformers")
    c = SMALL_T5
    config = transformers.T5Config(
        vocab_size=c.vocab, d_model=c.emb, d_kv=c.head_dim, d_ff=c.mlp, num_layers=c.layers, num_heads=c.heads,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for (
            parameter
        ) in theirs.parameters():  # transformers starts norms at 1 and tables near 0, which would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "1GB")

    ours = T5(replace(c, enc_rank=2, dec_rank=2)).eval()  # untrained LoRA changes nothing
    report = load_t5(tmp_path, ours).raise_if_incomplete()
    assert not report.unexpected
    context, ids = torch.tensor([[5, 9, 33, 70, 1]]), torch.tensor([[0, 7, 8, 95]])
    with torch.inference_mode():
        expected = theirs(input_ids=context, decoder_input_ids=ids).logits
        encoded, valid = ours.encode(torch.zeros(1, 0, c.emb), context)
        # One token more: our last position is inactive by the reference's rule.
        logits, _ = ours.decode(torch.cat([ids, torch.ones(1, 1, dtype=torch.long)], dim=1), encoded, valid)
    assert logits is not None
    torch.testing.assert_close(logits[:, :-1], expected, rtol=1e-4, atol=1e-5)


def shards(folder: Path) -> Path:
    """The T5 file in two shards with their index."""
    tensors = t5_file()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, inside in parts.items() for name in inside}}))
    return index


def test_sharded_t5(tmp_path: Path) -> None:
    index = shards(tmp_path)
    for path in (index, tmp_path):
        assert _t5(path)[0].complete


def test_shard_absent(tmp_path: Path) -> None:
    index = shards(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: no such file"):
        _t5(index)


def test_shard_lacks_a_tensor(tmp_path: Path) -> None:
    index = shards(tmp_path)
    save_file({"other": torch.zeros(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(CheckpointError, match="which the index places there"):
        _t5(index)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        _t5(index)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds neither"):
        _t5(tmp_path)


def test_tiny_vit_keeps_its_function_when_fused() -> None:
    torch.manual_seed(0)
    model = TinyVit(SMALL_VIT, 96)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.3)
        image = torch.randn(2, 96, 96, 3)
        before = model(image)
        assert before.shape == (2, 6, 6, DIM)
        after = model.fuse_batchnorm().fuse_batchnorm()(image)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_tiny_vit_never_moves_its_statistics() -> None:
    model = TinyVit(SMALL_VIT, 64).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.randn(1, 64, 64, 3))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("size", [0, -32, 100])
def test_tiny_vit_refuses_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        TinyVit(SMALL_VIT, size)
