"""Golden directories: the sizes in their `config.json` as a `PixelLLMConfig`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from deixis_train.models.config import (
    BoxDecoderConfig,
    Eva02Config,
    MaskAdapterConfig,
    MaskDecoderConfig,
    PixelLLMConfig,
    PointPredictorConfig,
    PromptAdapterConfig,
    SamVitConfig,
    T5Config,
)

Part = TypeVar("Part")

# Ours -> theirs, for the fields of the whole model. What the file lacks keeps our default.
_FIELDS = {
    "name": "name",
    "image_size": "image_size",
    "prompt_embed_dim": "prompt_embed_dim",
    "prompt_use_box_rate": "prompt_use_box_rate",
    "max_caption_length": "max_caption_length",
    "context_length": "context_length",
    "begin_token_id": "begin_token_id",
    "end_token_id": "end_token_id",
    "pixel_mean_semantic": "pixel_mean_git",
    "pixel_std_semantic": "pixel_std_git",
    "pixel_mean_sam": "pixel_mean_sam",
    "pixel_std_sam": "pixel_std_sam",
}


def config_from_golden(config_json: dict[str, Any]) -> PixelLLMConfig:
    """The model's configuration from the `config.json` of a golden directory.

    Point predictor, mask decoder, mask adapter and box decoder are absent from the model where the file does not
    mention them, and so is LoRA where it gives no ranks. Fields that say nothing about our parts (beams, ...) are left
    alone.

    Raises:
        ValueError: if an encoder, the prompt adapter or the text model is not described.
    """
    needed = ("eva02", "sam", "prompt_adapter", "t5")
    if lacking := [key for key in needed if not config_json.get(key)]:
        raise ValueError(f"golden config lacks {', '.join(lacking)}")
    whole = {ours: _frozen(config_json[theirs]) for ours, theirs in _FIELDS.items() if theirs in config_json}
    return PixelLLMConfig(
        **whole,
        refer_length=config_json.get("max_caption_length", PixelLLMConfig.refer_length),
        semantic=_part(Eva02Config, config_json["eva02"]),
        sam=_part(SamVitConfig, config_json["sam"]),
        prompt_adapter=_part(PromptAdapterConfig, config_json["prompt_adapter"]),
        t5=_part(T5Config, {"enc_rank": 0, "dec_rank": 0, **config_json["t5"]}),
        point_predictor=_optional(PointPredictorConfig, config_json, "point_predictor"),
        mask_decoder=_optional(MaskDecoderConfig, config_json, "mask_decoder"),
        mask_adapter=_optional(MaskAdapterConfig, config_json, "mask_adapter"),
        box_decoder=_box_decoder(config_json) if config_json.get("box_decoder") else None,
    )


def _box_decoder(config_json: dict[str, Any]) -> BoxDecoderConfig:
    """The detector's sizes; the width of its first stage's tower stands beside them."""
    values = config_json["box_decoder"]
    pyramid = values["fpn_args"]
    return BoxDecoderConfig(
        up_channels=pyramid["in_dim"] // 2,
        channels=pyramid["out_channels"],
        tower_channels=config_json["box_head_channels"],
        fc_dims=tuple(values["roi_fc_dims"]),
        strides=tuple(values["strides"]),
        pre_nms_test=values["pre_nms_topk_test"],
        post_nms_test=values["post_nms_topk_test"],
        pre_nms_train=values["pre_nms_topk_train"],
        post_nms_train=values["post_nms_topk_train"],
        proposal_iou=values["iou_thresh"],
        detection_iou=values["roi_nms_threshold"],
        max_detections=values["roi_post_nms_num_detections"],
        match_iou=values["match_gt_thresh"],
    )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _part(kind: type[Part], values: dict[str, Any]) -> Part:
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{key: _frozen(value) for key, value in values.items() if key in names})


def _optional(kind: type[Part], config_json: dict[str, Any], key: str) -> Part | None:
    return _part(kind, config_json[key]) if config_json.get(key) else None
