"""The vision half of PixelLLM against the golden vectors, and the properties they do not reach."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.loaders.flax import load_flax, name_table, read_flax
from deixis_train.loaders.golden import config_from_golden
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.config import PRESETS, BertTextConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.point_head import points_to_box, to_pixels, valid_tokens
from deixis_train.models.preprocess import normalize
from deixis_train.models.prompt_encoder import box_prompt, corner_prompt, corners, pixelllm_prompt
from deixis_train.models.resample import resample_matrix, resize

GOLDEN = Path(__file__).parents[1] / "golden" / "pixelllm"
TOLERANCE = 1e-4  # of the largest magnitude of the array


def golden(name: str) -> dict[str, Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def check(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@pytest.fixture(scope="module", autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> PixelLLM:
    model = PixelLLM(config_from_golden(json.loads((GOLDEN / "config.json").read_text())))
    load_flax(model, read_flax(GOLDEN / "params.npz")).raise_if_incomplete()
    return model.eval()


@pytest.fixture(scope="module")
def picture() -> tuple[Tensor, Tensor]:
    data = golden("preprocess")
    return data["image"].float(), data["image_shape"]


# ---- resampling and preprocessing


@pytest.mark.parametrize("case", ["bicubic_up", "bicubic_down", "bicubic_up2", "bilinear_down", "bilinear_up"])
def test_resize_golden(case: str) -> None:
    data = golden("resize")
    want = data[f"{case}_out"]
    check(resize(data[f"{case}_in"], want.shape[1:3], "cubic" if "cubic" in case else "linear"), want)


@pytest.mark.parametrize("case", ["linear_relpos_down", "linear_relpos_up"])
def test_resample_matrix_golden(case: str) -> None:
    data = golden("resize")
    given, want = data[f"{case}_in"], data[f"{case}_out"]
    check(resample_matrix(len(given), len(want), "linear") @ given, want)


@pytest.mark.parametrize("sizes", [(7, 9), (24, 27), (16, 27), (64, 24), (20, 8), (127, 47), (5, 1), (1, 4), (6, 6)])
@pytest.mark.parametrize(("kernel", "mode"), [("linear", "bilinear"), ("cubic", "bicubic")])
def test_resize_equals_antialiased_interpolation(sizes: tuple[int, int], kernel: str, mode: str) -> None:
    n_in, n_out = sizes
    x = torch.randn(2, n_in, n_in + 3, 3, generator=torch.Generator().manual_seed(0))
    # In double precision: PyTorch's float32 weights are themselves some 1e-6 off.
    want = F.interpolate(x.double().permute(0, 3, 1, 2), size=(n_out, n_out + 1), mode=mode, antialias=True)
    want = want.permute(0, 2, 3, 1).float()
    torch.testing.assert_close(resize(x, (n_out, n_out + 1), kernel), want, rtol=0, atol=2e-6)


def test_resample_matrix_refuses_an_unknown_kernel() -> None:
    with pytest.raises(ValueError, match="nearest"):
        resample_matrix(3, 4, "nearest")  # type: ignore[arg-type]


def test_preprocess_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    data = golden("preprocess")
    image, valid_hw = picture
    semantic = model.semantic_preprocess(image, valid_hw)
    check(semantic[:, ::7, ::7], data["git_input_sub7"])
    check(model.sam_preprocess(image, valid_hw)[:, ::7, ::7], data["sam_input_sub7"])
    small = resize(semantic, tuple(data["small_size"].tolist()), "linear")
    check(small[:, ::3, ::3], data["git_input_small_sub3"])


def test_padding_is_exactly_zero(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    image, valid_hw = picture
    out = normalize(image, valid_hw, model.sam_preprocess.mean, model.sam_preprocess.std)
    mask = golden("preprocess")["padding_mask"].bool()
    assert (out[~mask] == 0).all()


# ---- encoders


def outputs_of(modules: dict[str, nn.Module], run) -> dict[str, Tensor]:
    """What the named modules return while `run` is called."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
        for name, module in modules.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def test_eva02_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    data = golden("eva02")
    encoder = model.semantic_encoder
    inputs = model.semantic_preprocess(*picture)
    modules = {f"after_block{i}": block for i, block in enumerate(encoder.blocks)}
    first = encoder.blocks[0]
    modules |= {"patch_embed": encoder.patch_embed, "block0_attn": first.attn, "block0_mlp": first.mlp}
    seen = outputs_of(modules, lambda: check(encoder.tokens(inputs), data["tokens"]))
    assert set(seen) | {"tokens"} == set(data)
    for name, got in seen.items():
        check(got, data[name])


