"""Recipes: what to train, in which stages, on which data, as a small TOML file. Parsed strictly: an unknown key is an
error that names the file and the key.

A recipe may stand on another one (`base = "refer"`): its top-level keys replace those of the base, tables are merged,
and stages and sources are matched by name, so that an ablation says no more than what differs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deixis_train.data.samples import Loss
from deixis_train.training.tables import RecipeError, build, override, read_table

SHIPPED = Path(__file__).parent.parent / "recipes"

Objective = Literal["text", "grid", "prompt_grid"]
Localisation = Literal["regression", "text", "tokens"]
# Names that `train` knows. "lora" stands for the LoRA factors of the text model, "text" (of GLaMM, "llama") for all of
# it. Those from "clip" on are GLaMM's.
Part = Literal[
    "semantic_encoder",
    "sam_encoder",
    "prompt_encoder",
    "prompt_adapter",
    "visual_projection",
    "text",
    "lora",
    "point_predictor",
    "mask_adapter",
    "mask_decoder",
    "box_decoder",
    "clip",
    "projector",
    "region_encoder",
    "llama",
    "embed_tokens",
    "lm_head",
    "mask_projection",
]
Family = Literal["pixelllm", "glamm"]
# What GLaMM asks about a sample (`glamm.items`). With mixing "types" a step takes samples of one type of task.
Task = Literal[
    "", "grounded_caption", "refer", "classes", "region", "region_introduced", "region_group", "caption", "ask"
]
Type = Literal["caption", "region", "mask"]
TYPE_OF: Mapping[str, Type] = {
    "grounded_caption": "mask",
    "refer": "mask",
    "classes": "mask",
    "region": "region",
    "region_introduced": "region",
    "region_group": "region",
    "caption": "caption",
    "ask": "caption",
}
CACHED_PARTS: Mapping[str, Part] = {"sam": "sam_encoder", "semantic": "semantic_encoder", "clip": "clip"}
# What the objective "prompt_grid" may run on: "small" is the semantic encoder's input, for a stage in which it learns.
PROMPT_GRID_CACHES = ({"sam", "semantic"}, {"sam", "small"})


@dataclass(frozen=True)
class Losses:
    """Weights of the model's own losses (section 12; GLaMM section 9.1).

    GLaMM: `text` is the cross entropy, `bce` and `dice` its masks'.

    point_kind: "l1_nonzero" is the published loss, in px; "box" is 5 * L1 + 1 - GIoU in fractions of the picture.
    before_end: what the words before the last one count in referring, where the box is read from the last alone.
    """

    text: float = 1.0
    point: float = 0.1
    mask: float = 1.0
    proposal: float = 1.0
    point_kind: Literal["l1_nonzero", "box"] = "l1_nonzero"
    before_end: float = 0.0
    smoothing: float = 0.1
    bce: float = 2.0
    dice: float = 0.5


@dataclass(frozen=True)
class Auxiliary:
    """What only helps to learn; none of it is in the paper's recipes. Weights of 0 leave a loss out.

    match: which image tokens belong to the thing that a row means. look: cross-attention goes to the cells of what a
    token points at. cells: the dense objective on the extractor's image tokens. standardize: the extractor is trained
    on features of equal spread; the scale goes into its weights at the end. box, place: what stands for a mask tells
    the thing's box, and is led to SAM's code of a click on it (`glamm.pointing`).
    """

    match: float = 0.0
    look: float = 0.0
    cells: float = 0.0
    standardize: bool = False
    box: float = 0.0
    place: float = 0.0


@dataclass(frozen=True)
class SourceSpec:
    """A data set in a stage. Paths are relative to the data folder.

    kind, options, max_skipped: see `data.formats.open_source`. weight: share of the steps with mixing "draw", of the
    samples with mixing "types", factor of its losses with mixing "all". pictures: of a step, with mixing "all". task:
    what GLaMM asks about its samples. rows: most rows of a picture; 0 is one, or the task's own; of the task "ask",
    most conversations about it that become one. instructions (or
    instruction_set, one of the reference's lists), referring, prefix_split, scale, flip, alignment and jitter
    (prompt_jitter) go to `data.preparation`. point_prompts: share of the batches that ask by a click instead of a box.
    instances: COCO-style annotations of the things in the pictures, for the objectives that need them.
    """

    name: str
    kind: str
    files: tuple[str, ...]
    images: str = "images"
    losses: tuple[Loss, ...] = ("text",)
    weight: float = 1.0
    pictures: int = 0
    task: Task = ""
    rows: int = 0
    instructions: tuple[str, ...] = ()
    instruction_set: Literal["", "short", "long"] = ""
    referring: str | None = None
    prefix_split: bool = False
    alignment: Literal["rank", "text"] = "rank"
    text_length: int = 0  # 0: the model's
    context_length: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    jitter: float = 0.0
    point_prompts: float = 0.0
    instances: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    max_skipped: float = 0.01


@dataclass(frozen=True)
class StageSpec:
    """One training stage. batch: pictures of a step, over all processes. micro_batch: most pictures that a process
    computes at once; gradients of several add up. rate: of the learning, at its peak. layer_decay: factor per block of
    the semantic encoder (section 13); 0 leaves it out. paces: factor on the rate, by part.

    mixing: "draw" takes one source in a step, "all" some of every source. GLaMM's: "types" draws a type of task by
    `types`, then for every picture a source and a sample of it; "walk" goes through all samples of all sources, in
    random order; "pictures" goes through the pictures, and asks all sources about each, in one row.

    dropout acts in the parts that train; with dropout_in_frozen in the frozen ones as well, as the reference has it.
    cache: which features of frozen encoders are kept on disk; "small" is the input of the semantic encoder, small and
    in bytes, for a stage of objective "prompt_grid" in which that encoder learns.
    fused_attention: the text encoder attends in one kernel; its table of distances is then frozen, and dropout must be
    off. masks_per_picture: how many of a picture's masks GLaMM decodes, drawn anew each time; 0: all. recompute: the
    language model's blocks are computed again in the backward pass, instead of being kept.
    """

    name: str
    steps: int
    rate: float
    train: tuple[Part, ...]
    sources: tuple[SourceSpec, ...]
    objective: Objective = "text"
    mixing: Literal["draw", "all", "types", "walk", "pictures"] = "draw"
    types: Mapping[str, float] = field(default_factory=dict)
    batch: int = 0
    micro_batch: int = 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    layer_decay: float = 0.0
    paces: Mapping[str, float] = field(default_factory=dict)
    clip_norm: float = 0.0
    schedule: Literal["cosine", "linear"] = "cosine"
    betas: tuple[float, float] = (0.9, 0.999)
    dropout: bool = True
    dropout_in_frozen: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    fused_attention: bool = False
    recompute: bool = False
    cache: tuple[Literal["sam", "semantic", "small", "clip"], ...] = ()
    masks_per_picture: int = 0
    losses: Losses = field(default_factory=Losses)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    held_out: tuple[SourceSpec, ...] = ()
    held_out_batches: int = 4
    evaluate_every: int = 500
    report_every: int = 25
    save_every: int = 200

    @property
    def sees_pictures(self) -> bool:
        """Whether an encoder runs in every step, so that pictures are read."""
        return self.objective == "text" and set(self.cache) != {"sam", "semantic"}


@dataclass(frozen=True)
class ModelSpec:
    """What differs from the preset. text: size of T5 by name. lora_rank: 0 for none. vocab: rows of the vocabulary.

    caption_proposals, max_detections: boxes of the box decoder that are captioned, in training and in use.
    """

    text: str | None = None
    caption_proposals: int | None = None
    max_detections: int | None = None
    lora_rank: int | None = None
    vocab: int | None = None
    mask_adapter: bool | None = None
    box_decoder: bool | None = None


@dataclass(frozen=True)
class Conversation:
    """How GLaMM is spoken to. system: text that every conversation begins with; None: the published one, or that of the
    checkpoint which the run begins with."""

    system: str | None = None


@dataclass(frozen=True)
class Init:
    """What the model starts from; nothing named: from nothing.

    pixelllm: checkpoint of a PixelLLM whose semantic encoder a GLaMM's global encoder of that architecture begins with.
    glamm: folder of a published GLaMM; clip: folder or file of OpenAI's CLIP, which those folders leave out; llama:
    folder of a Vicuna; projector: file with LLaVA's.
    checkpoint: a folder that `deixis train` wrote. The others are published weights of single parts. Files are looked
    for as they are, in the data folder, beside the run's folder, and in the cache of `make real-weights`. An empty name
    takes back what the recipe's base names.
    tokenizer: tokenizer.json of the text model; without it, one is built from the words of the data.
    """

    checkpoint: str | None = None
    mobile_sam: str | None = None
    sam: str | None = None
    eva02: str | None = None
    t5: str | None = None
    pixelllm: str | None = None
    glamm: str | None = None
    clip: str | None = None
    llama: str | None = None
    projector: str | None = None
    tokenizer: str | None = None


@dataclass(frozen=True)
class Recipe:
    preset: str
    stages: tuple[StageSpec, ...]
    family: Family = "pixelllm"
    description: str = ""
    seed: int = 0
    localisation: Localisation = "regression"
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the checkpoint's matrices
    model: ModelSpec = field(default_factory=ModelSpec)
    init: Init = field(default_factory=Init)
    conversation: Conversation = field(default_factory=Conversation)
    tasks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # overrides of the bundle's task table


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a shipped recipe by name, or a file.

    Args:
        name: e.g. "refer", or a path that ends in .toml.
        overrides: "key=value", keys with dots; stages and sources by name: "stages.text.steps=100". Values are TOML, or
            else strings.

    Raises:
        RecipeError: one line.
    """
    path = Path(name) if name.endswith(".toml") else shipped().get(name)
    if path is None:
        raise RecipeError(f"no recipe {name!r}; shipped are {', '.join(shipped())}, or give the path of a .toml file")
    table = read_table(path, shipped())
    for setting in overrides:
        override(table, setting)
    return recipe_of(table, str(path))


def recipe_of(table: Mapping[str, Any], file: str) -> Recipe:
    """A recipe from the content of its file, which messages name. Raises RecipeError."""
    recipe = build(Recipe, table, file, "")
    _check(recipe, file)
    return recipe


def _check(recipe: Recipe, file: str) -> None:
    """Raise RecipeError for what cannot be trained although every key is right."""
    if not recipe.stages:
        raise RecipeError(f"{file}: no stages")
    if twice := _twice(recipe.stages):
        raise RecipeError(f"{file}: two stages are called {twice!r}; their states would take the same file")
    if recipe.localisation == "tokens" and not any("text" in stage.train for stage in recipe.stages):
        raise RecipeError(f"{file}: localisation 'tokens' adds to the vocabulary, so a stage must train 'text'")
    if recipe.localisation != "regression" and any("mask" in s.losses for t in recipe.stages for s in t.sources):
        raise RecipeError(
            f"{file}: masks are learned from boxes of the location head: set localisation to 'regression'"
        )
    if recipe.conversation.system is not None and recipe.family != "glamm":
        raise RecipeError(f'{file}: conversation.system needs family = "glamm"')
    for stage in recipe.stages:
        at = f"{file}: stages ({stage.name})"
        _check_stage(stage, at)
        _check_family(recipe.family, stage, at)
        for source in (*stage.sources, *stage.held_out):
            _check_source(stage, source, f"{at}.sources ({source.name})")


def _check_stage(stage: StageSpec, at: str) -> None:
    if not stage.sources:
        raise RecipeError(f"{at}: no sources")
    if not stage.train:
        raise RecipeError(f"{at}.train: name the parts that learn")
    for key in ("steps", "report_every"):
        if getattr(stage, key) < 1:
            raise RecipeError(f"{at}.{key}: must be at least 1")
    for specs in (stage.sources, stage.held_out):
        if twice := _twice(specs):
            raise RecipeError(f"{at}: two sources are called {twice!r}; what is logged goes by their names")
    if stage.mixing != "all" and stage.batch < 1:
        raise RecipeError(f"{at}.batch: say how many pictures a step takes")
    if lacking := [s.name for s in stage.sources if stage.mixing == "all" and s.pictures < 1]:
        raise RecipeError(f"{at}.sources ({lacking[0]}).pictures: say how many pictures a step takes of it")
    if stage.objective == "prompt_grid" and set(stage.cache) not in PROMPT_GRID_CACHES:
        raise RecipeError(f"{at}.cache: this objective needs sam, and semantic or small")
    if stage.objective != "prompt_grid" and "small" in stage.cache:
        raise RecipeError(f"{at}.cache: 'small' is for the objective 'prompt_grid'")
    if cached := [part for what in stage.cache if (part := CACHED_PARTS.get(what)) in stage.train]:
        raise RecipeError(f"{at}.cache: features of {cached[0]} change while it trains")


def _check_family(family: Family, stage: StageSpec, at: str) -> None:
    """Raise RecipeError for what the other family has."""
    sources = (*stage.sources, *stage.held_out)
    if family == "pixelllm":
        glamm_only = ("types", "walk", "pictures")
        if "clip" in stage.cache or stage.mixing in glamm_only or any(source.task for source in sources):
            raise RecipeError(f"{at}: 'clip' in cache, tasks, and mixing {stage.mixing!r} need family = \"glamm\"")
        if stage.auxiliary.box or stage.auxiliary.place:
            raise RecipeError(f"{at}.auxiliary: 'box' and 'place' need family = \"glamm\"")
        return
    if stage.objective == "prompt_grid" or "semantic" in stage.cache or stage.fused_attention:
        raise RecipeError(f"{at}: objective 'prompt_grid', 'semantic' in cache and fused_attention are PixelLLM's")
    if stage.objective == "grid":
        return
    if stage.auxiliary.match or stage.auxiliary.cells or stage.auxiliary.standardize:
        raise RecipeError(f"{at}.auxiliary: GLaMM has 'look', 'box' and 'place'")
    if stage.auxiliary.look and stage.recompute:
        raise RecipeError(f"{at}.recompute: attention that is led cannot be computed again; leave out auxiliary.look")
    if lacking := [source.name for source in sources if not source.task]:
        raise RecipeError(f"{at}.sources ({lacking[0]}).task: say what is asked: {', '.join(TYPE_OF)}")
    for source in sources:
        if {"point", "proposal"} & set(source.losses):
            raise RecipeError(f"{at}.sources ({source.name}).losses: GLaMM learns 'text' and 'mask'")
        if "mask" in source.losses and TYPE_OF[source.task] != "mask":
            raise RecipeError(f"{at}.sources ({source.name}).losses: the task {source.task!r} has no masks")
    if stage.mixing == "types":
        active = {TYPE_OF[source.task] for source in stage.sources}
        if set(stage.types) != active or min(stage.types.values()) <= 0:
            raise RecipeError(f"{at}.types: give a weight above 0 for each type of its sources: {', '.join(active)}")


def _check_source(stage: StageSpec, source: SourceSpec, at: str) -> None:
    helped = not source.task and (stage.auxiliary.match or stage.auxiliary.look or stage.auxiliary.cells)
    dense = stage.objective != "text" or helped
    if dense and not source.instances:
        raise RecipeError(f"{at}.instances: this objective needs them")
    if (dense or stage.cache or source.task) and (source.scale != (1.0, 1.0) or source.flip):
        raise RecipeError(f"{at}: cached features, cells and GLaMM allow no augmentation")
    if stage.objective == "text" and not source.losses:
        raise RecipeError(f"{at}.losses: name what its rows teach: text, point, mask, proposal")
    if "mask" in source.losses and "sam" in stage.cache and not source.task:
        raise RecipeError(f"{at}.losses: masks need SAM's own map, which is not cached: take 'sam' out of cache")


def _twice(specs: Sequence[StageSpec] | Sequence[SourceSpec]) -> str | None:
    """A name that comes twice, or None."""
    names = [spec.name for spec in specs]
    return next((name for name in names if names.count(name) > 1), None)
