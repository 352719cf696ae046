"""Training the BERT text head: with its own special ids, and without what only T5 can do."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from made_up_data import PHRASES, make_data
from torch import Tensor
from torch.nn import functional as F

from deixis_train.losses.text import text_loss
from deixis_train.models.config import PRESETS, BertTextConfig
from deixis_train.training import objectives
from deixis_train.training.recipe import RecipeError, load_recipe
from deixis_train.training.run import Run, train
from deixis_train.training.vocabulary import build_tokenizer

BEGIN, END = 101, 102
WORDS = sorted({word for phrase in PHRASES for word in phrase.split()})
RECIPE = """
preset = "tiny_bert"
init = { tokenizer = "words.json" }
[[stages]]
name = "text"
train = ["text", "point_predictor"]
dropout = false
steps = 4
batch = 2
rate = 0.01
report_every = 1
losses = { smoothing = 0.0 }
[[stages.sources]]
name = "expressions"
kind = "goldg"
files = ["expressions.json"]
losses = ["text", "point"]
referring = "where is "
rows = 2
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    torch.set_num_threads(1)
    head = BertTextConfig(vocab=128, emb=PRESETS["tiny"].t5.emb, heads=2, layers=2, mlp=32, max_positions=64)
    preset = replace(PRESETS["tiny"], bert=head, begin_token_id=BEGIN, end_token_id=END)
    monkeypatch.setitem(PRESETS, "tiny_bert", preset)
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "recipe.toml"))
    make_data(tmp_path / "data", recipe)
    build_tokenizer(WORDS, BEGIN).save(str(tmp_path / "data" / "words.json"))
    return Run(recipe, tmp_path / "data", tmp_path / "run")


def test_it_learns_with_its_own_ids(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    def compared(logits: Tensor, ids: Tensor, *, smoothing: float, end_id: int) -> Tensor:
        """The loss that is trained, against cross entropy over the words and the end, read off the ids."""
        assert (ids[:, 0] == BEGIN).all() and ((ids == END).sum(dim=1) == 1).all()
        words, end = ids[:, 1:], (ids == END).int().argmax(dim=1, keepdim=True)
        counts = torch.arange(1, ids.shape[1]) <= end
        assert not words[~counts].any() and (words[counts] != BEGIN).all()
        loss = text_loss(logits, ids, smoothing=smoothing, end_id=end_id)
        torch.testing.assert_close(loss, F.cross_entropy(logits[:, :-1][counts], words[counts]))
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(objectives, "text_loss", compared)
    assert train(run, Accelerator(cpu=True)) is not None
    assert len(losses) == 4 and losses[-1] < losses[0]
    lines = (run.out / "text.log.jsonl").read_text(encoding="utf-8").splitlines()
    # Boxes are read at the position before the end: the figure is there only if that was found.
    assert any(key.endswith("P@0.5") for key in json.loads(lines[-1])), lines[-1]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('init = { tokenizer = "words.json" }', "", "init.tokenizer: the preset 'tiny_bert' needs"),
        ('"words.json"', '"words.json", t5 = "t5"', "init.t5: "),
        ("[[stages]]", "model = { lora_rank = 4 }\n[[stages]]", "model.lora_rank: "),
        ("[[stages]]", "model = { vocab = 200 }\n[[stages]]", "model.vocab: "),
        ("[[stages]]", 'localisation = "text"\n[[stages]]', "localisation: 'text' needs a T5"),
        ("[[stages]]", 'localisation = "tokens"\n[[stages]]', "localisation: 'tokens' needs a T5"),
        ("dropout = false", "fused_attention = true", "stages (text): fused_attention needs a T5"),
        ("dropout = false", "auxiliary = { look = 1.0 }", "stages (text): auxiliary.look needs a T5"),
        ("dropout = false", "auxiliary = { match = 1.0 }", "stages (text): auxiliary.match needs a T5"),
        ('["text", "point_predictor"]', '["lora"]', "stages (text): train 'lora' needs a T5"),
    ],
)
def test_what_only_t5_can_do_is_refused(run: Run, tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in RECIPE
    text = RECIPE.replace(old, new, 1)
    if "auxiliary" in new:
        text += 'instances = "instances.json"\n'
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    recipe = load_recipe(str(tmp_path / "recipe.toml"))
    make_data(run.data, recipe)
    with pytest.raises(RecipeError) as error:
        train(replace(run, recipe=recipe), Accelerator(cpu=True))
    assert str(error.value).startswith(words) and "\n" not in str(error.value)
    assert not list(run.out.glob("*.jsonl"))  # nothing was trained


def test_words_of_new_data_are_refused(run: Run, tmp_path: Path) -> None:
    short = replace(run, steps_scale=0.25)
    folder = train(short, Accelerator(cpu=True))
    init = replace(run.recipe.init, tokenizer=None, checkpoint=str(folder))
    again = replace(short, recipe=replace(run.recipe, init=init), out=tmp_path / "again")
    with pytest.raises(RecipeError, match=r"init\.tokenizer: .* no new words; .*checkpoint/tokenizer\.json"):
        train(again, Accelerator(cpu=True))
    named = replace(init, tokenizer=str(folder / "tokenizer.json") if folder else None)
    assert train(replace(again, recipe=replace(run.recipe, init=named)), Accelerator(cpu=True)) is not None
