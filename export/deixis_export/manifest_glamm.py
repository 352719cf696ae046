"""What the manifest of a bundle of family glamm says beside its graphs."""

from __future__ import annotations

from collections.abc import Mapping

from deixis.bundle import (
    FORMAT_NAME,
    Caches,
    CacheSpec,
    DimRange,
    Format,
    ImageSpec,
    Manifest,
    MaskSpec,
    ModelInfo,
    TaskSpec,
    TokenizerSpec,
)
from deixis.glamm.session import BLOCK
from deixis_export.manifest import MAX_PICTURES, MAX_ROWS, Contents, Overrides, override_tasks
from deixis_export.step_head import reductions
from deixis_train.glamm.conversations import conversation_spec
from deixis_train.models.glamm.config import GlammConfig
from deixis_train.models.glamm.glamm import Glamm
from deixis_train.tasks import glamm_tasks

MAX_BOXES, MAX_MASKS = 64, 128  # of a run of the graphs


def task_table(config: GlammConfig, overrides: Overrides) -> dict[str, TaskSpec]:
    """Defaults with a checkpoint's own settings over them. Raises ExportError for unknown ones."""
    return override_tasks(glamm_tasks(config), overrides)


def default_capacity(config: GlammConfig, tasks: Mapping[str, TaskSpec]) -> int:
    """Places for a picture, the longest question and the longest answer, in the whole blocks that caches grow by."""
    longest = max(task.instruction_tokens + task.max_length for task in tasks.values())
    return -(-(config.clip.tokens + longest) // BLOCK) * BLOCK


def dim_ranges(config: GlammConfig, tasks: Mapping[str, TaskSpec]) -> dict[str, DimRange]:
    """Ranges of the symbolic dimensions, from what the tasks ask for."""
    capacity = default_capacity(config, tasks)
    ranges = {
        "B": DimRange(1, 1, MAX_PICTURES),
        "R": DimRange(1, 1, MAX_ROWS),
        "S": DimRange(1, 1, 4 * capacity),
        "V": DimRange(1, config.clip.tokens, MAX_ROWS * (config.clip.tokens + MAX_BOXES)),
        "T": DimRange(1, capacity, 4 * capacity),
        "M": DimRange(1, 1, MAX_MASKS),
    }
    return ranges | ({"K": DimRange(1, 1, MAX_ROWS * MAX_BOXES)} if config.region is not None else {})


def make_manifest(model: Glamm, overrides: Overrides, contents: Contents) -> Manifest:
    """The manifest of a bundle of family glamm; `overrides` are a checkpoint's own settings of tasks."""
    config = model.config
    tasks, ids, llama = task_table(config, overrides), config.ids, config.llama
    return Manifest(
        format=Format(FORMAT_NAME, "1.3"),
        model=ModelInfo("glamm", config.name),
        files=contents.files,
        graphs=contents.graphs,
        dims=dim_ranges(config, tasks),
        caches=Caches(CacheSpec(llama.layers, llama.kv_heads, llama.head_dim), None, default_capacity(config, tasks)),
        image=ImageSpec(config.image_size, resize="longest_side", antialias=True),
        tokenizer=TokenizerSpec(contents.tokenizer_file, ids.begin, ids.end, ids.pad, ids.unknown, llama.vocab),
        location=None,
        prompts=None,
        tasks=tasks,
        mask=MaskSpec(prompt_width=config.prompt_embed_dim),
        parity=contents.parity,
        golden=contents.golden_file,
        provenance=contents.provenance(),
        conversation=conversation_spec(config),
        global_image=ImageSpec(
            config.clip.image_size, resize=config.clip.fit, interpolation="bicubic", antialias=True, pad="none"
        ),
        reductions=reductions(llama.vocab),
    )
