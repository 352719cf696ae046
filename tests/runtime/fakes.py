"""A whole bundle without ONNX: an engine of numpy functions whose every output can be told by hand, and a manifest for
it.

The decoder is a table of random logits. It reads what each row has consumed back from the self cache, and the prompt
from the cross cache, so a wrong row order, position or cache shows in the ids and in the locations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from deixis.bundle import (
    Bundle,
    Caches,
    CacheSpec,
    DimRange,
    FileInfo,
    Format,
    Graph,
    ImageSpec,
    LocationSpec,
    Manifest,
    MaskSpec,
    ModelInfo,
    Precision,
    PromptSpec,
    Provenance,
    Reductions,
    TaskSpec,
    TensorInfo,
    TokenizerSpec,
)
from deixis.decoding import Top
from deixis.model import Model
from deixis.pipeline import Pipeline

SIZE, LENGTH, LAYERS = 32, 14, 2
CANDIDATES = 4
PIECES = ["▁", "▁a", "▁red", "▁mug", "▁on", "▁the", "▁table", "s", ".", "▁where", "▁is", "▁see", "ful", "▁b", "ox", "t"]
VOCABULARY = 3 + len(PIECES)
ROLES = [
    "semantic_encoder",
    "sam_encoder",
    "prompt_extractor",
    "text_encoder",
    "decoder_step",
    "decoder_pass",
    "mask_adapter",
    "mask_decoder",
]


def make_tokenizer() -> Tokenizer:
    """Unigram of a few pieces, laid out as the demo's: 0 pad and begin, 1 end, 2 unknown."""
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", -20.0),
        *((piece, -float(len(PIECES[0]))) for piece in PIECES),
    ]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def make_manifest(**changes: object) -> Manifest:
    precision = Precision("fp32", "fp32")
    valid = {"valid_hw": TensorInfo("valid_hw", "float32", ("B", 2))}
    places = {"locations": TensorInfo("locations", "float32", ("R", "S", 2, 2))}
    graphs = {role: Graph(f"graphs/{role}.onnx", 17, valid, places, precision) for role in ROLES}
    task = TaskSpec("a red", 8, LENGTH, beams=1, beams_per_node=2)
    cache = CacheSpec(LAYERS, 1, 2)
    values = {
        "format": Format("deixis-bundle", "1.0"),
        "model": ModelInfo("pixelllm", "fake"),
        "files": {"tokenizer.json": FileInfo("", 0)},
        "graphs": graphs,
        "dims": {"B": DimRange(1, 1, 3), "N": DimRange(1, 1, 4), "R": DimRange(1, 1, 12), "P": DimRange(1, 5, 6)},
        "caches": Caches(cache, cache, 32),
        "image": ImageSpec(SIZE),
        "tokenizer": TokenizerSpec("tokenizer.json", 0, 1, 0, 2, VOCABULARY),
        "location": LocationSpec(2),
        "prompts": PromptSpec(),
        "tasks": {
            "caption": task,
            "region_caption": TaskSpec("a mug on the table", 8, LENGTH, beams=1, beams_per_node=2),
            "trace": TaskSpec("see", 8, LENGTH),
            "refer": TaskSpec("where is {text}", 8, 10, points_at="^end-1"),
        },
        "mask": MaskSpec(prompt_width=4),
        "parity": {},
        "golden": "golden.npz",
        "provenance": Provenance(),
        "reductions": Reductions(CANDIDATES),
    }
    return Manifest(**{**values, **changes})  # type: ignore[arg-type]


def reduced(logits: np.ndarray, banned: np.ndarray | None) -> dict[str, np.ndarray]:
    """What a decoder step of format 1.3 gives beside its logits."""
    top = Top.of_logits(logits, banned, CANDIDATES)
    return {"top_ids": top.ids, "top_log_probs": top.log_probs}


