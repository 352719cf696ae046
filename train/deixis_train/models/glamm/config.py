"""Sizes of every part of GLaMM, its special tokens, and the named presets.

Like `models.config`: a frozen dataclass that goes to JSON and back, stored beside the weights of a checkpoint. Sizes of
the published models: GLaMM specification sections 3 to 6.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from deixis_train.models.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    SAM_SIZES,
    MaskDecoderConfig,
    SamVitConfig,
    TinyVitConfig,
    build_config,
)

# On the 0..255 scale.
OPENAI_MEAN = (122.7709383, 116.7460125, 104.09373615)
OPENAI_STD = (68.5005327, 66.6321579, 70.32316305)


@dataclass(frozen=True)
class ClipConfig:
    """CLIP's image encoder, the global encoder (section 3).

    architecture: "eva02" is a choice of ours: the blocks of `Eva02Config` at these sizes, see `glamm.eva_vision`.
    """

    architecture: Literal["clip", "eva02"] = "clip"
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    patch_size: int = 14
    image_size: int = 336  # there is no interpolation of positions: pictures have this size
    # Which hidden state becomes the features, counted like a Python index over embeddings and blocks. Blocks behind it
    # are not computed.
    select_layer: int = -2
    # How a picture fills that square: "center_crop" cuts the ends of a long one off (section 2.1); "stretch", which is
    # not published, shows all of it, each axis resized by its own factor.
    fit: Literal["center_crop", "stretch"] = "center_crop"

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Image tokens of a picture, the class token left out."""
        return self.grid * self.grid

    @property
    def selected(self) -> int:
        """`select_layer` counted from the front: how many blocks are computed."""
        return self.select_layer % (self.depth + 1)


@dataclass(frozen=True)
class RegionConfig:
    """The region encoder (section 4). Its maps have the width of CLIP."""

    levels: int = 4  # hidden states of CLIP: every third one up to the selected one
    rounds: int = 5  # of fusing neighbouring levels
    groups: int = 64  # of the group norms
    crop: int = 14  # side of a RoI
    frame: int = 224  # px: what normalised boxes are multiplied by; not the picture's size (quirk Q1)
    hidden_dim: int = 1024  # behind the flattened RoI
    position_dim: int = 256  # inside the embedding of a box


