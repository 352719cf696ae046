"""The fused encoder computes what the plain one does, and refuses what it cannot do."""

from __future__ import annotations

import pytest
import torch

from deixis_train.models.config import T5Config
from deixis_train.models.t5 import T5
from deixis_train.training.flash import fused_encoder


@pytest.fixture
def text() -> T5:
    torch.manual_seed(3)
    config = T5Config(vocab=50, emb=32, heads=2, head_dim=16, layers=2, mlp=48, enc_rank=0, dec_rank=0)
    model = T5(config).eval()
    model.encoder.relpos_bias.rel_embedding.requires_grad_(False)
    return model


def run(text: T5) -> tuple[torch.Tensor, torch.Tensor]:
    visual = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1))
    context = torch.tensor([[5, 6, 1, 0], [7, 1, 0, 0], [8, 9, 10, 1]])
    text.zero_grad()
    encoded, valid = text.encode(visual, context)
    direction = torch.randn(encoded.shape, generator=torch.Generator().manual_seed(2))
    (encoded * direction * valid[..., None]).sum().backward()
    weight = text.encoder.layers[0].get_submodule("attention").query.weight
    assert weight.grad is not None
    return encoded[valid].detach(), weight.grad.clone()


def test_outputs_and_gradients_are_those_of_the_plain_encoder(text: T5) -> None:
    plain = run(text)
    with fused_encoder(text):
        fused = run(text)
    again = run(text)
    for ours, theirs, restored in zip(fused, plain, again, strict=True):
        largest = theirs.abs().max()
        assert (ours - theirs).abs().max() < 1e-5 * largest
        assert (restored - theirs).abs().max() < 1e-6 * largest
    assert not any("attend" in vars(layer.get_submodule("attention")) for layer in text.encoder.layers)


def test_a_table_that_learns_or_dropout_is_refused(text: T5) -> None:
    text.train()
    with pytest.raises(ValueError, match="dropout"), fused_encoder(text):
        pass
    text.eval().encoder.relpos_bias.rel_embedding.requires_grad_(True)
    with pytest.raises(ValueError, match="frozen distance table"), fused_encoder(text):
        pass
