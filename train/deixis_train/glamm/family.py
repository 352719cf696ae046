"""GLaMM as a family of models that `training.run` trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from deixis.conversation import IMAGE_SENTENCE, SYSTEM
from deixis_train.checkpoint import save_checkpoint
from deixis_train.data.batches import Example
from deixis_train.data.samples import Sample
from deixis_train.glamm.conversations import Labeller
from deixis_train.glamm.features import fill, store_of
from deixis_train.glamm.items import Asking
from deixis_train.glamm.mixture import ItemFeed, ItemSource
from deixis_train.glamm.objective import GlammHelpers, GlammObjective
from deixis_train.glamm.pictures import seen_by_clip
from deixis_train.glamm.start import start, with_lora
from deixis_train.glamm.templates import QUESTIONS, SEGMENT_ANSWERS
from deixis_train.models.glamm.config import ClipConfig
from deixis_train.training.corpus import Corpus
from deixis_train.training.features import FeatureStore, What
from deixis_train.training.micro import Feed
from deixis_train.training.recipe import TYPE_OF, Recipe, RecipeError, SourceSpec, StageSpec

FROZEN_PARTS = ("sam_encoder", "prompt_encoder")  # that a checkpoint may leave to their published file


class GlammRun:
    """See `training.family.Begun`. Raises RecipeError, CheckpointError and DataError: one line."""

    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path) -> None:
        self.recipe, self.corpus = recipe, corpus
        self._begin = start(recipe, corpus.data, out, partial(_texts, recipe, corpus), _questions(recipe))
        self.model = self._begin.model
        self.names = corpus.names(recipe)
        self.helpers = GlammHelpers(self.model, self.names)
        self._labeller = Labeller(self._begin.tokenizer_json, self.model.config)

    def objective(self, stage: StageSpec) -> GlammObjective:
        return GlammObjective(self.model, self.helpers, stage)

    def prepare(self, stage: StageSpec, feeds: Sequence[object]) -> None:
        if stage.objective == "grid" and not self.names.kinds:
            raise RecipeError(f"stage {stage.name!r}: its instances have no categories to learn")

    def finished(self, stage: StageSpec) -> None:
        pass

    def feeds(
        self, stage: StageSpec, specs: Sequence[SourceSpec], seed: int, *, writer: bool
    ) -> Sequence[Feed | ItemFeed]:
        if stage.objective == "grid":
            return [self._grid_feed(stage, spec, _seed(seed, k), writer) for k, spec in enumerate(specs)]
        sources = [self._source(stage, spec, writer) for spec in specs]
        auxiliary = stage.auxiliary
        points = auxiliary.box > 0 or auxiliary.place > 0
        feed = partial(
            ItemFeed,
            model=self.model,
            labeller=self._labeller,
            looks=auxiliary.look > 0,
            points=points,
            most_masks=stage.masks_per_picture,
        )
        if stage.mixing == "types" and specs is stage.sources:
            found = {kind: [s for s in sources if TYPE_OF[s.spec.task] == kind] for kind in stage.types}
            return [
                feed(kind, sources=members, order="draw", seed=_seed(seed, k), weight=stage.types[kind])
                for k, (kind, members) in enumerate(found.items())
            ]
        if (order := stage.mixing) in ("walk", "pictures") and specs is stage.sources:
            return [feed("all", sources=sources, order=order, seed=_seed(seed, 0))]
        return [
            feed(
                source.spec.name,
                sources=[source],
                order="walk",
                seed=_seed(seed, k),
                weight=source.spec.weight,
                factor=source.spec.weight if stage.mixing == "all" else 1.0,
                pictures=source.spec.pictures,
            )
            for k, source in enumerate(sources)
        ]

    def _source(self, stage: StageSpec, spec: SourceSpec, writer: bool) -> ItemSource:
        samples = self.corpus.samples(spec)
        masks = "mask" in spec.losses
        whats: list[What] = [what for what in stage.cache if what == "clip" or masks]
        helped = stage.auxiliary.look > 0 or stage.auxiliary.box > 0 or stage.auxiliary.place > 0
        drawn = masks or (TYPE_OF[spec.task] == "mask" and helped)
        stores = self._stores(stage, spec, whats, writer)
        asking = Asking(spec.task, spec.instructions or QUESTIONS[spec.task], spec.rows, spec.jitter, drawn)
        return ItemSource(spec, samples, asking, stores)

    def _stores(
        self, stage: StageSpec, spec: SourceSpec, whats: Sequence[What], writer: bool
    ) -> Mapping[str, FeatureStore]:
        """Stores of a source's pictures; what they lack is computed first."""
        folder, samples = self.corpus.features / spec.images, self.corpus.samples(spec)
        if whats and writer:
            every = (samples[index] for index in range(len(samples)))
            pictures = {sample.key: sample.image for sample in every}
            bf16 = stage.precision == "bf16"
            fill(self.model, whats, folder, pictures, bf16=bf16, report=self.corpus.report)
        return {what: store_of(self.model, what, folder) for what in whats}

    def _grid_feed(self, stage: StageSpec, spec: SourceSpec, seed: int, writer: bool) -> Feed:
        clip = self.model.config.clip
        truth = self.corpus.truth(
            spec, self.names, clip.grid, clip.image_size, partial(_as_clip_sees, clip), f"{clip.fit} "
        )
        stores = self._stores(stage, spec, ["small"], writer)
        return Feed(stage, spec, self.corpus.samples(spec), _no_text, stores, truth, clip.image_size, seed)

    def write_checkpoint(self, folder: Path) -> None:
        """LoRA is merged, as in the published checkpoints."""
        model = self.model
        model.llama.merge_lora()
        model.config = with_lora(model.config, 0)
        model.llama.config = model.config.llama
        learned = {part for stage in self.recipe.stages for part in stage.train}
        sam_file = self._begin.sam_file
        omit = [part for part in FROZEN_PARTS if part not in learned] if sam_file is not None else []
        save_checkpoint(
            folder,
            model,
            self._begin.tokenizer_json,
            self.recipe.tasks,
            dtype=self.recipe.dtype,
            omit=omit,
            frozen_from=sam_file if omit else None,
        )


def _seed(seed: int, number: int) -> int:
    return int(np.random.default_rng((seed, number)).integers(2**31))


def _as_clip_sees(clip: ClipConfig, sample: Sample) -> Sample:
    return seen_by_clip(sample, clip.image_size, clip.fit)


def _no_text(sample: Sample, rng: np.random.Generator) -> Example:
    raise AssertionError("the dense objective reads no text")


def _questions(recipe: Recipe) -> list[str]:
    """All that may be asked, for a vocabulary."""
    system = SYSTEM if recipe.conversation.system is None else recipe.conversation.system
    texts = [system, IMAGE_SENTENCE, "USER: ASSISTANT: region", *SEGMENT_ANSWERS]
    for stage in recipe.stages:
        for spec in stage.sources if stage.objective == "text" else ():
            texts += spec.instructions or QUESTIONS[spec.task]
    return [text.replace("{", " ").replace("}", " ").replace("<", " ").replace(">", " ") for text in texts]


def _texts(recipe: Recipe, corpus: Corpus) -> Iterable[str]:
    """All that the data says, for a vocabulary."""
    for stage in recipe.stages:
        for spec in stage.sources if stage.objective == "text" else ():
            samples = corpus.samples(spec)
            for index in range(len(samples)):
                sample = samples[index]
                yield from sample.labels.names if sample.labels else ()
                for row in sample.rows:
                    yield from (text for text in (row.text, row.part, row.question) if text)