def test_sam_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    data = golden("sam")
    encoder = model.sam_encoder
    inputs = model.sam_preprocess(*picture)
    modules = {f"after_block{i}": block for i, block in enumerate(encoder.blocks)}
    seen = outputs_of(modules | {"patch_embed": encoder.patch_embed}, lambda: check(encoder(inputs), data["features"]))
    assert set(seen) | {"features"} == set(data)
    for name, got in seen.items():
        check(got, data[name])


def test_fused_features_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    scene = model.encode_image(*picture)
    check(model.features(scene), golden("features")["concat"])
    check(scene.sam, golden("sam")["features"])


# ---- prompts


def test_prompt_encoder_golden(model: PixelLLM) -> None:
    data = golden("prompt_encoder")
    encoder = model.prompt_encoder
    assert data["image_size"].tolist() == [encoder.image_size] * 2
    points, labels = data["points"], data["labels"].long()
    check(encoder(points, labels), data["points_embed_nopad"])
    padded = torch.cat([points, torch.zeros(3, 1, 2)], dim=1), torch.cat([labels, torch.full((3, 1), -1)], dim=1)
    check(encoder(*padded), data["points_embed_padded"])
    check(encoder(*corners(data["boxes"])), data["boxes_embed"])
    check(encoder.dense_pe(9, 9), data["dense_pe"])
    check(encoder.dense_pe(3, 5), data["dense_pe_3x5"])
    box_points, _ = corner_prompt(data["boxes"])
    check(box_points[:, :4], data["box_points"])


def test_box_prompt_is_the_golden_sparse_prompt(model: PixelLLM) -> None:
    sparse = golden("prompt_adapter")["sparse_prompt"]
    boxes = golden("prompt_encoder")["boxes"]
    check(model.prompt_encoder(*box_prompt(boxes)), sparse)


def test_pixelllm_prompt_chooses_by_the_box() -> None:
    boxes = torch.tensor([[0.0, 0, 20, 30], [0, 0, 0, 0], [-9, -5, -1, 0]])
    _, labels = pixelllm_prompt(boxes)
    assert labels.tolist() == [[2, 3, -2, -2, -2], [1, 1, 1, 1, -1], [1, 1, 1, 1, -1]]
    points, labels = pixelllm_prompt(boxes, use_box_rate=0)
    assert labels.tolist() == [[1, 1, 1, 1, -1]] * 3
    assert points[0].tolist() == [[0, 0], [20, 0], [0, 30], [20, 30], [0, 0]]


def test_prompt_adapter_golden(model: PixelLLM) -> None:
    data = golden("prompt_adapter")
    index = torch.zeros(3, dtype=torch.int64)
    inputs = data["image_embeddings"][None], index, data["image_pe"], data["sparse_prompt"], data["dense_prompt"]
    check(model.prompt_adapter(*inputs), data["sparse_out"])
    check(model.prompt_adapter.dense_output(*inputs), data["dense_out"])


def test_visual_projection_golden(model: PixelLLM) -> None:
    data = golden("visual_projection")
    check(model.visual_projection(data["x"]), data["y"])


def test_extract_prompt_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    data = golden("e2e_caption_greedy")
    boxes, want = data["in_prompt_boxes"], data["out_visual_features"]
    features = model.features(model.encode_image(*picture))
    index = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    prefix = model.extract_prompt(features, index, *pixelllm_prompt(boxes.flatten(0, 1)))
    check(prefix.unflatten(0, boxes.shape[:2]), want)


