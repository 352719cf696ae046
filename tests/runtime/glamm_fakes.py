"""A GLaMM without ONNX: the real pipeline and session on an engine of numpy functions that says what it is told.

The decoder reads everything from its cache: ids that were consumed, at which position, and what was spliced in. Its
states and logits are functions of all that, so a wrong cache, position, row or splice changes what is said or shown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from fakes import CANDIDATES, FakeEngine, reduced
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from deixis.bundle import (
    Bundle,
    Caches,
    CacheSpec,
    ConversationSpec,
    DimRange,
    FileInfo,
    Format,
    Graph,
    ImageSpec,
    Manifest,
    MaskSpec,
    ModelInfo,
    Precision,
    Provenance,
    Reductions,
    TaskSpec,
    TensorInfo,
    TokenizerSpec,
)
from deixis.glamm.pipeline import GlammPipeline
from deixis.model import Model

SIZE, GLOBAL, TOKENS, WIDTH = 32, 16, 4, 6
WORDS = ["a", "red", "mug", "on", "the", "table", "two", "ducks", "sit", "here", "Sure", ",", "it", "is"]
WORDS += ["USER:", "ASSISTANT:", "What", "Segment", "Describe"]
LETTERS = [chr(code) for code in range(33, 127)] + ["▁", "é", "\n"]
PIECES = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS), *LETTERS]
MARKS = ["<im_start>", "<im_end>", "<bbox>", "[SEG]", "<p>", "</p>"]
VOCABULARY = len(PIECES) + len(MARKS)
END, BBOX, SEG, OPEN, CLOSE = 2, *range(VOCABULARY - 4, VOCABULARY)
OFF_TEXT = 1000  # in the cache, what was spliced in: this and a number told by its vector

SPEC = ConversationSpec(
    system="You see.",
    image_sentence="Look: <image> .",
    image_tokens=TOKENS,
    begin_id=1,
    end_id=END,
    image_start_id=VOCABULARY - 6,
    image_end_id=VOCABULARY - 5,
    mask_id=SEG,
    phrase_start_id=OPEN,
    phrase_end_id=CLOSE,
    region_id=BBOX,
)
TASKS = {
    "caption": TaskSpec("Describe it", 40, 40, ban_repeat=False),
    "region_caption": TaskSpec("Describe <bbox> here", 40, 40, ban_repeat=False),
    "refer": TaskSpec("Segment {text}", 40, 40, ban_repeat=False),
    "grounded_caption": TaskSpec("Describe the table", 40, 40, ban_repeat=False),
    "ground_phrases": TaskSpec("Describe the ducks", 40, 40, ban_repeat=False),
    "ask": TaskSpec("{text}", 60, 40, ban_repeat=False),
}
ROLES = ["global_encoder", "region_encoder", "decoder_step", "grounding_encoder", "pixel_decoder"]


def make_tokenizer() -> Tokenizer:
    """Words and single characters; marks swallow the white space beside them, as LLaMA's slow tokenizer has it."""
    scores = [-1.0 if len(piece) > 1 else -30.0 for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(list(zip(PIECES, scores, strict=True)), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens([AddedToken(mark, lstrip=True, rstrip=True, normalized=False) for mark in MARKS])
    return tokenizer


TOKENIZER = make_tokenizer()


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def make_manifest(**changes: object) -> Manifest:
    info = {"valid_hw": TensorInfo("valid_hw", "float32", ("B", 2))}
    graphs = {role: Graph(f"graphs/{role}.onnx", 17, info, info, Precision("fp32", "fp32")) for role in ROLES}
    values = {
        "format": Format("deixis-bundle", "1.2"),
        "model": ModelInfo("glamm", "fake"),
        "files": {"tokenizer.json": FileInfo("", 0)},
        "graphs": graphs,
        "dims": {
            "B": DimRange(1, 1, 2),
            "R": DimRange(1, 1, 3),
            "S": DimRange(1, 8, 40),
            "V": DimRange(1, 4, 40),
            "T": DimRange(1, 64, 600),
            "K": DimRange(1, 1, 4),
            "M": DimRange(1, 1, 3),
        },
        "caches": Caches(CacheSpec(1, 1, 2), None, 400),
        "image": ImageSpec(SIZE, "longest_side", "bilinear", antialias=True),
        "global_image": ImageSpec(GLOBAL, "center_crop", "bicubic", antialias=True, pad="none"),
        "tokenizer": TokenizerSpec("tokenizer.json", 1, END, 0, 0, VOCABULARY),
        "location": None,
        "prompts": None,
        "conversation": SPEC,
        "tasks": TASKS,
        "mask": MaskSpec(),
        "parity": {},
        "golden": "golden.npz",
        "provenance": Provenance(),
        "reductions": Reductions(CANDIDATES),
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


class GlammEngine(FakeEngine):
    """`says` maps a part of the question to the answer that is given to it, as text with marks or as ids (which end by
    the end id); a question that it does not know gets an answer that follows from all that was consumed, marks in any
    order.
    """

    def __init__(self, says: Mapping[str, str | list[int]] | None = None) -> None:
        super().__init__()
        self.says = {k: [*ids_of(v), END] if isinstance(v, str) else list(v) for k, v in (says or {}).items()}
        self.fail_at: int | None = None  # the run of decoder_step that raises
        self.widths: list[int] = []  # ids per run of decoder_step

    def global_encoder(self, image: np.ndarray) -> dict[str, np.ndarray]:
        seen = image.mean(axis=(1, 2))  # [B, 3]
        features = np.tile(np.concatenate([seen, seen], 1)[:, None], (1, TOKENS, 1)) + np.arange(TOKENS)[:, None]
        return {"features": features.astype(np.float32), "level.0": np.tile(seen[:, None, None], (1, 2, 2, 1))}

    def region_encoder(self, boxes: np.ndarray, image_index: np.ndarray, **levels: np.ndarray) -> dict[str, np.ndarray]:
        seen = levels["level.0"][image_index].mean(axis=(1, 2))[:, :2]
        return {"regions": np.concatenate([boxes * 100, seen], 1).astype(np.float32)}

    def grounding_encoder(self, image: np.ndarray, valid_hw: np.ndarray) -> dict[str, np.ndarray]:
        seen = image.mean(axis=(1, 2, 3))[:, None, None, None]
        return {"sam": np.tile(seen, (1, 4, 4, 3)).astype(np.float32)}

    def decoder_step(
        self,
        ids: np.ndarray,
        visual: np.ndarray,
        embed_index: np.ndarray,
        position: np.ndarray,
        banned: np.ndarray | None = None,
        **caches: np.ndarray,
    ) -> dict[str, np.ndarray]:
        self.widths.append(ids.shape[1])
        if self.fail_at is not None and self.runs["decoder_step"] >= self.fail_at:
            raise RuntimeError("the graph broke")
        place, count = int(position[0]), ids.shape[1]
        key, value = caches["self_key.0"].copy(), caches["self_value.0"].copy()
        spliced = OFF_TEXT + np.abs(visual).sum(axis=1) % 997
        key[:, 0, place : place + count, 0] = np.where(embed_index >= 0, spliced[embed_index], ids)
        value[:, 0, place : place + count, 0] = np.arange(place, place + count)
        seen = key[:, 0, : place + count, 0].astype(np.float64)
        weights = np.sin(np.arange(place + count) + 1.0)
        sums = np.cumsum(seen * weights, axis=1)[:, place:]
        states = np.stack([np.sin(sums * (k + 1)) for k in range(WIDTH)], axis=-1)
        logits = np.stack([self._logits(row) for row in seen]).astype(np.float32)
        return {
            "logits": logits,
            **reduced(logits, banned),
            "states": states.astype(np.float32),
            "self_key_out.0": key,
            "self_value_out.0": value,
        }

    def _logits(self, seen: np.ndarray) -> np.ndarray:
        """What follows all that a row has consumed."""
        random = np.random.default_rng(int(np.abs(seen * np.arange(1, len(seen) + 1)).sum() * 8))
        logits = random.normal(size=VOCABULARY)
        logits[[0, 1, SPEC.image_start_id, SPEC.image_end_id, BBOX]] = -50
        logits[3 + len(WORDS) : 3 + len(WORDS) + len(LETTERS)] -= 3  # words rather than letters
        logits[[SEG, OPEN, CLOSE]] += 1.5
        consumed = [int(code) for code in seen if code < OFF_TEXT]
        text = TOKENIZER.decode(consumed, skip_special_tokens=False)
        question, _, _ = text.rpartition("ASSISTANT:")
        turn = len(consumed) - 1 - consumed[::-1].index(3 + WORDS.index("ASSISTANT:")) if "ASSISTANT:" in text else 0
        said = consumed[turn + 1 :]
        for asked, answer in self.says.items():
            if asked in re.split("USER:", question)[-1] and answer[: len(said)] == said and len(said) < len(answer):
                logits[answer[len(said)]] += 100
        return logits

    def pixel_decoder(self, states: np.ndarray, sam: np.ndarray, image_index: np.ndarray) -> dict[str, np.ndarray]:
        """A rectangle that the state tells, in a picture that the map tells."""
        cells = np.arange(16) / 16
        masks = np.empty((len(states), 16, 16), np.float32)
        for row, state in enumerate(states):
            x, y = (state[:2] + 1) / 4
            inside = ((cells >= y) & (cells <= y + 0.4))[:, None] & ((cells >= x) & (cells <= x + 0.4))
            masks[row] = np.where(inside, 8.0, -8.0)
        return {"masks": masks, "iou": (states[:, 2] / 4 + 0.5 + sam[image_index].mean(axis=(1, 2, 3)) / 4000)}


def make_model(
    folder: Path,
    says: Mapping[str, str | list[int]] | None = None,
    capacity: int | None = None,
    **changes: object,
) -> tuple[Model, GlammEngine]:
    """A model on the fake engine; `folder` takes its tokenizer."""
    TOKENIZER.save(str(folder / "tokenizer.json"))
    engine = GlammEngine(says)
    pipeline = GlammPipeline(Bundle(folder, make_manifest(**changes)), engine, capacity)
    return Model(pipeline, scene_budget_mb=1), engine


def without(*roles: str) -> dict[str, Graph]:
    """Graphs of a bundle that lacks some."""
    return {role: graph for role, graph in make_manifest().graphs.items() if role not in roles}


def pictures(count: int) -> list[np.ndarray]:
    """RGB uint8 pictures of different sizes and contents."""
    random = np.random.default_rng(5)
    return [random.integers(0, 255, (40 + 7 * i, 60 - 5 * i, 3)).astype(np.uint8) for i in range(count)]


def short_tasks(tokens: int) -> dict[str, TaskSpec]:
    """The tasks with answers of so many tokens at most."""
    return {name: replace(task, max_length=tokens) for name, task in TASKS.items()}
