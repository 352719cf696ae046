"""The data of a run: sources opened once and held in memory, with the truth of cells and the features of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deixis_train.data.batches import Example
from deixis_train.data.formats import FILE_OPTIONS, open_source
from deixis_train.data.formats.errors import DataError
from deixis_train.data.formats.pictures import read_picture
from deixis_train.data.preparation.geometry import place_fitted
from deixis_train.data.preparation.instructions import LONG_CAPTION, SHORT_CAPTION
from deixis_train.data.preparation.prepare import Preparation
from deixis_train.data.preparation.store import SampleStore
from deixis_train.data.samples import Sample
from deixis_train.localisation.coding import Localiser
from deixis_train.models.config import PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.training.cells import Names, cell_owners, names_of, thing_table
from deixis_train.training.features import FeatureStore, What, fill, read_fitted, store_of
from deixis_train.training.micro import Feed, Prepare, Samples, Truth
from deixis_train.training.recipe import Recipe, SourceSpec, StageSpec
from deixis_train.training.vocabulary import CachedTokenizer

OWNER_CHUNK = 4096
LOOKED_AT = 100  # samples of a source, to see whether there is anything to learn from


@dataclass
class Things:
    """Instances of the pictures of one file: without their masks, which only serve to find the owners of cells."""

    samples: dict[str, Sample]
    truth: dict[str, Truth] = field(default_factory=dict)


class Joined:
    """Samples of a store with the instances of their pictures, which several sources share.

    Raises DataError for a picture without instances.
    """

    def __init__(self, store: SampleStore, known: Mapping[str, Sample], spec: SourceSpec) -> None:
        self._store, self._known = store, known
        if lacking := [name for name in store.keys if name not in known]:
            raise DataError(f"source {spec.name!r}: {spec.instances} has no instances of {lacking[0]}")

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Sample:
        sample = self._store[index]
        return replace(sample, instances=self._known[sample.key].instances)


class Corpus:
    """What a recipe's sources hold, below the data folder. A source that several stages name is read once.

    Args:
        data: the data folder.
        features: folder of cached features; those of `<images>` lie in `<features>/<images>`.
        report: takes lines of progress.
    """

    def __init__(self, data: Path, features: Path, report: Callable[[str], None]) -> None:
        self.data, self.features, self.report = data, features, report
        self._samples: dict[tuple[str, ...], Samples] = {}
        self._things: dict[str, Things] = {}

    def samples(self, spec: SourceSpec) -> Samples:
        """All samples of a source, with the instances of their pictures.

        Raises:
            DataError: the data cannot be read, or a picture has no instances although the recipe names some.
        """
        key = (spec.kind, *spec.files, "|", spec.images, spec.instances, repr(sorted(spec.options.items())))
        if key not in self._samples:
            source = open_source(
                spec.kind,
                [self.data / file for file in spec.files],
                self.data / spec.images,
                name=spec.name,
                losses=spec.losses,
                max_skipped=spec.max_skipped,
                **_options(spec, self.data),
            )
            samples = SampleStore(source)
            self.report(f"source {spec.name}: {len(samples)} samples, {samples.skipped} malformed records skipped")
            self._samples[key] = Joined(samples, self._things_of(spec).samples, spec) if spec.instances else samples
        return self._samples[key]

    def _things_of(self, spec: SourceSpec) -> Things:
        if spec.instances not in self._things:
            source = open_source(
                "coco_instances",
                [self.data / spec.instances],
                self.data / spec.images,
                name=f"{spec.name}.instances",
                losses=(),
                max_skipped=spec.max_skipped,
            )
            self._things[spec.instances] = Things({sample.key: sample for sample in source})
        return self._things[spec.instances]

    def names(self, recipe: Recipe) -> Names:
        """Kinds and colours of the things of all stages."""
        specs = [spec for stage in recipe.stages for spec in stage.sources if spec.instances]
        return names_of(s for spec in specs for s in self._things_of(spec).samples.values())

    def truth(
        self,
        spec: SourceSpec,
        names: Names,
        grid: int,
        size: int,
        view: Callable[[Sample], Sample] | None = None,
        view_name: str = "",
    ) -> Mapping[str, Truth]:
        """Owners of cells and tables of things of every picture; the owners are kept on disk.

        view: what an encoder sees of the samples, where that is not the whole picture as it is. One view per run.
        view_name: tells views apart on disk.
        """
        things = self._things_of(spec)
        if not things.truth:
            path = self.data / spec.instances
            digest = hashlib.sha256(f"{view_name}{grid} {size} ".encode() + path.read_bytes()).hexdigest()[:8]
            store = FeatureStore(self.features / spec.images / f"owner-{digest}")
            lacking = [name for name in things.samples if name not in store]
            for start in range(0, len(lacking), OWNER_CHUNK):
                part = lacking[start : start + OWNER_CHUNK]
                samples = (things.samples[name] for name in part)
                store.add(part, np.stack([_owners(view(s) if view else s, grid, size) for s in samples]))
                self.report(f"cells of {spec.instances}: {start + len(part)}/{len(lacking)}")
            for name, sample in things.samples.items():
                bare = replace(sample, instances=tuple(replace(i, mask=None) for i in sample.instances))
                things.truth[name] = Truth(store.get([name])[0], thing_table(view(bare) if view else bare, names))
                things.samples[name] = bare
        return things.truth

    def texts(self, recipe: Recipe) -> Iterable[str]:
        """Every text that the stages of objective "text" may read or write, for a vocabulary."""
        for stage in recipe.stages:
            for spec in stage.sources if stage.objective == "text" else ():
                yield from instructions_of(spec)
                if spec.referring:
                    yield spec.referring
                samples = self.samples(spec)
                for index in range(len(samples)):
                    for row in samples[index].rows:
                        yield row.text
                        yield row.context


def _options(spec: SourceSpec, data: Path) -> dict[str, Any]:
    """The reader's own options; those that are files lie in the data folder like everything else."""
    return {name: data / value if name in FILE_OPTIONS else value for name, value in spec.options.items()}


