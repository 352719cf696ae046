"""What a bundle's manifest says beside its graphs: tasks, sizes, tokenizer, where it came from."""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from deixis import __version__
from deixis.bundle import (
    FORMAT_NAME,
    Caches,
    CacheSpec,
    DetectionSpec,
    DimRange,
    FileInfo,
    Format,
    Graph,
    ImageSpec,
    LocationSpec,
    Manifest,
    MaskSpec,
    ModelInfo,
    ParityRecord,
    PromptSpec,
    Provenance,
    TaskSpec,
    TokenizerSpec,
)
from deixis.errors import ExportError
from deixis_export.step_head import reductions
from deixis_train.losses.boxes import DELTA_SCALE, MAX_LOG_SCALE
from deixis_train.models.config import PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.tasks import DETECTION_CHOICES, default_tasks

PAD_ID = 0  # of every text head
MAX_PICTURES, MAX_ROWS = 16, 128

Overrides = Mapping[str, Mapping[str, Any]]  # fields of tasks that a checkpoint sets itself, by task


@dataclass(frozen=True)
class Contents:
    """What a bundle holds whatever the family of its model, as the manifest says it."""

    graphs: dict[str, Graph]
    files: dict[str, FileInfo]
    parity: dict[str, ParityRecord]
    tokenizer_file: str
    golden_file: str
    source: str
    licence: str

    def provenance(self) -> Provenance:
        return Provenance(
            exporter=f"deixis {__version__}",
            created=_today(),
            source=self.source,
            licence=self.licence,
            versions=_versions(),
        )


def detection_spec(config: PixelLLMConfig, overrides: Overrides | None = None) -> DetectionSpec | None:
    """How the runtime joins both stages of the detector, with a checkpoint's own settings; None without one."""
    detector = config.box_decoder
    if detector is None:
        return None
    spec = DetectionSpec(
        candidates=detector.pre_nms_test,
        proposal_iou=detector.proposal_iou,
        proposals=detector.post_nms_test,
        delta_scale=DELTA_SCALE,
        max_log_scale=MAX_LOG_SCALE,
        score_threshold=detector.score_threshold,
        detection_iou=detector.detection_iou,
        max_detections=detector.max_detections,
    )
    chosen = (overrides or {}).get("dense_captions", {})
    return dataclasses.replace(spec, **{name: chosen[name] for name in DETECTION_CHOICES if name in chosen})


def task_table(config: PixelLLMConfig, overrides: Overrides) -> dict[str, TaskSpec]:
    """Defaults with a checkpoint's own settings over them. Raises ExportError for unknown ones and too long ones."""
    tasks = override_tasks(default_tasks(config), overrides, {"dense_captions": DETECTION_CHOICES})
    positions = config.text.max_positions
    for name in overrides:
        longest = max(tasks[name].max_length, tasks[name].instruction_tokens)
        if positions is not None and longest > positions:
            raise ExportError(f"task {name!r} has texts of {longest} tokens, the text head only {positions} positions")
    return tasks


def override_tasks(
    tasks: Mapping[str, TaskSpec], overrides: Overrides, beside: Mapping[str, Sequence[str]] | None = None
) -> dict[str, TaskSpec]:
    """A task table with a checkpoint's own settings over it; `beside` names what a task may set that is no field of
    TaskSpec. Raises ExportError for unknown tasks and fields."""
    table = dict(tasks)
    fields = {f.name for f in dataclasses.fields(TaskSpec)}
    for name, values in overrides.items():
        if name not in table:
            raise ExportError(f"the checkpoint sets task {name!r}, which this model has not; it has {', '.join(table)}")
        known = fields | set((beside or {}).get(name, ()))
        unknown = set(values) - known
        if unknown:
            raise ExportError(
                f"task {name!r}: unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}"
            )
        table[name] = dataclasses.replace(table[name], **{k: v for k, v in values.items() if k in fields})
    return table


def dim_ranges(model: PixelLLM, tasks: Mapping[str, TaskSpec]) -> dict[str, DimRange]:
    """Ranges of the symbolic dimensions, from what the tasks ask for."""
    config = model.config
    context = max(task.instruction_tokens for task in tasks.values())
    length = max(task.max_length for task in tasks.values())
    positions = config.text.max_positions or 4 * length
    beams = max(task.beams for task in tasks.values())
    queries = config.prompt_adapter.num_outputs if config.prompt_fuse == "sparse" else model.grid * model.grid
    proposals = config.box_decoder.post_nms_test if config.box_decoder else 0
    return {
        **({"O": DimRange(1, proposals, proposals)} if proposals else {}),
        "B": DimRange(1, 1, MAX_PICTURES),
        "R": DimRange(1, beams, MAX_ROWS),
        "N": DimRange(1, 1, MAX_ROWS),
        "P": DimRange(1, 5, 64),
        "C": DimRange(1, min(8, context), context),
        "E": DimRange(queries + 1, queries + min(8, context), queries + context),
        "S": DimRange(1, 1, length),
        "T": DimRange(1, length, min(4 * length, positions)),
        "L": DimRange(1, length, length),
    }


def make_manifest(model: PixelLLM, overrides: Overrides, contents: Contents) -> Manifest:
    """The manifest of a bundle of family pixelllm; `overrides` are a checkpoint's own settings of tasks."""
    tasks = task_table(model.config, overrides)
    detection = detection_spec(model.config, overrides)
    config = model.config
    cache = CacheSpec(config.text.layers, config.text.heads, config.text.head_dim)
    return Manifest(
        format=Format(FORMAT_NAME, "1.3"),  # the oldest that has it all
        model=ModelInfo("pixelllm", config.name),
        files=contents.files,
        graphs=contents.graphs,
        dims=dim_ranges(model, tasks),
        caches=Caches(cache, cache, default_capacity=max(task.max_length for task in tasks.values())),
        image=ImageSpec(config.image_size),
        tokenizer=TokenizerSpec(
            contents.tokenizer_file,
            config.begin_token_id,
            config.end_token_id,
            PAD_ID,
            config.unknown_token_id,
            config.text.vocab,
        ),
        location=LocationSpec(config.point_predictor.num_output_points if config.point_predictor else 1),
        prompts=PromptSpec("box" if config.prompt_use_box_rate > 0 else "corners"),
        tasks=tasks,
        mask=MaskSpec(prompt_width=config.prompt_embed_dim),
        parity=contents.parity,
        golden=contents.golden_file,
        provenance=contents.provenance(),
        detection=detection,
        reductions=reductions(config.text.vocab),
    )


def _today() -> str:
    """Today's date; SOURCE_DATE_EPOCH overrides it, so that builds can be repeated byte for byte."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    now = datetime.datetime.now(datetime.timezone.utc)
    if epoch is not None:
        now = datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc)
    return now.date().isoformat()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "onnx", "onnxruntime", "numpy", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
