"""GLaMM against what the official modules computed, and properties that hold for any weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import pytest
import torch
from glamm_goldens import arrays, assert_close, golden_model, manifest, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deixis.conversation import IMAGE_ID
from deixis_train.loaders.glamm_names import glamm_names, load_clip_state, load_glamm_state
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.glamm import reference
from deixis_train.models.glamm.clip import ClipVision
from deixis_train.models.glamm.config import GLAMM_PRESETS, ClipConfig, GlammConfig, LlamaConfig, RegionConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.models.glamm.llama import Llama
from deixis_train.models.glamm.region_encoder import RegionEncoder
from deixis_train.models.glamm.roi_align import roi_align

TINY = GLAMM_PRESETS["glamm-tiny"]
few = settings(max_examples=12, deadline=None)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@functools.cache
def tiny_model() -> Glamm:
    torch.manual_seed(0)
    return _shaken(Glamm(TINY).eval())


def _shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter matters: none is left at 0 or 1."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@functools.cache
def golden_levels() -> list[Tensor]:
    """The hidden states that the golden region encoder was given [2, 24, 24, C]."""
    golden = arrays("clip")
    return [golden[f"level{i}"].unflatten(1, (24, 24)) for i in range(4)]


# ---- golden vectors: pictures


def test_clip_and_the_projector() -> None:
    model, golden = golden_model(), arrays("clip")
    images = torch.cat([picture(i).global_image for i in (0, 1)])
    features, levels = model.encode_global(images)
    assert model.region_layers == tuple(golden["selected_hidden_indices"].tolist())
    for i, level in enumerate(levels):
        assert_close(level.flatten(1, 2), golden[f"level{i}"])
    states = model.clip((images - model.clip_mean) / model.clip_std)
    assert_close(states[-1][:, 0], golden["cls_level3"])
    assert_close(states[0][:, ::24], golden["embeddings_after_preln_stride"])
    projector = arrays("projector")
    assert_close(features[:, projector["tok_idx"]], projector["output"])


def test_the_picture_of_clip_is_normalised_as_published() -> None:
    model, golden = golden_model(), arrays("preprocess")
    for i in (0, 1):
        normal = (picture(i).global_image - model.clip_mean) / model.clip_std
        assert_close(normal[0].permute(2, 0, 1)[:, ::8, ::8], golden[f"clip{i}_pixels_stride8"], 1e-6)
        prepared = model.sam_preprocess(picture(i).image, picture(i).valid_hw)
        assert_close(prepared[0].permute(2, 0, 1), golden[f"sam{i}_input"], 1e-6)


def test_region_encoder() -> None:
    encoder, golden = golden_model().region_encoder, arrays("region_encoder")
    assert encoder is not None
    boxes, index = torch.cat([golden["boxes0"], golden["boxes1"]]), torch.tensor([0, 0, 0, 1, 1])
    fused = encoder.fuse(golden_levels())
    for i, stride in enumerate((16, 8, 4, 2)):
        assert_close(fused[i][:, :, ::stride, ::stride], golden[f"fused_l{i}_stride{stride}"])
    head = encoder.roi_align
    crops = head.crops(fused, boxes, index)
    for i in (0, 3):
        assert_close(crops[i][[0, 4]], golden[f"roi_l{i}_boxes_0_4"])
    assert_close(head.pos_embedd(boxes), golden["pos_embed"])
    assert_close(head(fused, boxes, index), torch.cat([golden["out0"], golden["out1"]]))


def test_grounding_encoder() -> None:
    encoder, golden = golden_model().sam_encoder, arrays("sam_image_encoder")
    pixels = golden["pixels"].permute(0, 2, 3, 1)
    x = encoder.patch_embed(pixels) + encoder.pos_embed
    for i, block in enumerate(encoder.blocks):
        x = block(x)
        assert_close(x, golden[f"block{i}"])
    assert_close(encoder(pixels).permute(0, 3, 1, 2), golden["embedding"])


# ---- golden vectors: text


def test_language_model() -> None:
    llama, golden = golden_model().llama, arrays("llm_text")
    valid = golden["attention_mask"].bool()
    embeds = llama.embed(golden["input_ids"])
    states = llama(embeds, valid)
    assert_close(embeds, golden["hidden0"])
    assert_close(llama(embeds, valid, layers=1)[valid], golden["hidden1"][valid])
    assert_close(states[valid], golden["hidden2"][valid])
    assert_close(llama.head(states)[valid], golden["logits"][valid])


@pytest.mark.parametrize("prompt", ["A", "B"])
def test_pictures_and_regions_in_text(prompt: str) -> None:
    model, golden, levels = golden_model(), arrays("splice_and_llm"), golden_levels()
    which = "AB".index(prompt)
    visual = model.projector(arrays("clip")["level3"][which])
    boxes = golden.get(f"{prompt}_boxes", torch.zeros(0, 4))
    if len(boxes):
        regions = model.encode_regions([level[[which]] for level in levels], boxes, torch.zeros(len(boxes)).long())
        visual = torch.cat([visual, regions])
    ids = reference.expand_ids(golden[f"{prompt}_input_ids"][0].tolist(), model.config.clip.tokens)
    assert len(ids) == golden[f"{prompt}_len"]
    index = reference.embed_index(ids, model.config.ids.region, len(boxes))
    embeds = model.splice(ids[None], visual, index[None])
    at = golden[f"{prompt}_pos"]
    assert_close(embeds[0, at], golden[f"{prompt}_embeds_at_pos"])
    assert_close(model.llama(embeds, layers=1)[0, at], golden[f"{prompt}_layer1_hidden_at_pos"])
    states = model.llama(embeds)[0, at]
    assert_close(states, golden[f"{prompt}_final_hidden_at_pos"])
    assert_close(model.llama.head(states), golden[f"{prompt}_logits_at_pos"])


# ---- golden vectors: masks


def test_mask_projection() -> None:
    golden = arrays("text_hidden_fcs")
    assert_close(golden_model().mask_projection(golden["input"]), golden["output"])


def test_prompts_and_mask_decoder() -> None:
    model, golden = golden_model(), arrays("sam_prompt_and_decoder")
    text, encoder = golden["text_embeds"], model.prompt_encoder
    sam = arrays("sam_image_encoder")["embedding"][:1].permute(0, 2, 3, 1)
    pe = encoder.dense_pe(8, 8)
    assert_close(pe.permute(2, 0, 1)[None], golden["dense_pe"])
    assert_close(encoder.no_mask()[:, :, None, None].expand(3, -1, 8, 8), golden["dense"])
    points = torch.cat([golden["points"], golden["boxes"].unflatten(1, (2, 2))], dim=1)
    labels = torch.cat([golden["point_labels"], torch.tensor([[2, 3]]).expand(2, -1)], dim=1)
    assert_close(torch.cat([encoder(points, labels), text[:2]], dim=1), golden["sparse_all"])
    assert_close(encoder.embed_masks(golden["mask_in"][:, 0]).permute(0, 3, 1, 2), golden["dense_all"])

    masks, iou = model.mask_decoder(golden["sparse"], sam.expand(3, -1, -1, -1), pe, encoder.no_mask())
    assert_close(masks[:, :1], golden["low_res"])
    assert_close(iou[:, :1], golden["iou"])
    assert_close(masks[:, 1:], golden["low_res_multi"])
    assert_close(iou[:, 1:], golden["iou_multi"])
    resized, original = (tuple(golden[key].tolist()) for key in ("post_input_hw", "post_orig_hw"))
    assert_close(reference.postprocess(masks[:, 0], resized, original), golden["post"][:, 0])


@pytest.mark.parametrize(("case", "which"), [("noregion", 0), ("region", 1), ("short", 0)])
def test_whole_answers(case: str, which: int) -> None:
    model, golden = golden_model(), {k.removeprefix(f"{case}_"): v for k, v in arrays("e2e_generate").items()}
    ids, start = golden["output_ids"].tolist(), int(golden["prompt_len"])
    boxes = golden["boxes"] if case == "region" else None
    # "region" ends by itself, the others where the reference was told to.
    budget = 40 if case == "region" else len(ids) - start
    result = reference.generate(model, ids[:start], picture(which), boxes, budget)
    assert result.ids.tolist() == ids
    assert result.mask_positions.tolist() == golden["seg_expanded_pos"].tolist()
    assert_close(result.states, golden["seg_hidden"])
    assert_close(model.mask_projection(result.states), golden["seg_prompt_embed"])
    assert_close(result.logits, golden["low_res"][:, 0])
    assert_close(result.iou, golden["iou"][:, 0])
    resized, original = (tuple(golden[key].tolist()) for key in ("resize_hw", "orig_hw"))
    assert_close(reference.postprocess(result.logits, resized, original), golden["pred_masks"])


def test_masks_of_a_given_text() -> None:
    model, golden = golden_model(), arrays("res_teacher_forced")
    result = reference.teacher_forced(model, golden["input_ids"][0].tolist(), picture(1))
    resized = tuple(golden["resize"].tolist())
    original = tuple(golden["pred_masks"].shape[1:])
    assert_close(reference.postprocess(result.logits, resized, original), golden["pred_masks"])


# ---- the language model


@st.composite
def llama_cases(draw: st.DrawFn) -> tuple[LlamaConfig, int, list[int], int]:
    """Sizes, rows, widths of the steps, and slots of the cache that stay empty."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    config = LlamaConfig(
        vocab=40,
        emb=24,
        layers=2,
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 8])),
        mlp=20,
        tied=draw(st.booleans()),
        lora_rank=draw(st.sampled_from([0, 3])),
    )
    widths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    return config, draw(st.integers(1, 3)), widths, draw(st.integers(0, 7))


