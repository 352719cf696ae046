"""Recipes: what to train, in which stages, on which data, as a small TOML file. Parsed strictly: an unknown key is an
error that names the file and the key.

A recipe may stand on another one (`base = "refer"`): its top-level keys replace those of the base, tables are merged,
and stages and sources are matched by name, so that an ablation says no more than what differs.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

from deixis_train.data.samples import Loss

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent.parent / "recipes"

Objective = Literal["text", "grid", "prompt_grid"]
Localisation = Literal["regression", "text", "tokens"]
# Names that `train` knows. "lora" stands for the LoRA factors of the text model, "text" for all of it.
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
]


class RecipeError(ValueError):
    """A recipe cannot be read. One line: file, key, what to do."""


@dataclass(frozen=True)
class Losses:
    """Weights of the model's own losses (section 12).

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


@dataclass(frozen=True)
class Auxiliary:
    """What only helps to learn; none of it is in the paper's recipes. Weights of 0 leave a loss out.

    match: which image tokens belong to the thing that a row means. look: cross-attention goes to the cells of what a
    token points at. cells: the dense objective on the extractor's image tokens. standardize: the extractor is trained
    on features of equal spread; the scale goes into its weights at the end.
    """

    match: float = 0.0
    look: float = 0.0
    cells: float = 0.0
    standardize: bool = False


@dataclass(frozen=True)
class SourceSpec:
    """A data set in a stage. Paths are relative to the data folder.

    kind, options, max_skipped: see `data.formats.open_source`. weight: share of the steps with mixing "draw", factor of
    its losses with mixing "all". pictures: of a step, with mixing "all". rows: most rows of a picture. instructions (or
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
    rows: int = 1
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

    dropout acts in the parts that train; with dropout_in_frozen in the frozen ones as well, as the reference has it.
    cache: which features of frozen encoders are kept on disk. fused_attention: the text encoder attends in one kernel;
    its table of distances is then frozen, and dropout must be off.
    """

    name: str
    steps: int
    rate: float
    train: tuple[Part, ...]
    sources: tuple[SourceSpec, ...]
    objective: Objective = "text"
    mixing: Literal["draw", "all"] = "draw"
    batch: int = 0
    micro_batch: int = 0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    layer_decay: float = 0.0
    paces: Mapping[str, float] = field(default_factory=dict)
    clip_norm: float = 0.0
    dropout: bool = True
    dropout_in_frozen: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    fused_attention: bool = False
    cache: tuple[Literal["sam", "semantic"], ...] = ()
    losses: Losses = field(default_factory=Losses)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    held_out: tuple[SourceSpec, ...] = ()
    held_out_batches: int = 4
    evaluate_every: int = 500
    report_every: int = 25
    save_every: int = 200


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
class Init:
    """What the model starts from; nothing named: from nothing.

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
    tokenizer: str | None = None


@dataclass(frozen=True)
class Recipe:
    preset: str
    stages: tuple[StageSpec, ...]
    description: str = ""
    seed: int = 0
    localisation: Localisation = "regression"
    dtype: Literal["fp16", "fp32"] = "fp16"  # of the checkpoint's matrices
    model: ModelSpec = field(default_factory=ModelSpec)
    init: Init = field(default_factory=Init)
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
    table = _read(path)
    for override in overrides:
        _override(table, override)
    return recipe_of(table, str(path))


def recipe_of(table: Mapping[str, Any], file: str) -> Recipe:
    """A recipe from the content of its file, which messages name. Raises RecipeError."""
    recipe = _build(Recipe, table, file, "")
    _check(recipe, file)
    return recipe


def _read(path: Path, depth: int = 0) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    base = table.pop("base", None)
    if base is None:
        return table
    beside = path.with_name(f"{base}.toml")
    if depth > 4 or not (beside.is_file() or base in shipped()):
        raise RecipeError(f"{path}: base: no recipe {base!r} beside it or among the shipped ones")
    return _merge(_read(beside if beside.is_file() else shipped()[base], depth + 1), table)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merge(old, value)
        elif isinstance(old, list) and _named(old) and _named(value):
            by_name = {item["name"]: item for item in old}
            for item in value:
                by_name[item["name"]] = _merge(by_name.get(item["name"], {}), item)
            merged[key] = list(by_name.values())
        else:
            merged[key] = value
    return merged


def _named(value: Any) -> bool:
    """Whether this is an array of tables that have names: stages or sources."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) and "name" in item for item in value)


