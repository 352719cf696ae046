"""How a checkpoint is asked for each task: the same table that an export writes into the bundle (sections 1 and 11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from deixis.bundle import TaskSpec
from deixis_train.evaluation.errors import EvaluationError
from deixis_train.models.config import PixelLLMConfig
from deixis_train.tasks import DETECTION_CHOICES, default_tasks


def model_tasks(config: PixelLLMConfig, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskSpec]:
    """Tasks by name, with what the checkpoint says over the paper's settings.

    Raises EvaluationError for tasks or settings that there are not.
    """
    tasks = default_tasks(config)
    known = {field.name for field in fields(TaskSpec)}
    for name, values in overrides.items():
        more = set(DETECTION_CHOICES) if name == "dense_captions" else set()
        if name not in tasks or not set(values) <= known | more:
            raise EvaluationError(f"the checkpoint sets {dict(values)} for task {name!r}, which is not known here")
        tasks[name] = replace(tasks[name], **{key: value for key, value in values.items() if key in known})
    return tasks
