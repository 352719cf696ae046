"""What learns and what does not: frozen parts, LoRA, layer-wise rates, drop-path, the scale of features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deixis_train.data.samples import Instance, Sample
from deixis_train.losses.boxes import box_loss
from deixis_train.models.config import EVA02_SIZES, PRESETS
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.auxiliary import Helpers, look_loss, tapped
from deixis_train.training.cells import Names, cell_losses, cell_owners, meant_cells, thing_table
from deixis_train.training.drop_path import add_drop_path
from deixis_train.training.loop import Plan, restore
from deixis_train.training.optim import (
    choose_trained,
    layer_factor,
    learning_rate,
    make_optimizer,
    set_rate,
    training_modes,
)
from deixis_train.training.recipe import SourceSpec, StageSpec

NAMES = Names(("ball", "cube"), ("blue", "red"))


@pytest.fixture
def model() -> PixelLLM:
    torch.manual_seed(0)
    return PixelLLM(PRESETS["tiny"])


def test_lora_alone_learns_in_the_text_model(model: PixelLLM) -> None:
    trained = choose_trained(model, ["lora", "point_predictor"])
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(trained)
    inside = {name for name in learning if name.startswith("text.")}
    config = model.config.t5
    # A and B on query and value: one attention per encoder layer, two per decoder layer (section 7).
    assert len(inside) == 4 * 3 * config.layers
    assert all(".query.lora_" in name or ".value.lora_" in name for name in inside)
    training_modes(model, ["lora", "point_predictor"], dropout=True, frozen_too=False)
    assert model.text.training and not model.semantic_encoder.training and not model.sam_encoder.training
    training_modes(model, ["lora"], dropout=True, frozen_too=True)
    assert model.sam_encoder.training
    training_modes(model, ["lora"], dropout=False, frozen_too=False)
    assert not any(module.training for module in model.modules())


def test_training_a_part_that_is_not_there_is_an_error(model: PixelLLM) -> None:
    with pytest.raises(ValueError, match="box_decoder"):
        choose_trained(model, ["box_decoder"])
    plain = PixelLLM(PRESETS["tabletop"])
    with pytest.raises(ValueError, match="no LoRA"):
        choose_trained(plain, ["lora"])


def test_layer_wise_rates_of_the_published_encoder() -> None:
    depth = EVA02_SIZES["large"].depth
    assert depth == 24
    for block in range(depth):
        assert layer_factor(f"blocks.{block}.attn.q_proj.weight", depth, 0.8) == pytest.approx(
            0.8 ** (25 - (block + 1))
        )
    for name in ("patch_embed.proj.weight", "pos_embed"):
        assert layer_factor(name, depth, 0.8) == pytest.approx(0.8**25)
    assert layer_factor("cls_token", depth, 0.8) == layer_factor("norm.weight", depth, 0.8) == 1.0


def test_every_parameter_gets_its_rate_and_decay(model: PixelLLM) -> None:
    trained = choose_trained(model, ["semantic_encoder", "mask_adapter"])
    optimizer = make_optimizer(
        model, trained, nn.Module(), weight_decay=0.05, layer_decay=0.8, paces={"mask_adapter": 10.0}
    )
    set_rate(optimizer, 1e-4)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(trained)
    rates = {name: found[id(p)] for name, p in trained.items()}
    assert rates["semantic_encoder.blocks.0.attn.q_proj.weight"] == pytest.approx((1e-4 * 0.8**2, 0.05))
    assert rates["semantic_encoder.blocks.1.norm1.weight"] == pytest.approx((1e-4 * 0.8, 0.0))
    assert rates["semantic_encoder.cls_token"] == pytest.approx((1e-4, 0.05))
    assert rates["mask_adapter.output_tokens"] == pytest.approx((1e-3, 0.05))


def test_learning_rate_of_section_13() -> None:
    assert learning_rate(0, 100, 1.0, 10) == 0
    assert learning_rate(5, 100, 1.0, 10) == pytest.approx(0.5 * 0.5 * (1 + np.cos(np.pi * 0.05)))
    assert learning_rate(50, 100, 2.0, 10) == pytest.approx(1.0)
    assert learning_rate(0, 100, 2.0, 0) == 2.0


def test_drop_path_acts_on_whole_pictures_in_training_alone(model: PixelLLM) -> None:
    add_drop_path(model)
    image = torch.randn(64, 128, 128, 3)
    for encoder in (model.semantic_encoder, model.sam_encoder):
        with torch.no_grad():
            for parameter in encoder.parameters():  # so that every branch says something
                parameter.add_(0.05 * torch.randn_like(parameter))
            encoder.eval()
            still = encoder(image)
            assert torch.equal(still, encoder(image))
            encoder.train()
            changed = (encoder(image) - still).abs().flatten(1).amax(1) > 1e-6
    assert changed.any(), "SAM's last block drops half of its branches"


def test_folding_the_scale_keeps_the_function(model: PixelLLM) -> None:
    helpers = Helpers(model, NAMES)
    features = 3 + torch.randn(2, 4, 4, helpers.mean.numel()) * torch.rand(helpers.mean.numel())
    projection = model.prompt_adapter.image_projection
    before = projection(features)
    helpers.measure(features)
    helpers.unfold_scale(projection)
    assert torch.allclose(projection(helpers.standardize(features)), before, atol=1e-3)
    helpers.fold_scale(projection)
    assert torch.allclose(projection(features), before, atol=1e-3)


def test_cells_belong_to_what_covers_them_and_boxes_mean_them() -> None:
    things = (
        Instance("cube", (0, 0, 32, 32), None, {"color": "red"}),
        Instance("ball", (32, 32, 64, 48), None, {"color": "green"}),
    )
    sample = Sample(Path("a.jpg"), 64, 48, (), things)
    owner = cell_owners(sample, 8, 128, (96, 128))  # shown at twice its size in an input of 128 px, 16 px per cell
    assert (owner[:4, :4] == 0).all() and (owner[4:6, 4:] == 1).all() and (owner == 1).sum() == 8
    assert (owner[6:] == -1).all(), "padding"
    table = thing_table(sample, NAMES)
    assert table[0].tolist() == pytest.approx([1, 1, 0, 0, 0.5, 2 / 3]) and table[1][:2].tolist() == [0, -1]
    placed = np.array([[0, 0, 64, 64], [64, 64, 128, 96]], np.float32)
    boxes = np.array([[2, 2, 64, 64], [0, 0, 128, 30], [0, 0, 0, 0]], np.float32)
    cells = meant_cells(boxes, placed, owner, 128).reshape(3, 8, 8)
    assert np.array_equal(cells[0], owner == 0)
    assert cells[1].sum() == 16 and cells[1][:2].all(), "no thing has this box: the cells whose centres it holds"
    assert not cells[2].any()


def test_what_guides_the_attention_falls_when_it_looks_there(model: PixelLLM) -> None:
    look = torch.zeros(1, 2, 3, dtype=torch.bool)
    look[0, 0, 1] = True
    sharp = torch.tensor([0.05, 0.9, 0.05, 0.0]).expand(1, 2, 2, 4)
    flat = torch.full((1, 2, 2, 4), 0.25)
    weight = torch.ones(1, 2)
    assert look_loss([flat, sharp], look, weight).item() == pytest.approx(-np.log(0.9), abs=1e-4)
    assert look_loss([sharp, flat], look, weight).item() == pytest.approx(-np.log(0.25), abs=1e-4)
    text = model.text.eval()
    ids, visual = torch.tensor([[0, 5, 6, 1]]), torch.randn(1, 3, model.config.t5.emb)
    encoded, valid = text.encode(visual)
    with tapped(text) as kept:
        tapped_logits = text.decode(ids, encoded, valid)[0]
    plain = text.decode(ids, encoded, valid)[0]
    assert tapped_logits is not None and plain is not None and torch.equal(tapped_logits, plain)
    assert len(kept) == model.config.t5.layers and kept[0].shape == (1, model.config.t5.heads, 4, 3)


def test_losses_of_cells_and_boxes() -> None:
    occupied = torch.tensor([[[True, False]]])
    targets = torch.tensor([[[[1.0, 0, 0.1, 0.1, 0.5, 0.5], [0, -1, 0, 0, 0, 0]]]])
    kinds = torch.tensor([[[[0.0, 0, 50], [50.0, 0, 0]]]])
    colours = torch.tensor([[[[50.0, 0], [0.0, 50]]]])
    right = cell_losses((kinds, colours, targets[..., 2:]), occupied, targets)
    assert all(loss.item() == pytest.approx(0, abs=1e-4) for loss in right.values())
    wrong = cell_losses((kinds.flip(-1), colours.flip(-1), targets[..., 2:] + 0.5), occupied, targets)
    assert all(loss.item() > 1 for loss in wrong.values())
    assert box_loss(torch.rand(2, 4), torch.rand(2, 4), torch.zeros(2)).item() == 0


def test_plans_share_pictures_equally_and_in_order() -> None:
    sources = tuple(SourceSpec(n, "coco_captions", ("a",), weight=w, pictures=4) for n, w in (("a", 3), ("b", 1)))
    stage = StageSpec("s", 200, 1.0, ("text",), sources, batch=8, micro_batch=3)
    one, two = Plan(stage, 0, 1), Plan(stage, 0, 2)

    def places(plan: Plan, step: int, process: int) -> list[tuple[int, int]]:
        return [(o.source, o.start + i) for o in plan.orders(step, process) for i in range(o.count)]

    assert all(places(one, s, 0) == places(two, s, 0) + places(two, s, 1) for s in range(200))
    assert [o.count for o in one.orders(0, 0)] == [3, 3, 2]
    taken = [place for s in range(200) for place in places(one, s, 0) if place[0] == 0]
    assert taken == [(0, i) for i in range(len(taken))] and 0.65 < len(taken) / 1600 < 0.85
    with pytest.raises(ValueError, match="3 processes"):
        Plan(stage, 0, 3)


def test_a_state_of_something_else_is_refused(model: PixelLLM) -> None:
    kinds, more = (Names(names, ("red",)) for names in (("mug",), ("ball", "mug")))
    trained = choose_trained(model, ["point_predictor"])
    saved = {"trained": dict(trained), "helpers": Helpers(model, kinds).state_dict()}
    restore(saved, trained, Helpers(model, kinds), "text")
    with pytest.raises(ValueError, match="other kinds and colours"):
        restore(saved, trained, Helpers(model, more), "text")
    with pytest.raises(ValueError, match="other parts"):
        restore(saved, choose_trained(model, ["text"]), Helpers(model, kinds), "text")