class FakeEngine:
    """See the module's docstring.

    `runs` counts the runs of every role; `end_bias` [V-independent] makes captions shorter.
    """

    device, threads = "cpu", 0

    def __init__(self, end_bias: float = 0.0) -> None:
        random = np.random.default_rng(7)
        self.table = random.normal(size=(64, VOCABULARY, VOCABULARY)).astype(np.float32) * 2
        self.table[:, :, [0, 2]] = -20  # pad and unknown are never said
        self.table[:, :, 1] += end_bias
        self.per_prompt = random.normal(size=(97, VOCABULARY)).astype(np.float32)
        self.per_prompt[:, [0, 2]] = 0
        self.runs: dict[str, int] = {}
        self.last: dict[str, dict[str, np.ndarray]] = {}
        self.closed = False

    def run(self, role: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs[role] = self.runs.get(role, 0) + 1
        self.last[role] = inputs
        return getattr(self, role)(**inputs)

    def bind(self, role: str, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> Callable[[], None]:
        def run() -> None:
            found = self.run(role, inputs)
            for name, array in outputs.items():
                array[...] = found[name]

        return run

    def load(self, role: str) -> None:
        pass

    def loaded(self) -> tuple[str, ...]:
        return tuple(sorted(self.runs))

    def close(self) -> None:
        self.closed = True

    def semantic_encoder(self, image: np.ndarray, valid_hw: np.ndarray) -> dict[str, np.ndarray]:
        summary = image.mean(axis=(1, 2)) + valid_hw.sum(axis=1, keepdims=True)
        return {"semantic": np.tile(summary[:, None, None], (1, 2, 2, 1)).astype(np.float32)}

    def sam_encoder(self, image: np.ndarray, valid_hw: np.ndarray) -> dict[str, np.ndarray]:
        summary = image.std(axis=(1, 2))[:, None, None, :2]
        return {"sam": np.tile(summary, (1, 4, 4, 1)), "sam_on_grid": np.tile(summary, (1, 2, 2, 1))}

    def prompt_extractor(
        self, features: np.ndarray, image_index: np.ndarray, points: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        seen = features[image_index].mean(axis=(1, 2, 3)) + points.sum(axis=(1, 2)) * 3 + (labels * 7).sum(axis=1)
        return {"visual_prefix": np.tile(seen[:, None, None], (1, 3, 2)).astype(np.float32)}

    def text_encoder(self, visual_prefix: np.ndarray, context_ids: np.ndarray) -> dict[str, np.ndarray]:
        rows = len(visual_prefix)
        mask = np.concatenate([np.ones((rows, 3), np.float32), (context_ids > 0).astype(np.float32)], axis=1)
        content = np.concatenate([visual_prefix[:, :, 0], context_ids.astype(np.float32)], axis=1)
        cross = np.tile(content[:, None, :, None], (1, 1, 1, 2))
        named = {f"{kind}.{i}": cross + i for kind in ("cross_key", "cross_value") for i in range(LAYERS)}
        return {"encoder_mask": mask, **named}

    def _prompt(self, encoder_mask: np.ndarray, cross: dict[str, np.ndarray]) -> np.ndarray:
        return np.floor((cross["cross_key.0"][:, 0, :, 0] * encoder_mask).sum(axis=1)).astype(np.int64)

    @staticmethod
    def locate(places: np.ndarray, ids: np.ndarray, sums: np.ndarray) -> np.ndarray:
        """Two points of each token: (place / 16, id / 32) and (sum of all consumed ids / 256, 0.5)."""
        half = np.full(sums.shape, 0.5)
        pairs = [np.stack([places / 16 + 0 * sums, ids / 32], -1), np.stack([sums / 256, half], -1)]
        return np.stack(pairs, axis=-2).astype(np.float32)

    def decoder_step(
        self,
        ids: np.ndarray,
        position: np.ndarray,
        encoder_mask: np.ndarray,
        banned: np.ndarray | None = None,
        **caches: np.ndarray,
    ) -> dict:
        place = int(position[0])
        keys = [caches[f"self_key.{i}"].copy() for i in range(LAYERS)]
        values = [caches[f"self_value.{i}"].copy() for i in range(LAYERS)]
        for array in (*keys, *values):
            array[:, :, place] = ids[:, :, None]
        consumed = keys[-1][:, 0, : place + 1, 0].astype(np.int64)
        beams = len(ids) // len(encoder_mask)
        prompt = np.repeat(self._prompt(encoder_mask, caches), beams)
        sums = consumed.sum(axis=1)
        logits = self.table[place, ids[:, 0]] + self.per_prompt[(prompt + sums) % 97]
        named = {f"self_key_out.{i}": key for i, key in enumerate(keys)}
        named |= {f"self_value_out.{i}": value for i, value in enumerate(values)}
        named["locations"] = self.locate(np.array([place]), ids[:, 0], sums)[:, None]
        return {"logits": logits, **reduced(logits, banned), **named}

    def decoder_pass(self, ids: np.ndarray, encoder_mask: np.ndarray, **cross: np.ndarray) -> dict[str, np.ndarray]:
        prompt = self._prompt(encoder_mask, cross)
        sums = np.cumsum(ids, axis=1)
        locations = self.locate(np.arange(ids.shape[1])[None], ids, sums)
        features = np.tile((prompt[:, None] + sums)[..., None], (1, 1, 2)).astype(np.float32)
        return {"features": features, "locations": locations}

    def mask_adapter(self, visual_prefix: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
        delta = visual_prefix.mean(axis=(1, 2)) + features.mean(axis=(1, 2))
        return {"prompt_delta": np.tile(delta[:, None, None], (1, 2, 4)).astype(np.float32)}

    def mask_decoder(
        self, sam: np.ndarray, image_index: np.ndarray, points: np.ndarray, labels: np.ndarray, prompt_delta: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Token t's mask: the box of the points, t cells of 2 px wider to the right."""
        centres = np.arange(16) * 2 + 1
        masks = np.empty((len(points), 4, 16, 16), np.float32)
        for row, (own, kinds) in enumerate(zip(points, labels, strict=True)):
            (x0, y0), (x1, y1) = own[kinds > 0].min(axis=0), own[kinds > 0].max(axis=0)
            for token in range(4):
                inside = ((centres >= y0) & (centres <= y1))[:, None] & ((centres >= x0) & (centres <= x1 + 2 * token))
                masks[row, token] = np.where(inside, 8.0, -8.0)
        score = 0.5 + sam[image_index].mean(axis=(1, 2, 3)) / 1000 + np.abs(prompt_delta).mean(axis=(1, 2)) / 1e4
        return {"masks": masks, "iou": (score[:, None] + np.array([0, 0.1, 0.3, 0.2])).astype(np.float32)}


def make_model(
    folder: Path, manifest: Manifest | None = None, engine: FakeEngine | None = None, capacity: int | None = None
) -> tuple[Model, FakeEngine]:
    """A model on the fake engine; `folder` takes its tokenizer."""
    make_tokenizer().save(str(folder / "tokenizer.json"))
    engine = engine or FakeEngine()
    return Model(Pipeline(Bundle(folder, manifest or make_manifest()), engine, capacity), scene_budget_mb=1), engine