@dataclass(frozen=True)
class LlamaConfig:
    """LLaMA (section 5). Fewer key and value heads than heads is grouped-query attention."""

    vocab: int = 32007
    emb: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp: int = 11008
    rms_eps: float = 1e-5  # 1e-6 in older Vicunas: a loader reads it
    rope_base: float = 10000.0
    tied: bool = False  # the vocabulary head is the embedding table
    lora_rank: int = 0  # on query and value projections while training (section 9.3)
    lora_scale: float = 2.0
    lora_dropout: float = 0.05  # of what the factors see


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens with a meaning (section 5.1)."""

    begin: int = 1
    end: int = 2
    pad: int = 0
    unknown: int = 0
    image_start: int = 32000
    image_end: int = 32001
    region: int = 32002  # <bbox>
    mask: int = 32004  # [SEG]
    phrase_start: int = 32005  # <p>
    phrase_end: int = 32006  # </p>


@dataclass(frozen=True)
class GlammConfig:
    """Everything that decides the shape of a GLaMM. Without `region` it takes no boxes."""

    name: str = "glamm-7b"
    clip: ClipConfig = field(default_factory=ClipConfig)
    region: RegionConfig | None = field(default_factory=RegionConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    image_size: int = 1024  # side of the grounding encoder's square, padded input
    sam: SamVitConfig | TinyVitConfig = field(default_factory=SamVitConfig)
    prompt_embed_dim: int = 256
    # Width inside the part that takes masks as prompts, 16 in SAM. GLaMM gives none, so 0: it has no such part.
    mask_prompt_channels: int = 0
    mask_decoder: MaskDecoderConfig = field(default_factory=MaskDecoderConfig)
    ids: SpecialIds = field(default_factory=SpecialIds)
    system: str | None = None  # text that every conversation begins with; None: the published one
    max_new_tokens: int = 512
    max_question_tokens: int = 384
    pixel_mean_clip: tuple[float, ...] = OPENAI_MEAN
    pixel_std_clip: tuple[float, ...] = OPENAI_STD
    pixel_mean_sam: tuple[float, ...] = IMAGENET_MEAN
    pixel_std_sam: tuple[float, ...] = IMAGENET_STD

    @property
    def region_layers(self) -> tuple[int, ...]:
        """Hidden states of CLIP that the region encoder reads, shallow first: every third up to the selected one.

        Empty without region encoder. Raises ValueError if CLIP is not deep enough.
        """
        if self.region is None:
            return ()
        layers = tuple(range(self.clip.selected, -1, -3))[: self.region.levels]
        if len(layers) < self.region.levels:
            raise ValueError(
                f"model {self.name!r}: hidden state {self.clip.selected} of CLIP has only {len(layers)} levels up to "
                f"it, the region encoder wants {self.region.levels}"
            )
        return layers[::-1]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> GlammConfig:
        """Build from `to_dict` output or JSON of it. An unknown key raises ValueError naming it."""
        return build_config(GlammConfig, values)


GLAMM_PRESETS: dict[str, GlammConfig] = {
    # For tests: every mechanism (grouped queries, windows, regions, two grids), nothing trained.
    "glamm-tiny": GlammConfig(
        name="glamm-tiny",
        clip=ClipConfig(embed_dim=32, depth=12, num_heads=2, mlp_dim=72, image_size=112),
        region=RegionConfig(groups=8, crop=6, frame=80, hidden_dim=48, position_dim=24),
        llama=LlamaConfig(vocab=256, emb=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=160),
        image_size=128,
        sam=SamVitConfig(
            embed_dim=32, depth=3, num_heads=2, out_chans=32, img_size=128, window_size=3, window_block_indexes=(0, 1)
        ),
        prompt_embed_dim=32,
        mask_decoder=MaskDecoderConfig(num_heads=4, mlp_dim=64, iou_head_hidden_dim=40),
        ids=SpecialIds(image_start=249, image_end=250, region=251, mask=253, phrase_start=254, phrase_end=255),
        max_new_tokens=48,
        max_question_tokens=160,
    ),
    # The demo: MobileSAM's frozen encoder at 512 px as the grounding encoder; the global encoder has the sizes of the
    # semantic encoder of `tabletop`, on the same 16 x 16 grid, and begins with its weights.
    "tabletop-glamm": GlammConfig(
        name="tabletop-glamm",
        clip=ClipConfig(
            architecture="eva02",
            embed_dim=192,
            depth=4,
            num_heads=3,
            mlp_dim=512,
            image_size=224,
            select_layer=-1,
            fit="stretch",
        ),
        region=RegionConfig(groups=16, rounds=2, crop=7, frame=224, hidden_dim=192, position_dim=64, levels=2),
        llama=LlamaConfig(vocab=320, emb=192, layers=6, heads=6, kv_heads=2, head_dim=32, mlp=512),
        image_size=512,
        sam=TinyVitConfig(),
        ids=SpecialIds(image_start=312, image_end=313, region=314, mask=316, phrase_start=317, phrase_end=318),
        max_new_tokens=128,
        max_question_tokens=256,
    ),
    # For benchmarks: the sizes of SmolLM2-135M as language model and a small CLIP, the rest as in the demo.
    "glamm-135m": GlammConfig(
        name="glamm-135m",
        clip=ClipConfig(embed_dim=192, depth=8, num_heads=3, mlp_dim=576, image_size=224, select_layer=-1),
        region=RegionConfig(groups=16, rounds=2, crop=7, frame=224, hidden_dim=192, position_dim=64, levels=2),
        llama=LlamaConfig(
            vocab=49159,
            emb=576,
            layers=30,
            heads=9,
            kv_heads=3,
            head_dim=64,
            mlp=1536,
            rope_base=100_000.0,
            tied=True,
        ),
        image_size=512,
        sam=TinyVitConfig(),
        ids=SpecialIds(
            image_start=49152, image_end=49153, region=49154, mask=49156, phrase_start=49157, phrase_end=49158
        ),
        max_new_tokens=512,
        max_question_tokens=256,
    ),
    # The published sizes: 8.0 billion parameters, SAM ViT-H, CLIP ViT-L/14 at 336 px, Vicuna 7B.
    "glamm-7b": GlammConfig(sam=SAM_SIZES["huge"]),
}
