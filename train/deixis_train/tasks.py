"""The task table of a model: what an export writes into its bundle, and how an evaluation asks its checkpoint."""

from __future__ import annotations

from dataclasses import replace

from deixis.bundle import TaskSpec
from deixis_train.models.config import PixelLLMConfig
from deixis_train.models.glamm.config import GlammConfig

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


# The published questions to the letter (GLaMM section 8). The five spaces are part of what the weights were trained on.
DESCRIBE = "Could you please give me a detailed description of the image?"
DESCRIBE_GROUNDED = (
    f"{DESCRIBE} Please respond with interleaved     segmentation masks for the corresponding parts of the answer."
)
DESCRIBE_REGION = "Can you provide me with a detailed description of the region in the picture marked by <bbox>?"


def glamm_tasks(config: GlammConfig) -> dict[str, TaskSpec]:
    """The task table of a GLaMM: the question of each task, `{text}` being the user's, and the longest answers.

    Decoding is greedy, and a token may repeat the one before. No question was published for `ground_phrases`; its
    answer is a text that exists already, so it asks what `grounded_caption` asks.
    """

    def ask(question: str) -> TaskSpec:
        return TaskSpec(
            instruction=question,
            instruction_tokens=config.max_question_tokens,
            max_length=config.max_new_tokens,
            ban_repeat=False,
        )

    tasks = {
        "caption": ask(DESCRIBE),
        "refer": ask("Can you segment the {text} in this image?"),
        "grounded_caption": ask(DESCRIBE_GROUNDED),
        "ground_phrases": ask(DESCRIBE_GROUNDED),
        "ask": ask("{text}"),
    }
    if config.region is not None:
        tasks["region_caption"] = ask(DESCRIBE_REGION)
    return tasks