def _override(table: Any, text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text}: write it as key=value")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value
    place: Any = table
    *way, last = key.split(".")
    for step in way:
        if isinstance(place, list):
            place = next((item for item in place if _named(place) and item["name"] == step), None)
        else:
            place = place.setdefault(step, {})
        if not isinstance(place, dict | list):
            raise RecipeError(f"--set {text}: the recipe has no {step!r}")
    if isinstance(place, list):
        raise RecipeError(f"--set {text}: {last!r} must be a key; name the item of {way[-1]} and its key")
    place[last] = parsed


def _build(cls: Any, table: Any, file: str, where: str) -> Any:
    if not isinstance(table, dict):
        raise RecipeError(f"{file}: {where or 'the file'} must be a table")
    label = f"{where} ({table['name']})" if isinstance(table.get("name"), str) else where
    hints, known = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    if unknown := sorted(set(table) - set(known)):
        key = f"{label}.{unknown[0]}" if label else unknown[0]
        raise RecipeError(f"{file}: unknown key {key}; known are {', '.join(known)}")
    for name, spec in known.items():
        if name not in table and spec.default is MISSING and spec.default_factory is MISSING:
            raise RecipeError(f"{file}: {label + '.' if label else ''}{name} is missing")
    return cls(**{key: _value(hints[key], v, file, f"{label}.{key}".strip(".")) for key, v in table.items()})


def _value(hint: Any, value: Any, file: str, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _value(next(a for a in args if a is not type(None)), value, file, where)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, file, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise RecipeError(f"{file}: {where} must be a list")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise RecipeError(f"{file}: {where} must have {len(args)} values")
        return tuple(_value(args[0], item, file, where) for item in value)
    if origin is Literal:
        if value not in args:
            raise RecipeError(f"{file}: {where} is {value!r}; known are {', '.join(map(str, args))}")
        return value
    if origin is not None:  # a mapping
        if not isinstance(value, dict):
            raise RecipeError(f"{file}: {where} must be a table")
        return {k: v if args[1] is Any else _value(args[1], v, file, f"{where}.{k}") for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool)):
        return value
    raise RecipeError(f"{file}: {where} must be {hint.__name__}, not {value!r}")


def _check(recipe: Recipe, file: str) -> None:
    """Raise RecipeError for what cannot be trained although every key is right."""
    if not recipe.stages:
        raise RecipeError(f"{file}: no stages")
    if recipe.localisation == "tokens" and not any("text" in stage.train for stage in recipe.stages):
        raise RecipeError(f"{file}: localisation 'tokens' adds to the vocabulary, so a stage must train 'text'")
    if recipe.localisation != "regression" and any(
        "mask" in s.losses for stage in recipe.stages for s in stage.sources
    ):
        raise RecipeError(
            f"{file}: masks are learned from boxes of the location head: set localisation to 'regression'"
        )
    for stage in recipe.stages:
        at = f"{file}: stages ({stage.name})"
        if not stage.sources:
            raise RecipeError(f"{at}: no sources")
        if stage.mixing == "draw" and stage.batch < 1:
            raise RecipeError(f"{at}.batch: say how many pictures a step takes")
        if lacking := [s.name for s in stage.sources if stage.mixing == "all" and s.pictures < 1]:
            raise RecipeError(f"{at}.sources ({lacking[0]}).pictures: say how many pictures a step takes of it")
        if stage.objective == "prompt_grid" and set(stage.cache) != {"sam", "semantic"}:
            raise RecipeError(f"{at}.cache: this objective needs both features cached")
        dense = stage.objective != "text" or stage.auxiliary.match or stage.auxiliary.look or stage.auxiliary.cells
        for source in (*stage.sources, *stage.held_out):
            if dense and not source.instances:
                raise RecipeError(f"{at}.sources ({source.name}).instances: this objective needs them")
            if (dense or stage.cache) and (source.scale != (1.0, 1.0) or source.flip):
                raise RecipeError(f"{at}.sources ({source.name}): cached features and cells allow no augmentation")
        if cached := [part for part in stage.cache if f"{part}_encoder" in stage.train]:
            raise RecipeError(f"{at}.cache: features of {cached[0]}_encoder change while it trains")