# ---- locations


def test_point_predictor_golden(model: PixelLLM) -> None:
    data = golden("point_predictor")
    predictor = model.point_predictor
    assert predictor is not None
    points = predictor(data["feats"])
    check(points, data["coords_rel"])
    check(predictor.spare(data["feats"]), data["logits"])
    check(to_pixels(points[0], data["image_shape_hw"].expand(3, 2)), data["coords_abs"][0])


RULES = {"trace": "begin,end,pad", "ref": "^end-1", "endonly": "^end", "text": "text", "none": ""}


@pytest.mark.parametrize("name", RULES)
def test_valid_tokens_golden(name: str) -> None:
    data = golden("point_predictor")
    assert torch.equal(valid_tokens(data["tokens"], RULES[name], 0, 1), data[f"mask__{name}"].bool())


def test_valid_tokens_refuses_an_unknown_word() -> None:
    with pytest.raises(ValueError, match="'ende'"):
        valid_tokens(torch.zeros(1, 4, dtype=torch.int64), "^ende", 0, 1)


@pytest.mark.parametrize(("array", "rule"), [("box_from_eos_token", "ref"), ("box_from_all_tokens", "trace")])
def test_points_to_box_golden(array: str, rule: str) -> None:
    data = golden("point_predictor")
    valid = valid_tokens(data["tokens_after_eos_zeroed"], RULES[rule], 0, 1)
    check(points_to_box(data["coords_abs"], valid), data[array])


# ---- masks


def test_mask_adapter_golden(model: PixelLLM) -> None:
    data = golden("mask_decoder")
    assert model.mask_adapter is not None
    delta = model.mask_adapter(data["visual"][0], data["text_feats"][0])
    check(data["sparse_embed"] + delta, data["adapted"][0])


def test_mask_decoder_golden(model: PixelLLM) -> None:
    data = golden("mask_decoder")
    image = data["image_embeddings"].expand(3, -1, -1, -1)
    assert model.mask_decoder is not None
    masks, iou = model.mask_decoder(data["adapted"][0], image, data["image_pe"], data["dense"])
    check(masks[:, :1], data["masks_single"])
    check(iou[:, :1], data["iou_single"])
    masks, iou = model.mask_decoder(data["sparse_embed"], image, data["image_pe"], data["dense"])
    check(masks[:, 1:], data["masks_multi_noadapter"])
    check(iou[:, 1:], data["iou_multi_noadapter"])


