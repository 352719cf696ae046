"""PixelLLM as a family of models that `run` trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from deixis_train.checkpoint import SAM_PARTS, save_checkpoint
from deixis_train.localisation.vocabulary import add_location_tokens, localiser_of
from deixis_train.training.auxiliary import Helpers
from deixis_train.training.corpus import Corpus, feeds_of
from deixis_train.training.drop_path import add_drop_path
from deixis_train.training.initial import start
from deixis_train.training.micro import Feed
from deixis_train.training.objectives import Objective
from deixis_train.training.recipe import Recipe, SourceSpec, StageSpec
from deixis_train.training.vocabulary import CachedTokenizer

MEASURED = 256  # pictures whose features give mean and spread
AT_ONCE = 16


class PixelLLMRun:
    """See `family.Begun`. Raises RecipeError, CheckpointError and DataError: one line."""

    def __init__(self, recipe: Recipe, corpus: Corpus, out: Path) -> None:
        self.recipe, self.corpus = recipe, corpus
        self._begin = start(recipe, corpus.data, out, corpus.texts(recipe))
        self.names = corpus.names(recipe)
        self.model = self._begin.model
        add_location_tokens(recipe.localisation, self.model, recipe.seed)
        self._localiser = localiser_of(recipe.localisation, self.model, self._begin.tokenizer_json)
        add_drop_path(self.model)
        self.helpers = Helpers(self.model, self.names)
        self._tokenizer = CachedTokenizer(Tokenizer.from_str(self._begin.tokenizer_json))
        self._measured = False

    def feeds(self, stage: StageSpec, specs: Sequence[SourceSpec], seed: int, *, writer: bool) -> list[Feed]:
        return feeds_of(
            self.corpus,
            self.model,
            stage,
            specs,
            self._tokenizer,
            self.names,
            seed,
            writer=writer,
            localiser=self._localiser,
        )

    def objective(self, stage: StageSpec) -> Objective:
        return Objective(self.model, self.helpers, stage)

    def prepare(self, stage: StageSpec, feeds: Sequence[Feed]) -> None:
        if stage.auxiliary.standardize and not self._measured:
            self._measure(stage, feeds[0])

    def finished(self, stage: StageSpec) -> None:
        self._measured = self._measured or stage.auxiliary.standardize

    @torch.no_grad()
    def _measure(self, stage: StageSpec, feed: Feed) -> None:
        """Spread of the features of the first pictures; an extractor that has learned before is fitted to it."""
        plain = replace(stage, auxiliary=replace(stage.auxiliary, standardize=False))
        objective, device = self.objective(plain), next(self.model.parameters()).device
        self.model.eval()
        count = min(MEASURED, len(feed))
        parts = []
        for first in range(0, count, AT_ONCE):
            micro = feed.make(first, min(AT_ONCE, count - first))
            parts.append(objective.features(micro.to(device))[0])
        self.helpers.measure(torch.cat(parts))
        if self._begin.from_checkpoint:
            self.helpers.unfold_scale(self.model.prompt_adapter.image_projection)

    def write_checkpoint(self, folder: Path) -> None:
        if self._measured:
            self.helpers.fold_scale(self.model.prompt_adapter.image_projection)
        learned = {part for stage in self.recipe.stages for part in stage.train}
        parts = [part for part in SAM_PARTS if getattr(self.model, part, None) is not None]
        sam_file = self._begin.sam_file
        omit = parts if sam_file is not None and not learned & set(parts) else []
        save_checkpoint(
            folder,
            self.model,
            self._begin.tokenizer_json,
            self.recipe.tasks,
            dtype=self.recipe.dtype,
            omit=omit,
            frozen_from=sam_file if omit else None,
        )
