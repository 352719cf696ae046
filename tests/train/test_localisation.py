"""Locations said as tokens: coding, the larger vocabulary, and asking a model."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deixis_train.data.samples import Box
from deixis_train.localisation.coding import ExtraTokens, LocalisationError, Localiser, WrittenDigits, say_locations
from deixis_train.localisation.generation import continue_text, say_boxes
from deixis_train.localisation.vocabulary import extend_vocabulary
from deixis_train.losses.text import text_loss
from deixis_train.models.config import PRESETS
from deixis_train.models.decoding import begin_tokens, greedy
from deixis_train.models.pixelllm import PixelLLM

SPACE = "▁"


def tokenizer(characters: str) -> Tokenizer:
    """Single characters, and a word."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (SPACE + "ball", -1.0), (SPACE, -2.0)]
    pieces += [(character, -3.0) for character in characters]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always")
    made.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always")
    return made


WRITTEN = WrittenDigits(tokenizer(string.digits + string.ascii_lowercase + ",."))
TOKENS = ExtraTokens(first=120)
LOCALISERS: list[Localiser] = [WRITTEN, TOKENS, ExtraTokens(first=50, bins=32)]

fractions = st.tuples(*[st.floats(0, 1)] * 4)
outside = st.tuples(*[st.floats(-1e6, 1e6)] * 4)


def in_order(box: Box) -> list[float]:
    x0, y0, x1, y1 = box
    return [min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)]


@pytest.mark.parametrize("localiser", LOCALISERS)
@settings(deadline=None)  # machines may be busy
@given(box=fractions)
def test_a_box_comes_back_within_half_a_bin(localiser: Localiser, box: Box) -> None:
    ids = localiser.say(box)
    assert 0 < len(ids) <= localiser.length
    read = localiser.read(ids)
    assert read is not None
    assert np.abs(np.array(read) - in_order(box)).max() <= 0.5 / localiser.bins + 1e-9


@pytest.mark.parametrize("localiser", LOCALISERS)
@settings(deadline=None)
@given(box=outside)
def test_what_lies_outside_is_said_at_the_edge(localiser: Localiser, box: Box) -> None:
    read = localiser.read(localiser.say(box))
    assert read is not None
    assert np.abs(np.array(read) - np.clip(in_order(box), 0, 1)).max() <= 0.5 / localiser.bins + 1e-9


def test_the_written_form() -> None:
    ids = WRITTEN.say((0.075, 0.119, 0.5, 1.0))
    assert WRITTEN.tokenizer.decode(ids) == "07,11,50,99"
    assert TOKENS.say((0.075, 0.119, 0.5, 1.0)) == [127, 131, 170, 219]


@pytest.mark.parametrize(
    "text",
    ["", "07,11,50", "07,11,50,99,12", "7,11,50,99", "07 11 50 99", "07,11,50,099", "07,11,5a,99", "ball 07,11,50,99"],
)
def test_malformed_text_is_no_box(text: str) -> None:
    assert WRITTEN.read(WRITTEN.tokenizer.encode(text, add_special_tokens=False).ids) is None


@pytest.mark.parametrize("ids", [[], [120, 121, 122], [120] * 5, [120, 121, 122, 119], [120, 121, 122, 220], [2] * 4])
def test_malformed_tokens_are_no_box(ids: list[int]) -> None:
    assert TOKENS.read(ids) is None


def test_special_tokens_in_between_are_no_box() -> None:
    ids = WRITTEN.say((0.1, 0.2, 0.3, 0.4))
    assert WRITTEN.read([*ids[:3], 2, *ids[3:]]) is None
    assert WRITTEN.read([*ids[:3], 0, *ids[3:]]) is None


def test_a_tokenizer_without_digits_is_refused() -> None:
    with pytest.raises(LocalisationError, match="digits and commas"):
        WrittenDigits(tokenizer(string.ascii_lowercase))


def test_a_box_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        TOKENS.say((0.0, 0.0, float("nan"), 1.0))


def test_locations_stand_behind_what_they_are_of() -> None:
    size = (50, 100)
    ball, table = [10.0, 10, 30, 20], [0.0, 25, 100, 50]
    said_ball, said_table = TOKENS.say((0.1, 0.2, 0.3, 0.4)), TOKENS.say((0.0, 0.5, 1.0, 1.0))
    text = np.array([[0, 7, 8, 9, 5, 1], [0, 7, 8, 1, 0, 0], [0, 7, 8, 9, 5, 6]])
    points = np.zeros((3, 6, 4), np.float32)
    points[0, 1:3], points[0, 4] = ball, table  # a narration: two words, a word without a place, a word
    boxes = np.array([[0.0] * 4, ball, [0.0] * 4], np.float32)  # an expression; a text without places, truncated
    rows = say_locations(text, points, boxes, size, TOKENS)

    expected = [0, 7, 8, *said_ball, 9, 5, *said_table, 1]
    assert rows.text.tolist() == [
        expected,
        [0, 7, 8, *said_ball, 1] + [0] * (len(expected) - 8),
        [0, 7, 8, 9, 5, 6, 1] + [0] * (len(expected) - 7),
    ]
    assert np.flatnonzero(rows.said[0]).tolist() == [3, 4, 5, 6, 9, 10, 11, 12, 13]
    assert np.flatnonzero(rows.said[1]).tolist() == [3, 4, 5, 6, 7]
    assert np.flatnonzero(rows.said[2]).tolist() == [6]
    assert rows.points[0, :, 0].tolist() == [0] + [10.0] * 6 + [0] * 7
    assert (rows.points[0, 8:13] == table).all() and not rows.points[0, 13].any()
    assert (rows.points[1, 1:7] == ball).all() and not rows.points[1, 7:].any()
    assert not points[1].any()  # what was given is not changed