def test_referring_mask_golden(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    """Mask and IoU of the whole chain, from the golden box and the model's own features."""
    data = golden("e2e_referring")
    rows = data["out_detection_boxes"].flatten(0, 1)
    index = torch.arange(2).repeat_interleave(len(rows) // 2)
    visual = data["out_visual_features"].flatten(0, 1)
    encoded, valid = model.text.encode(visual, data["in_context_tokens"].flatten(0, 1).long())
    _, features = model.text.decode(data["in_text_tokens"].flatten(0, 1).long(), encoded, valid)
    masks, iou = model.mask(model.encode_image(*picture).sam, index, rows, visual, features)
    want = data["out_detection_masks"].flatten(0, 1)
    assert (masks - want).abs().max() / want.abs().max() <= 2e-3
    assert (iou - data["out_iou_predictions"].flatten()).abs().max() <= 2e-3


# ---- the whole model and its checkpoints


VARIANTS = {
    "as it is": {},
    "prompts as wide as the adapter": {"prompt_embed_dim": 48},
    "one output token": {"prompt_adapter": dataclasses.replace(PRESETS["tiny"].prompt_adapter, num_outputs=1)},
    "no gate": {"mask_adapter": dataclasses.replace(PRESETS["tiny"].mask_adapter, gating=False)},
    "BERT head": {"bert": BertTextConfig(vocab=90, emb=32, heads=2, layers=2, mlp=128, max_positions=40)},
    "no LoRA": {"t5": dataclasses.replace(PRESETS["tiny"].t5, enc_rank=0, dec_rank=0)},
    "no heads": {"point_predictor": None, "mask_adapter": None, "mask_decoder": None},
    "other depths": {
        "semantic": dataclasses.replace(PRESETS["tiny"].semantic, depth=1, num_heads=1),
        "sam": dataclasses.replace(PRESETS["tiny"].sam, depth=2, window_size=5, window_block_indexes=(1,)),
    },
}


def in_flax_layout(model: PixelLLM) -> dict[str, np.ndarray]:
    """The model's weights as a Flax tree: the reverse of the loader."""
    state = model.state_dict()
    tree = {}
    for entry in name_table(model):
        arrays = list(state[entry.target]) if entry.stacked else [state[entry.target]]
        for name, array in zip(entry.sources, arrays, strict=True):
            back = {"dense": (1, 0), "conv": (2, 3, 1, 0)}.get(entry.convert.__name__)
            tree[name] = array.permute(back).numpy() if back else array.numpy()
    return tree


@pytest.mark.parametrize("name", VARIANTS)
def test_load_flax_fills_every_variant(name: str) -> None:
    config = dataclasses.replace(PRESETS["tiny"], **VARIANTS[name])
    source, receiver = PixelLLM(config), PixelLLM(config)
    assert sorted(entry.target for entry in name_table(source)) == sorted(source.state_dict())
    load_flax(receiver, in_flax_layout(source)).raise_if_incomplete()
    for key, value in source.state_dict().items():
        assert torch.equal(value, receiver.state_dict()[key]), key


def test_golden_config_is_the_tiny_preset() -> None:
    config = config_from_golden(json.loads((GOLDEN / "config.json").read_text()))
    assert dataclasses.replace(config, name="tiny").to_dict().keys() == PRESETS["tiny"].to_dict().keys()
    for part in ("semantic", "sam", "prompt_adapter", "t5", "mask_decoder", "mask_adapter", "point_predictor"):
        assert getattr(config, part) == getattr(PRESETS["tiny"], part), part


def test_golden_config_without_optional_parts() -> None:
    values = json.loads((GOLDEN / "config.json").read_text())
    for key in ("mask_decoder", "mask_adapter", "point_predictor", "pixel_mean_git"):
        del values[key]
    config = config_from_golden(values)
    assert config.mask_decoder is None and config.mask_adapter is None and config.point_predictor is None
    model = PixelLLM(config)
    report = load_flax(model, read_flax(GOLDEN / "params.npz"))
    assert report.complete and all(n.startswith(("mask_", "point_predictor")) for n in report.unexpected)
    with pytest.raises(ValueError, match="t5"):
        config_from_golden({key: value for key, value in values.items() if key != "t5"})


def test_load_flax_reports_what_does_not_fit(model: PixelLLM) -> None:
    tree = read_flax(GOLDEN / "params.npz")
    del tree["git_backbone/cls_token"]
    tree["sam_backbone/neck/0/kernel"] = np.zeros((3, 3), np.float32)
    tree["prompt_adapter/output_hypernetworks_mlps.0/layers.0/bias"] = np.zeros(3, np.float32)
    tree["something/else"] = np.zeros(1, np.float32)
    report = load_flax(PixelLLM(model.config), tree)
    assert report.missing == ("git_backbone/cls_token",)
    assert report.unexpected == ("something/else",)
    assert len(report.misshapen) == 2 and "sam_backbone/neck/0/kernel" in "".join(report.misshapen)
    assert not report.ignored
    with pytest.raises(CheckpointError, match="git_backbone/cls_token"):
        report.raise_if_incomplete("file")


def _nest(tree: dict[str, np.ndarray]) -> dict:
    nested: dict = {}
    for name, array in tree.items():
        *parents, leaf = name.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = array
    return nested


def _pack(value: object) -> bytes:
    """What Flax writes: arrays as extension 1 of (shape, dtype name, bytes)."""
    import msgpack

    def extension(array: object) -> msgpack.ExtType:
        assert isinstance(array, np.ndarray)
        return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))

    return msgpack.packb(value, default=extension)