@few
@given(llama_cases())
def test_step_by_step_is_the_whole_pass(case: tuple[LlamaConfig, int, list[int], int]) -> None:
    config, rows, widths, spare = case
    torch.manual_seed(1)
    llama = _shaken(Llama(config).eval())
    embeds = torch.randn(rows, sum(widths), config.emb)
    whole = llama(embeds)
    # What lies in unwritten slots must not matter.
    cache = [(k + 7, v - 3) for k, v in llama.empty_cache(rows, sum(widths) + spare)]
    found, position = [], 0
    for width in widths:
        states, cache = llama.step(embeds[:, position : position + width], torch.tensor([position]), cache)
        found.append(states)
        position += width
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert llama.head(whole).shape == (rows, sum(widths), config.vocab)


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 3))
def test_padding_does_not_matter(lengths: list[int], more: int) -> None:
    llama = tiny_model().llama
    torch.manual_seed(2)
    embeds = torch.randn(len(lengths), max(lengths) + more, TINY.llama.emb)
    valid = torch.arange(embeds.shape[1])[None] < torch.tensor(lengths)[:, None]
    together = llama(embeds.masked_fill(~valid[..., None], 50.0), valid)
    assert together.isfinite().all()
    for row, length in enumerate(lengths):
        alone = llama(embeds[[row], :length])
        torch.testing.assert_close(together[[row], :length], alone, rtol=1e-4, atol=1e-5)


