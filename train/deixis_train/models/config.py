"""Sizes of every part of PixelLLM, and the named presets.

A configuration is a frozen dataclass that goes to JSON and back (`to_dict`, `from_dict`); it is stored beside the
weights of a checkpoint. Sizes of the published models: specification sections 3 to 9.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

CLIP_MEAN = (122.7709383, 116.7460125, 104.09373615)
CLIP_STD = (68.5005327, 66.6321579, 70.32316305)
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Eva02Config:
    """EVA02 ViT, the semantic encoder (section 3)."""

    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    patch_size: int = 14
    mlp_ratio: float = 8 / 3  # hidden width is int(embed_dim * mlp_ratio)
    pretrain_img_size: int = 224  # the learned position table has (pretrain_img_size // patch_size) ** 2 + 1 rows


@dataclass(frozen=True)
class SamVitConfig:
    """SAM's plain ViT with windowed attention (section 4)."""

    embed_dim: int = 1280
    depth: int = 32
    num_heads: int = 16
    patch_size: int = 16
    mlp_ratio: float = 4.0
    out_chans: int = 256
    img_size: int = 1024  # size the position tables were trained at; they are resampled to the input size
    window_size: int = 14
    window_block_indexes: tuple[int, ...] = tuple(i for i in range(32) if i not in (7, 15, 23, 31))


@dataclass(frozen=True)
class TinyVitConfig:
    """TinyViT-5M as MobileSAM uses it: the edge choice for the SAM branch. Stride 16, neck of `out_chans`."""

    embed_dims: tuple[int, ...] = (64, 128, 160, 320)
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (2, 4, 5, 10)
    window_sizes: tuple[int, ...] = (7, 7, 14, 7)
    mlp_ratio: float = 4.0
    out_chans: int = 256


@dataclass(frozen=True)
class PromptAdapterConfig:
    """The prompt extractor: a SAM-type two-way transformer over the fused features (section 6)."""

    depth: int = 6
    transformer_dim: int = 512
    num_outputs: int = 32
    output_dim: int = 1024
    num_heads: int = 8
    mlp_dim: int = 2048


@dataclass(frozen=True)
class T5Config:
    """T5 1.1 encoder-decoder with untied output matrix (section 7). Inner width is heads * head_dim."""

    vocab: int = 32128
    emb: int = 2048
    heads: int = 32
    head_dim: int = 64
    layers: int = 24  # of the encoder, and of the decoder
    mlp: int = 5120
    enc_rank: int = 32  # LoRA rank on query and value of the encoder; 0 = no LoRA
    dec_rank: int = 32  # the same for decoder self- and cross-attention
    enc_scale: float = 2.0  # multiplies A @ B directly (not alpha / rank)
    dec_scale: float = 2.0
    relpos_buckets: int = 32
    relpos_max_distance: int = 128

    @property
    def max_positions(self) -> int | None:
        """Longest text: distances have no end."""
        return None


@dataclass(frozen=True)
class BertTextConfig:
    """The BERT/GIT text head, one stack without an encoder (section 7.1)."""

    vocab: int = 30522
    emb: int = 768
    heads: int = 12
    layers: int = 6
    mlp: int = 3072
    max_positions: int = 1024  # rows of the position table: longest context, and longest text

    @property
    def head_dim(self) -> int:
        return self.emb // self.heads


@dataclass(frozen=True)
class PointPredictorConfig:
    """The per-token location head (section 8)."""

    hidden_dim: int = 512
    depth: int = 4  # counts the Linears
    num_output_points: int = 2


@dataclass(frozen=True)
class MaskDecoderConfig:
    """SAM's mask decoder (section 9.3). Its transformer width is `prompt_embed_dim`."""

    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    mask_head_hidden_dim: int | None = None  # None: that of the IoU head, as in PixelLLM. SAM takes its width.
    transformer_depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048


@dataclass(frozen=True)
class MaskAdapterConfig:
    """Lets text and visual features move the box prompt of the mask decoder (section 9.2)."""

    num_outputs: int = 2
    depth: int = 2
    num_heads: int = 8
    mlp_dim: int = 2048
    gating: bool = True


