"""The task table of a model: what an export writes into its bundle, and how an evaluation asks its checkpoint."""

from __future__ import annotations

from dataclasses import replace

from deixis.bundle import TaskSpec
from deixis_train.models.config import PixelLLMConfig

TRACE_RULE, REFER_RULE = "begin,end,pad", "^end-1"  # section 8
REGION_CAPTION_LENGTH = 40  # section 11
# What a checkpoint may set for "dense_captions" beside the fields of TaskSpec; the first three are the detector's own.
DETECTION_CHOICES = ("score_threshold", "detection_iou", "max_detections", "join_scores")


def default_tasks(config: PixelLLMConfig) -> dict[str, TaskSpec]:
    """The task table of section 1 with the decoder settings of section 11, bounded by the model's own lengths."""
    caption = TaskSpec(
        instruction="A long image caption: ",
        instruction_tokens=config.context_length,
        max_length=config.max_caption_length,
        beams=4,
        beams_per_node=2,
        points_at=TRACE_RULE,
    )
    region = replace(
        caption,
        instruction="an object of ",
        max_length=min(REGION_CAPTION_LENGTH, config.max_caption_length),
        beams=1,
        beams_per_node=1,
    )
    tasks = {"caption": caption, "region_caption": region}
    if config.point_predictor is not None:
        tasks["trace"] = replace(caption, beams=1, beams_per_node=1)
        tasks["refer"] = TaskSpec(
            instruction="where is {text}",
            instruction_tokens=config.refer_length,
            max_length=config.refer_length,
            points_at=REFER_RULE,
        )
    if config.box_decoder is not None:
        tasks["dense_captions"] = region
    return tasks