def _owners(sample: Sample, grid: int, size: int) -> np.ndarray:
    return cell_owners(sample, grid, size, place_fitted((sample.height, sample.width), size).valid)


def instructions_of(spec: SourceSpec) -> tuple[str, ...]:
    """The instructions that a source names, or those of its set."""
    return spec.instructions or {"": (), "short": SHORT_CAPTION, "long": LONG_CAPTION}[spec.instruction_set]


def preparation_of(spec: SourceSpec, config: PixelLLMConfig) -> Preparation:
    """How the samples of a source become examples for a model."""
    return Preparation(
        image_size=config.image_size,
        text_length=spec.text_length or config.max_caption_length,
        context_length=spec.context_length or config.context_length,
        scale=spec.scale,
        flip=spec.flip,
        max_rows=spec.rows or 1,
        instructions=instructions_of(spec),
        referring=spec.referring,
        prefix_split=spec.prefix_split,
        prompt_jitter=spec.jitter,
        masks="mask" in spec.losses,
        alignment=spec.alignment,
        begin_id=config.begin_token_id,
        end_id=config.end_token_id,
    )


def _preparer(spec: SourceSpec, config: PixelLLMConfig, tokenizer: CachedTokenizer, pictures: bool) -> Prepare:
    preparation = preparation_of(spec, config)

    def prepare(sample: Sample, rng: np.random.Generator) -> Example:
        image = read_picture(sample.image) if pictures else None
        return preparation.prepare(sample, rng, image=image, tokenizer=tokenizer, training=True)

    return prepare


def _check_losses(spec: SourceSpec, samples: Samples) -> None:
    """Raise DataError for a loss that the first samples give nothing to learn from."""
    count = min(len(samples), LOOKED_AT)
    rows = [row for index in range(count) for row in samples[index].rows]
    found = {
        "text": ("texts", bool(rows)),
        "point": ("boxes or narrations", any(row.box is not None or row.utterances for row in rows)),
        "mask": ("masks", any(row.mask is not None for row in rows)),
        "proposal": ("boxes of texts", any(row.box is not None for row in rows)),
    }
    for loss in spec.losses:
        what, there = found[loss]
        if not there:
            raise DataError(
                f"source {spec.name!r} is to teach {loss!r}, but its first {count} samples have no {what}: "
                "take it out of losses, or name files that have them"
            )


def feeds_of(
    corpus: Corpus,
    model: PixelLLM,
    stage: StageSpec,
    specs: Sequence[SourceSpec],
    tokenizer: CachedTokenizer,
    names: Names,
    seed: int,
    *,
    writer: bool,
    localiser: Localiser | None = None,
) -> list[Feed]:
    """Feeds of a stage's sources (or of its held-out ones), in their order; missing features are computed first.

    writer: this process computes them; the others must come after it. localiser: says locations as tokens.

    Raises DataError as `Corpus.samples` does, and for a source whose data cannot teach what it is to teach.
    """
    config, auxiliary = model.config, stage.auxiliary
    grid_stage = stage.objective == "grid"
    dense = grid_stage or stage.objective == "prompt_grid" or auxiliary.cells or auxiliary.look or auxiliary.match
    whats: list[What] = ["small"] if grid_stage else list(stage.cache)
    feeds = []
    for number, spec in enumerate(specs):
        truth: Mapping[str, Truth] = {}
        if dense or (spec.instances and spec.point_prompts):
            truth = corpus.truth(spec, names, model.grid, config.image_size)
        samples = corpus.samples(spec)
        if stage.objective == "text":
            _check_losses(spec, samples)
        folder = corpus.features / spec.images
        if whats and writer:
            every = (samples[index] for index in range(len(samples)))
            pictures = {sample.key: sample.image for sample in every}
            bf16 = stage.precision == "bf16"
            fill(model, whats, folder, pictures, lambda path: read_fitted(path, config.image_size), bf16=bf16)
        stores: dict[str, FeatureStore] = {what: store_of(model, what, folder) for what in whats}
        prepare = _preparer(spec, config, tokenizer, pictures=stage.sees_pictures)
        source_seed = int(np.random.default_rng((seed, number)).integers(2**31))
        feeds.append(Feed(stage, spec, samples, prepare, stores, truth, config.image_size, source_seed, localiser))
    return feeds