@dataclass(frozen=True)
class BoxDecoderConfig:
    """The detector of dense captioning (section 10): pyramid, CenterNet head, and one stage on the boxes found."""

    up_channels: int = 384  # of the map that becomes P3, after doubling its side
    channels: int = 256  # of the pyramid
    tower_channels: int = 256  # of the CenterNet head
    fc_dims: tuple[int, ...] = (1024, 1024)  # of the second stage, two layers
    # Nominal strides of P3 to P7, px. None: half the grid's own stride, rounded up to a power of two, and its doubles
    strides: tuple[int, ...] | None = None
    pre_nms_test: int = 1000  # places considered per picture, and proposals kept of them
    post_nms_test: int = 256
    pre_nms_train: int = 2000
    post_nms_train: int = 1000
    proposal_iou: float = 0.9  # suppression starts here, in the first stage
    detection_iou: float = 0.5  # and in the second
    score_threshold: float = 0.05  # detections score more than this
    max_detections: int = 100
    match_iou: float = 0.6  # a proposal of at least this IoU with a true box is that object, in training
    rois_per_image: int = 512  # proposals that the second stage trains on
    caption_proposals: int = 32  # the first of those, which captions are learned on


@dataclass(frozen=True)
class PixelLLMConfig:
    """Everything that decides the shape of a PixelLLM. Parts set to None are absent from the model."""

    name: str = "xl"
    image_size: int = 384  # side of the square, padded network input, and the frame of prompt coordinates
    semantic_size: int | None = None  # side the semantic encoder sees; None = image_size. Only down-scaling.
    sam_size: int | None = None  # the same for the SAM branch
    # "largest": every map is resized to the largest grid (the reference's `a+b`); "first": to the semantic grid (`a,b`)
    fusion_grid: Literal["largest", "first"] = "largest"
    semantic: Eva02Config = field(default_factory=Eva02Config)
    sam: SamVitConfig | TinyVitConfig = field(default_factory=SamVitConfig)
    prompt_embed_dim: int = 256
    prompt_adapter: PromptAdapterConfig = field(default_factory=PromptAdapterConfig)
    # "sparse": the text head sees the learned output tokens (the paper); "dense": it sees every image token (the
    # reference's option)
    prompt_fuse: Literal["sparse", "dense"] = "sparse"
    t5: T5Config = field(default_factory=T5Config)
    bert: BertTextConfig | None = None  # set: the text head is this one, and `t5` is not used
    point_predictor: PointPredictorConfig | None = field(default_factory=PointPredictorConfig)
    mask_decoder: MaskDecoderConfig | None = field(default_factory=MaskDecoderConfig)
    mask_adapter: MaskAdapterConfig | None = None
    box_decoder: BoxDecoderConfig | None = None
    prompt_use_box_rate: float = 1.0  # > 0: boxes are box prompts; 0: boxes are given as their four corner points
    max_caption_length: int = 128
    context_length: int = 8  # most context tokens in captioning; referring uses `refer_length`
    refer_length: int = 40
    begin_token_id: int = 0
    end_token_id: int = 1
    unknown_token_id: int = 2  # what the tokenizer gives for what it cannot spell
    pixel_mean_semantic: tuple[float, ...] = CLIP_MEAN
    pixel_std_semantic: tuple[float, ...] = CLIP_STD
    pixel_mean_sam: tuple[float, ...] = IMAGENET_MEAN
    pixel_std_sam: tuple[float, ...] = IMAGENET_STD

    @property
    def text(self) -> T5Config | BertTextConfig:
        """The text head's."""
        return self.t5 if self.bert is None else self.bert

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PixelLLMConfig:
        """Build from `to_dict` output or JSON of it. An unknown key raises ValueError naming it."""
        return build_config(PixelLLMConfig, values)


def build_config(cls: Any, values: dict[str, Any], where: str = "config") -> Any:
    """A configuration dataclass from the dictionary that `dataclasses.asdict` made of it, or JSON of that.

    Raises ValueError naming an unknown key.
    """
    hints = typing.get_type_hints(cls)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{where}: unknown key {sorted(unknown)}; known are {sorted(hints)}")
    built: dict[str, Any] = {}
    for key, value in values.items():
        # Nested configurations arrive as dicts; a union is told apart by which class knows all the keys.
        options = [t for t in (hints[key], *typing.get_args(hints[key])) if dataclasses.is_dataclass(t)]
        if isinstance(value, dict):
            fits = [t for t in options if set(value) <= {f.name for f in dataclasses.fields(t)}]  # type: ignore[arg-type]
            if not fits:
                raise ValueError(f"{where}.{key}: no known part has the keys {sorted(value)}")
            value = build_config(fits[0], value, f"{where}.{key}")
        elif isinstance(value, list):
            value = tuple(value)
        built[key] = value
    return cls(**built)


def _t5(emb: int, heads: int, layers: int, mlp: int) -> T5Config:
    return T5Config(emb=emb, heads=heads, layers=layers, mlp=mlp)