@pytest.fixture(scope="module")
def model() -> PixelLLM:
    torch.manual_seed(3)
    return PixelLLM(PRESETS["tiny"]).eval()


def test_a_larger_vocabulary_leaves_what_is_known(model: PixelLLM) -> None:
    torch.manual_seed(3)
    grown = PixelLLM(PRESETS["tiny"]).eval()
    known = grown.config.t5.vocab
    grown.text.token_embedder.weight.requires_grad_(False)
    assert extend_vocabulary(grown, 10, torch.Generator().manual_seed(0)) == known
    assert grown.config.t5.vocab == grown.text.config.vocab == known + 10
    assert not grown.text.token_embedder.weight.requires_grad
    assert grown.text.decoder.logits_dense.weight.requires_grad
    visual, ids = torch.randn(2, 4, grown.config.t5.emb), torch.tensor([[0, 5, 7, 1], [0, 9, 1, 0]])
    with torch.inference_mode():
        before, _ = model.text.decode(ids, *model.text.encode(visual))
        after, _ = grown.text.decode(ids, *grown.text.encode(visual))
        new, _ = grown.text.decode(torch.tensor([[0, known + 9, 1]]), *grown.text.encode(visual[:1]))
    assert before is not None and after is not None and new is not None
    torch.testing.assert_close(after[..., :known], before)
    assert after.shape[-1] == known + 10 and bool(new.isfinite().all())
    # The configuration is that of the grown model: its weights fit a model made from it.
    PixelLLM(grown.config).load_state_dict(grown.state_dict())
    with pytest.raises(ValueError, match="grow"):
        extend_vocabulary(grown, 0)


def ungated(model: PixelLLM, visual: torch.Tensor, context: torch.Tensor, words: list[int], steps: int) -> list[int]:
    """The same by definition: one row, one token at a time, the decoder over the whole text again."""
    said: list[int] = []
    for _ in range(steps):
        encoded, valid = model.text.encode(visual, context)
        logits, _ = model.text.decode(torch.tensor([[0, *words, *said, 1]]), encoded, valid)
        assert logits is not None
        chosen = int(logits[0, len(words) + len(said)].argmax())
        if chosen == 1:
            break
        said.append(chosen)
    return said


@torch.inference_mode()
def test_texts_of_any_length_are_continued_together(model: PixelLLM) -> None:
    torch.manual_seed(1)
    visual = torch.randn(4, 5, model.config.t5.emb) * 3
    context = torch.tensor([[5, 6, 1], [8, 1, 0], [9, 9, 1], [4, 1, 0]])
    texts = [[7, 8, 9, 10], [11], [20, 21], [12, 13, 14, 15, 16]]
    ids = torch.zeros(4, 6, dtype=torch.int64)
    for row, words in enumerate(texts):
        closed = [0, *words, 1][:6]  # the last one has no room for its end
        ids[row, : len(closed)] = torch.tensor(closed)
    said = continue_text(model.text, visual, context, ids, steps=6)
    alone = [ungated(model, visual[r : r + 1], context[r : r + 1], words, 6) for r, words in enumerate(texts)]
    assert said == alone
    assert len({tuple(row) for row in said}) > 1


def test_a_model_that_has_learnt_to_say_a_box() -> None:
    """A few steps on two rows: the box must come back out of greedy decoding, repeated coordinates included."""
    torch.manual_seed(0)
    model = PixelLLM(PRESETS["tiny"])
    localiser = ExtraTokens(extend_vocabulary(model, 8), bins=8)
    text = model.text.eval()
    visual = torch.randn(2, 4, model.config.t5.emb)
    size = (64, 64)
    boxes = np.array([[9, 9, 41, 41], [20, 4, 60, 36]], np.float32)  # the first says two tokens twice
    given = np.array([[0, 5, 6, 1], [0, 7, 1, 0]])
    rows = say_locations(given, np.zeros((2, 4, 4), np.float32), boxes, size, localiser)
    ids, said = torch.from_numpy(rows.text), torch.from_numpy(rows.said)
    optimizer = torch.optim.Adam(text.parameters(), lr=3e-3)
    for _ in range(60):
        logits, _ = text.decode(ids, *text.encode(visual))
        assert logits is not None
        loss = text_loss(logits, torch.where(said, ids, 0), smoothing=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = say_boxes(text, visual, None, torch.from_numpy(given), localiser)
    for box, wanted in zip(found, boxes / 64, strict=True):
        assert box is not None
        assert np.abs(np.array(box) - wanted).max() <= 0.5 / 8 + 1e-6
    # The reference's greedy decoder bans repetitions, which locations need.
    encoded, valid = text.encode(visual)

    def logits_fn(tokens: torch.Tensor, position: int) -> torch.Tensor:
        logits, _ = text.decode(tokens, encoded, valid)
        assert logits is not None
        return logits[:, position].detach()

    banned, _ = greedy(logits_fn, begin_tokens(2, 9))
    assert all(a != b for a, b in zip(banned[0, 1:].tolist(), banned[0, 2:].tolist(), strict=False) if a != 1)
    # Words are no box.
    assert say_boxes(text, visual, None, torch.from_numpy(given), ExtraTokens(first=1000, bins=8)) == [None, None]