def test_shared_keys_are_the_same_as_repeated_ones() -> None:
    grouped = dataclasses.replace(TINY.llama, heads=4, kv_heads=2)
    few_heads = _shaken(Llama(grouped).eval())
    full = Llama(dataclasses.replace(grouped, kv_heads=4)).eval()
    weights = few_heads.state_dict()
    for name in [name for name in weights if "k_proj" in name or "v_proj" in name]:
        # Heads 0 and 1 share the first head of keys, 2 and 3 the second.
        weights[name] = weights[name].unflatten(0, (2, 1, -1)).expand(-1, 2, -1, -1).flatten(0, 2)
    full.load_state_dict(weights)
    embeds = torch.randn(2, 7, grouped.emb)
    torch.testing.assert_close(few_heads(embeds), full(embeds), rtol=1e-4, atol=1e-5)


def test_merged_lora_is_the_same_function_and_starts_as_none() -> None:
    config = dataclasses.replace(TINY.llama, lora_rank=4)
    llama = Llama(config).eval()
    embeds = torch.randn(2, 5, config.emb)
    plain = Llama(dataclasses.replace(config, lora_rank=0)).eval()
    plain.load_state_dict({k: v for k, v in llama.state_dict().items() if "lora" not in k})
    torch.testing.assert_close(llama(embeds), plain(embeds))
    _shaken(llama)
    before = llama(embeds)
    after = llama.merge_lora()(embeds)
    assert not any("lora" in name for name in llama.state_dict())
    assert not torch.allclose(before, plain(embeds), atol=1e-3)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("change", "says"), [({"kv_heads": 3}, "evenly"), ({"head_dim": 5}, "even head width")])