T5_SIZES = {
    "small": _t5(512, 6, 8, 1024),
    "base": _t5(768, 12, 12, 2048),
    "large": _t5(1024, 16, 24, 2816),
    "xl": _t5(2048, 32, 24, 5120),
    "xxl": _t5(4096, 64, 24, 10240),
}
EVA02_SIZES = {
    "tiny": Eva02Config(embed_dim=192, depth=12, num_heads=3),
    "small": Eva02Config(embed_dim=384, depth=12, num_heads=6),
    "base": Eva02Config(embed_dim=768, depth=12, num_heads=12),
    "large": Eva02Config(),
}


def _global_at(depth: int, every: int) -> tuple[int, ...]:
    """Windowed blocks of a SAM ViT: all but every `every`-th, which attends globally."""
    return tuple(i for i in range(depth) if (i + 1) % every)


SAM_SIZES = {
    "base": SamVitConfig(embed_dim=768, depth=12, num_heads=12, window_block_indexes=_global_at(12, 3)),
    "large": SamVitConfig(embed_dim=1024, depth=24, num_heads=16, window_block_indexes=_global_at(24, 6)),
    "huge": SamVitConfig(),
}

PRESETS: dict[str, PixelLLMConfig] = {
    # For tests: every mechanism of the real thing (two grids that differ, windows, LoRA, adapter), nothing trained.
    "tiny": PixelLLMConfig(
        name="tiny",
        image_size=128,
        semantic=Eva02Config(embed_dim=32, depth=2, num_heads=2, pretrain_img_size=56),
        sam=SamVitConfig(
            embed_dim=32, depth=3, num_heads=2, out_chans=64, img_size=320, window_size=3, window_block_indexes=(0, 2)
        ),
        prompt_embed_dim=64,
        prompt_adapter=PromptAdapterConfig(
            depth=2, transformer_dim=48, num_outputs=6, output_dim=40, num_heads=4, mlp_dim=96
        ),
        t5=T5Config(vocab=120, emb=32, heads=2, head_dim=16, layers=2, mlp=48, enc_rank=4, dec_rank=3),
        point_predictor=PointPredictorConfig(hidden_dim=48),
        mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=96, iou_head_hidden_dim=32),
        mask_adapter=MaskAdapterConfig(num_heads=4, mlp_dim=96),
        max_caption_length=14,
        refer_length=14,
    ),
    # The demo: MobileSAM's frozen TinyViT at 512 px beside a small semantic encoder at 224 px, on the latter's 16 x 16
    # grid, whose 256 tokens go to the text head (see the model card for why).
    "tabletop": PixelLLMConfig(
        name="tabletop",
        image_size=512,
        semantic_size=224,
        fusion_grid="first",
        semantic=Eva02Config(embed_dim=192, depth=4, num_heads=3),
        sam=TinyVitConfig(),
        prompt_adapter=PromptAdapterConfig(
            depth=2, transformer_dim=128, num_outputs=1, output_dim=144, num_heads=4, mlp_dim=384
        ),
        prompt_fuse="dense",
        t5=T5Config(vocab=128, emb=144, heads=4, head_dim=32, layers=3, mlp=320, enc_rank=0, dec_rank=0),
        point_predictor=PointPredictorConfig(hidden_dim=192),
        mask_adapter=None,
        box_decoder=BoxDecoderConfig(
            up_channels=32,
            channels=32,
            tower_channels=32,
            fc_dims=(48, 48),
            pre_nms_test=400,
            post_nms_test=64,
            pre_nms_train=400,
            post_nms_train=200,
            max_detections=32,
            rois_per_image=64,
            caption_proposals=16,
        ),
        max_caption_length=64,
        refer_length=32,
    ),
    "small": PixelLLMConfig(
        name="small", image_size=512, semantic=EVA02_SIZES["tiny"], sam=TinyVitConfig(), t5=T5_SIZES["small"]
    ),
    "base": PixelLLMConfig(
        name="base", image_size=512, semantic=EVA02_SIZES["small"], sam=SAM_SIZES["base"], t5=T5_SIZES["base"]
    ),
    "large": PixelLLMConfig(
        name="large", image_size=512, semantic=EVA02_SIZES["base"], sam=SAM_SIZES["large"], t5=T5_SIZES["large"]
    ),
    "xl": PixelLLMConfig(
        name="xl", mask_adapter=MaskAdapterConfig(), box_decoder=BoxDecoderConfig(), context_length=32
    ),
    # The second published variant: the same pictures and prompts, BERT's vocabulary and special ids.
    "bert": PixelLLMConfig(
        name="bert",
        bert=BertTextConfig(),
        mask_adapter=MaskAdapterConfig(),
        box_decoder=BoxDecoderConfig(),
        context_length=32,
        begin_token_id=101,
        end_token_id=102,
        unknown_token_id=100,
    ),
}