@pytest.mark.parametrize("prefix", ["", "params/", "optimizer/target/", "optimizer/target/params/"])
def test_read_flax_npz_and_msgpack_agree(tmp_path: Path, prefix: str) -> None:
    with np.load(GOLDEN / "params.npz") as archive:
        names = [name for name in archive.files if name.startswith("prompt_encoder/")]
        tree = {name: archive[name] for name in names}
    nested = {prefix + name: array for name, array in tree.items()}
    if prefix:
        nested["opt_state/count"] = np.zeros((), np.int32)
    np.savez(tmp_path / "flat.npz", **nested)
    (tmp_path / "tree.msgpack").write_bytes(_pack(_nest(nested)))
    for file in ("flat.npz", "tree.msgpack"):
        got = read_flax(tmp_path / file)
        assert got.keys() == tree.keys()
        assert all(np.array_equal(got[name], tree[name]) for name in tree)


def test_read_flax_chunked_and_bfloat16(tmp_path: Path) -> None:
    import msgpack

    values = np.arange(6, dtype=np.float32)
    chunked = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": 2, "1": 3},
        "chunks": {"0": values[:4], "1": values[4:]},
    }
    half = (values.view(np.uint32) >> 16).astype(np.uint16)
    bfloat = msgpack.ExtType(1, msgpack.packb(((6,), "bfloat16", half.tobytes())))
    (tmp_path / "a").write_bytes(_pack({"params": {"big": chunked, "half": bfloat}}))
    tree = read_flax(tmp_path / "a")
    assert np.array_equal(tree["big"], values.reshape(2, 3)) and np.array_equal(tree["half"], values)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short", b"\x80"])
def test_read_flax_refuses_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.npz"):
        read_flax(tmp_path / "a.npz")


def test_fusion_on_the_semantic_grid(picture: tuple[Tensor, Tensor]) -> None:
    """With `first`, an encoder seen at a smaller size decides the grid and SAM's map is shrunk to it."""
    config = dataclasses.replace(PRESETS["tiny"], semantic_size=70, fusion_grid="first")
    model = PixelLLM(config).eval()
    scene = model.encode_image(*picture)
    assert scene.semantic.shape[1:3] == scene.sam_on_grid.shape[1:3] == (5, 5)
    assert scene.sam.shape[1:3] == (8, 8)
    check(scene.sam_on_grid, resize(scene.sam, (5, 5), "cubic"))


def test_prompts_of_several_pictures_equal_one_by_one(model: PixelLLM, picture: tuple[Tensor, Tensor]) -> None:
    features = model.features(model.encode_image(*picture))
    boxes = torch.tensor([[3.0, 4, 50, 60], [0, 0, 0, 0], [10, 20, 30, 90]])
    index = torch.tensor([1, 0, 1])
    points, labels = pixelllm_prompt(boxes)
    together = model.extract_prompt(features, index, points, labels)
    for i in range(3):
        picture_map = features[index[i]][None]
        alone = model.extract_prompt(
            picture_map, torch.zeros(1, dtype=torch.int64), points[i : i + 1], labels[i : i + 1]
        )
        check(alone, together[i : i + 1])


def test_dense_prompt_fusion_gives_a_token_per_place(picture: tuple[Tensor, Tensor]) -> None:
    model = PixelLLM(dataclasses.replace(PRESETS["tiny"], prompt_fuse="dense")).eval()
    features = model.features(model.encode_image(*picture))
    prompt = pixelllm_prompt(torch.tensor([[3.0, 4, 50, 60]]))
    prefix = model.extract_prompt(features, torch.tensor([1]), *prompt)
    assert prefix.shape == (1, model.grid**2, model.config.t5.emb)


def test_a_fresh_mask_adapter_changes_nothing() -> None:
    model = PixelLLM(PRESETS["tiny"]).eval()
    assert model.mask_adapter is not None
    delta = model.mask_adapter(torch.randn(2, 6, 32), torch.randn(2, 14, 32))
    assert (delta == 0).all()
