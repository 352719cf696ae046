"""How a checkpoint is asked for each task: the same table that an export writes into the bundle (sections 1 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from deixis.bundle import TaskSpec
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.models.config import PixelLLMConfig

REGION_CAPTION_LENGTH = 40


def model_tasks(config: PixelLLMConfig, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskSpec]:
    """Tasks by name, with what the checkpoint says over the paper's settings.

    Raises EvaluationError for tasks or settings that there are not.
    """
    caption = TaskSpec("A long image caption: ", config.context_length, config.max_caption_length, 4, 2)
    region = TaskSpec("an object of ", config.context_length, min(REGION_CAPTION_LENGTH, config.max_caption_length))
    tasks = {"caption": caption, "region_caption": region}
    if config.point_predictor is not None:
        tasks["trace"] = replace(caption, beams=1, beams_per_node=1)
        tasks["refer"] = TaskSpec("where is {text}", config.refer_length, config.refer_length, points_at="^end-1")
    known = {field.name for field in fields(TaskSpec)}
    for name, values in overrides.items():
        if name not in tasks or not set(values) <= known:
            raise EvaluationError(f"the checkpoint sets {dict(values)} for task {name!r}, which is not known here")
        tasks[name] = replace(tasks[name], **values)
    return tasks