def test_sizes_that_cannot_be(change: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Llama(dataclasses.replace(TINY.llama, **change))


# ---- regions


def _roi_by_loops(plane: Tensor, box: list[float], size: int, scale: float) -> Tensor:
    """RoIAlign of one plane, sample by sample."""
    height, width = plane.shape

    def sample(y: float, x: float) -> float:
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0.0
        y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
        y0, x0 = math.floor(y), math.floor(x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        top = float(plane[y0, x0]) * (1 - x + x0) + float(plane[y0, x1]) * (x - x0)
        return top * (1 - y + y0) + (float(plane[y1, x0]) * (1 - x + x0) + float(plane[y1, x1]) * (x - x0)) * (y - y0)

    left, up, right, down = (value * scale - 0.5 for value in box)
    result = torch.zeros(size, size)
    for i in range(size):
        for j in range(size):
            ys = [up + (down - up) * (i + s) / size for s in (0.25, 0.75)]
            xs = [left + (right - left) * (j + s) / size for s in (0.25, 0.75)]
            result[i, j] = sum(sample(y, x) for y in ys for x in xs) / 4
    return result


@few
@given(
    st.lists(st.tuples(*[st.floats(-6, 16, width=32)] * 4, st.integers(0, 1)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from([0.5, 1.0, 1.6]),
)
def test_roi_align_is_its_definition(
    boxes: list[tuple[float, float, float, float, int]], shape: tuple[int, int], scale: float
) -> None:
    torch.manual_seed(3)
    maps = torch.randn(2, 3, *shape)
    index = torch.tensor([box[4] for box in boxes])
    found = roi_align(maps, torch.tensor([box[:4] for box in boxes]), index, 3, scale)
    for k, box in enumerate(boxes):
        expected = torch.stack([_roi_by_loops(plane, list(box[:4]), 3, scale) for plane in maps[index[k]]])
        torch.testing.assert_close(found[k], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_roi_align_learns_and_is_one_operator_of_a_trace() -> None:
    maps, index = torch.randn(2, 3, 5, 6), torch.tensor([1, 0, 1])
    boxes = torch.tensor([[0.5, 1, 4, 4.5], [-2, -1, 3, 9], [2, 2, 2, 2]])
    with torch.enable_grad():
        learning = maps.clone().requires_grad_()
        roi_align(learning, boxes, index, 4, 1.0).square().sum().backward()
    assert learning.grad is not None
    step, direction = 1e-2, torch.randn_like(maps)
    change = sum(
        sign * float(roi_align(maps + sign * step * direction, boxes, index, 4, 1.0).double().square().sum())
        for sign in (1, -1)
    )
    assert change / (2 * step) == pytest.approx(float((learning.grad * direction).sum()), rel=1e-2)

    traced = torch.jit.trace(lambda m, b, i: roi_align(m, b, i, 4, 0.5), (maps, boxes, index), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes() if "roi" in node.kind()] == ["deixis::roi_align"]
    torch.testing.assert_close(traced(maps, boxes[:1], index[:1]), roi_align(maps, boxes[:1], index[:1], 4, 0.5))


def test_a_box_is_embedded_alike_alone_and_among_others() -> None:
    model = tiny_model()
    _, levels = model.encode_global(torch.rand(2, 112, 112, 3) * 255)
    boxes = torch.tensor([[0, 0, 1, 1], [0.2, 0.3, 0.6, 0.9], [0.5, 0.1, 0.8, 0.4]])
    together = model.encode_regions(levels, boxes, torch.tensor([1, 0, 1]))
    for row, image in enumerate([1, 0, 1]):
        alone = model.encode_regions([level[[image]] for level in levels], boxes[[row]], torch.tensor([0]))
        torch.testing.assert_close(together[[row]], alone, rtol=1e-4, atol=1e-4)
    assert model.encode_regions(levels, boxes[:0], torch.zeros(0).long()).shape == (0, TINY.llama.emb)


@pytest.mark.parametrize("grid", [3, 8])
@pytest.mark.parametrize("levels", [1, 2])
def test_other_grids_and_levels(grid: int, levels: int) -> None:
    clip = ClipConfig(
        embed_dim=16, depth=5, num_heads=2, mlp_dim=20, patch_size=8, image_size=8 * grid, select_layer=-1
    )
    region = RegionConfig(levels=levels, rounds=1, groups=4, crop=3, frame=8 * grid, hidden_dim=12, position_dim=6)
    config = dataclasses.replace(TINY, clip=clip, region=region)
    assert config.region_layers == (2, 5)[-levels:]
    states = ClipVision(clip)(torch.randn(2, 8 * grid, 8 * grid, 3))
    assert [tuple(state.shape) for state in states] == [(2, 1 + grid**2, 16)] * 6
    maps = [states[i][:, 1:].unflatten(1, (grid, grid)) for i in config.region_layers]
    encoder = RegionEncoder(region, 16, grid, 10, clip.patch_size)
    assert [fused.shape[-1] for fused in encoder.fuse(maps)] == [grid * 2**i for i in reversed(range(levels))]
    assert encoder(maps, torch.rand(3, 4), torch.tensor([0, 1, 1])).shape == (3, 10)


def test_the_frame_of_boxes_is_not_the_picture() -> None:
    """Weights were trained with boxes scaled to 224 px on the maps of a 336 px picture (quirk Q1)."""
    encoder = golden_model().region_encoder
    assert encoder is not None
    # Columns count themselves, so a crop tells where it was read: the whole picture spans 16 of the 24 cells.
    columns = torch.arange(24.0).expand(1, 1, 24, 24)
    head = encoder.roi_align
    crop = roi_align(columns, torch.tensor([[0.0, 0, 1, 1]]) * head.frame, torch.tensor([0]), 14, head.scales[-1])
    assert float(crop.amax()) < 16


def test_a_model_without_region_encoder() -> None:
    model = Glamm(dataclasses.replace(TINY, region=None)).eval()
    features, levels = model.encode_global(torch.zeros(1, 112, 112, 3))
    assert features.shape == (1, 64, TINY.llama.emb)
    assert levels == [] and not any("region" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="no region encoder"):
        model.encode_regions(levels, torch.zeros(1, 4), torch.zeros(1).long())


def test_too_few_hidden_states_for_the_levels() -> None:
    shallow = dataclasses.replace(TINY, clip=dataclasses.replace(TINY.clip, depth=7))
    with pytest.raises(ValueError, match="only 3 levels"):
        Glamm(shallow)
    with pytest.raises(ValueError, match="multiple of 4"):
        RegionEncoder(RegionConfig(groups=3), 32, 8, 16)


# ---- pictures, splicing and masks


def test_a_batch_is_its_pictures_one_by_one() -> None:
    model = tiny_model()
    images, squares = torch.rand(2, 112, 112, 3) * 255, torch.rand(2, 128, 128, 3) * 255
    valid = torch.tensor([[128, 70], [90, 128]])
    features, levels = model.encode_global(images)
    sam = model.encode_grounding(squares, valid)
    states = torch.randn(3, TINY.llama.emb)
    logits, iou = model.decode_masks(states, sam, torch.tensor([1, 0, 1]))
    assert logits.shape == (3, 32, 32) and iou.shape == (3,)
    for i in (0, 1):
        one, its_levels = model.encode_global(images[[i]])
        torch.testing.assert_close(one, features[[i]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(its_levels[0], levels[0][[i]], rtol=1e-4, atol=1e-4)
        its_sam = model.encode_grounding(squares[[i]], valid[[i]])
        torch.testing.assert_close(its_sam, sam[[i]], rtol=1e-4, atol=1e-4)
    mask, score = model.decode_masks(states[[1]], sam[[0]], torch.tensor([0]))
    torch.testing.assert_close(mask, logits[[1]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(score, iou[[1]], rtol=1e-4, atol=1e-4)


def test_what_lies_in_the_padding_does_not_matter() -> None:
    model, image = tiny_model(), torch.rand(1, 128, 128, 3) * 255
    valid = torch.tensor([[100, 128]])
    other = image.clone()
    other[:, 100:] = 17.0
    torch.testing.assert_close(model.encode_grounding(image, valid), model.encode_grounding(other, valid))


def test_splice_takes_words_where_nothing_else_is_said() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, IMAGE_ID, IMAGE_ID, 7], [9, 251, 3, 0]])
    visual = torch.randn(3, TINY.llama.emb)
    embeds = model.splice(ids, visual, torch.tensor([[-1, 0, 2, -1], [-1, 1, -1, -1]]))
    assert torch.equal(embeds[0, 1:3], visual[[0, 2]]) and torch.equal(embeds[1, 1], visual[1])
    words = model.llama.embed_tokens.weight
    assert torch.equal(embeds[0, [0, 3]], words[[5, 7]]) and torch.equal(embeds[1, [0, 2, 3]], words[[9, 3, 0]])


def test_regions_are_put_in_order_and_counted() -> None:
    ids = reference.expand_ids([1, IMAGE_ID, 8, 251, 4, 251], 3)
    assert ids.tolist() == [1, IMAGE_ID, IMAGE_ID, IMAGE_ID, 8, 251, 4, 251]
    assert reference.embed_index(ids, 251, 2).tolist() == [-1, 0, 1, 2, -1, 3, -1, 4]
    assert reference.embed_index(ids, 251, 3).tolist() == [-1, 0, 1, 2, -1, 3, -1, 4]  # one too many is left over
    assert reference.embed_index(ids, 251, 0).tolist() == [-1, 0, 1, 2, -1, -1, -1, -1]
    with pytest.raises(ValueError, match="mentions 2 regions, but 1"):
        reference.embed_index(ids, 251, 1)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_the_state_of_a_mask_is_the_one_that_predicts_it(masks: list[bool]) -> None:
    ids = torch.tensor([1, *(9 if mask else 5 for mask in masks)])
    assert reference.mask_positions(ids, 9).tolist() == [i for i, mask in enumerate(masks) if mask]


# ---- names and sizes


def test_names_in_the_file_that_nobody_takes_and_names_it_lacks() -> None:
    model = Glamm(golden_model().config)
    tensors = dict(arrays("state_dict"))
    tensors["model.surprise.weight"] = torch.zeros(2)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(3, 64)
    report = load_glamm_state(model, tensors)
    assert report.unexpected == ("model.surprise.weight",)
    assert report.missing == ("model.norm.weight",)
    assert report.misshapen == ("lm_head.weight: file (3, 64), model (200, 64)",)
    assert any(name.endswith("inv_freq") for name in report.ignored)
    assert any(name.endswith("position_ids") for name in report.ignored)
    assert any("encoder.layers.11." in name for name in report.ignored)  # behind the selected hidden state
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        report.raise_if_incomplete("folder")


def test_every_name_of_the_golden_file_is_placed_and_clip_may_come_from_elsewhere() -> None:
    golden = arrays("state_dict")
    report = load_glamm_state(Glamm(golden_model().config), golden)
    assert report.complete and not report.unexpected
    prefix = "model.vision_tower.vision_tower.vision_model."
    rest = {name: tensor for name, tensor in golden.items() if not name.startswith(prefix)}
    model = Glamm(golden_model().config)
    assert not load_glamm_state(model, rest).complete
    assert load_glamm_state(model, rest, without=("clip",)).complete
    own = {name.removeprefix(prefix): tensor for name, tensor in golden.items() if name.startswith(prefix)}
    openai = {f"vision_model.{name}": tensor for name, tensor in own.items()} | {"text_model.x": torch.zeros(1)}
    report = load_clip_state(model.clip, openai)
    assert report.complete and not report.unexpected
    for name, parameter in golden_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], parameter), name


def test_without_the_part_for_masks_its_names_are_left_out() -> None:
    config = dataclasses.replace(golden_model().config, mask_prompt_channels=0)
    model = Glamm(config)
    report = load_glamm_state(model, arrays("state_dict"))
    assert report.complete and not report.unexpected
    assert sum(".mask_downscaling." in name for name in report.ignored) == 10
    assert not any("mask_downscaling" in name for name in model.state_dict())
    with pytest.raises(ValueError, match="takes no masks"):
        model.prompt_encoder.embed_masks(torch.zeros(1, 32, 32))


def test_a_tied_head_is_the_embedding_table() -> None:
    config = golden_model().config
    tied = Glamm(dataclasses.replace(config, llama=dataclasses.replace(config.llama, tied=True, lora_rank=2)))
    report = load_glamm_state(tied, arrays("state_dict"))
    assert report.complete and "lm_head.weight" in report.ignored and not report.unexpected
    states = torch.randn(2, 64)
    assert_close(tied.llama.head(states), states @ arrays("state_dict")["model.embed_tokens.weight"].T, 1e-6)


def test_the_published_sizes() -> None:
    """Shapes of the published layout (section 13), on a model with fewer layers and without memory."""
    full = GLAMM_PRESETS["glamm-7b"]
    shallow = dataclasses.replace(
        full,
        llama=dataclasses.replace(full.llama, layers=1),
        clip=dataclasses.replace(full.clip, depth=11),
        sam=dataclasses.replace(full.sam, depth=2, window_block_indexes=(0,)),
    )
    with torch.device("meta"):
        model = Glamm(shallow)
    shapes = {theirs: tuple(model.state_dict()[ours].shape) for ours, theirs in glamm_names(model).items()}
    sam = "model.grounding_encoder."
    expected = {
        "model.embed_tokens.weight": (32007, 4096),
        "lm_head.weight": (32007, 4096),
        "model.layers.0.self_attn.o_proj.weight": (4096, 4096),
        "model.layers.0.mlp.down_proj.weight": (4096, 11008),
        "model.layers.0.post_attention_layernorm.weight": (4096,),
        "model.mm_projector.0.weight": (4096, 1024),
        "model.mm_projector.2.bias": (4096,),
        "model.text_hidden_fcs.0.2.weight": (256, 4096),
        "model.region_encoder.mlvl_fuse.input_conv.3.weight": (1024, 1026, 1, 1),
        "model.region_encoder.mlvl_fuse.fuse_convs.4.conv.weight": (1024, 1024, 3, 3),
        "model.region_encoder.mlvl_fuse.fuse_convs.4.gn.bias": (1024,),
        "model.region_encoder.roi_align.pos_embedd.3.weight": (1024, 256),
        "model.region_encoder.roi_align.flatten_linear.weight": (1024, 200704),
        "model.region_encoder.roi_align.updims.weight": (4096, 1024),
        f"{sam}image_encoder.pos_embed": (1, 64, 64, 1280),
        f"{sam}image_encoder.blocks.0.attn.rel_pos_h": (27, 80),
        f"{sam}image_encoder.blocks.1.attn.rel_pos_w": (127, 80),
        f"{sam}image_encoder.neck.2.weight": (256, 256, 3, 3),
        f"{sam}prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        f"{sam}mask_decoder.output_upscaling.3.weight": (64, 32, 2, 2),
        f"{sam}mask_decoder.iou_prediction_head.layers.2.weight": (4, 256),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    # Parts whose depth is the published one have the published number of parameters.
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["region_encoder"] == 299_142_912
    assert counts["projector"] == 20_979_712
    assert counts["mask_projection"] == 17_830_144
    assert counts["mask_decoder"] == 4_058_340


@pytest.mark.parametrize("name", sorted(GLAMM_PRESETS))
def test_presets_survive_json(name: str) -> None:
    config = GLAMM_PRESETS[name]
    assert GlammConfig.from_dict(config.to_dict()) == config
    assert len(config.region_layers) == (config.region.levels if config.region else 0)


def test_the_golden_sizes_are_read_from_the_manifest() -> None:
    config, sizes = golden_model().config, manifest()["config"]
    assert (config.ids.region, config.ids.mask, config.ids.end) == (192, 194, 2)
    assert config.clip.tokens == 576 and config.llama.rms_eps == sizes["llm"]["rms_norm_eps"]
