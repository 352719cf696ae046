"""The dataclasses of `manifest.json`: field names are the JSON keys. Standard library only; see docs/bundle.md.

Everybody imports them from `deixis.bundle`, which reads and writes the file; `manifest_checks` has what types cannot
say.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Literal

FORMAT_NAME = "deixis-bundle"
FORMAT_VERSION = (1, 3)  # 1.1: `detection`; 1.2: the family "glamm"; 1.3: `reductions`, `precision_search`

Dim = int | str  # a fixed size, or the name of a symbolic dimension


@dataclass(frozen=True)
class Format:
    name: str
    version: str  # "major.minor"; a runtime reads every minor of its own major


@dataclass(frozen=True)
class ModelInfo:
    family: str  # "pixelllm" or, since 1.2, "glamm"
    name: str
    revision: int = 1  # of the graph contract of this family


@dataclass(frozen=True)
class FileInfo:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorInfo:
    tensor: str  # name inside the ONNX file
    dtype: Literal["float32", "float16", "int64", "int32", "bool", "uint8"]
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Precision:
    weights: str  # how weights are stored: "fp32", "fp16", "int8", ...
    compute: str  # what they are computed in on a CPU
    fp32_islands: tuple[str, ...] = ()  # node-name prefixes that stay in fp32 whatever the precision


@dataclass(frozen=True)
class Graph:
    """One ONNX file with a role. `inputs` and `outputs` map logical names to tensors, in the order of the file."""

    file: str
    opset: int
    inputs: dict[str, TensorInfo]
    outputs: dict[str, TensorInfo]
    precision: Precision
    external: tuple[str, ...] = ()  # external-data files, relative to the bundle; may be shared by several graphs


@dataclass(frozen=True)
class DimRange:
    """What a symbolic dimension may be: the one source for TensorRT profiles and cache capacity."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class CacheSpec:
    """Keys and values per decoder layer: tensors `{key,value}.{i}` of [rows, heads, length, head_dim]."""

    layers: int
    heads: int
    head_dim: int
    dtype: Literal["float32", "float16"] = "float32"


@dataclass(frozen=True)
class Caches:
    self_cache: CacheSpec
    cross_cache: CacheSpec | None  # null where nothing is computed once per prompt: a decoder without an encoder
    default_capacity: int  # tokens; the load option's default


@dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the network input. Normalisation is inside the graphs."""

    size: int  # side of the square input, px
    # "fit_inside": longest side to `size` (smaller pictures grow), plain bilinear with half-pixel centres and no
    # anti-aliasing; short = floor(size * min / max), long = int(short * (max / min)) in float32 (section 2)
    # "longest_side" (1.2): both sides int(side * size / longest + 0.5)
    # "center_crop" (1.2): shortest side to `size`, the other int(size * long / short); then the middle size x size
    # "stretch" (1.2): the whole picture to size x size, each axis by its own factor
    resize: Literal["fit_inside", "longest_side", "center_crop", "stretch"] = "fit_inside"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    # True (1.2): the filter grows with the reduction, and both passes round to uint8, as Pillow does it
    antialias: bool = False
    pad: Literal["right_bottom", "none"] = "right_bottom"
    pad_value: float = 0.0
    channels: Literal["RGB"] = "RGB"


@dataclass(frozen=True)
class Reductions:
    """What `decoder_step` makes of its logits: the likeliest `candidates` ids of each row and their log-probabilities.

    Its input `banned` names an id per row whose logit is lowered to `ban_ceiling` at most before, or -1.
    """

    candidates: int
    ban_ceiling: float = -1e4


@dataclass(frozen=True)
class TokenizerSpec:
    file: str
    begin_id: int
    end_id: int
    pad_id: int
    unknown_id: int
    vocab_size: int  # width of the logits; may exceed the tokenizer's own


@dataclass(frozen=True)
class LocationSpec:
    """How to read `locations`: point = value * (valid width, valid height), px of the network input."""

    points_per_token: int = 2


@dataclass(frozen=True)
class PromptSpec:
    """Which points and labels a box becomes for the prompt extractor (section 5)."""

    # "box": corners with labels 2, 3, then `padding` points labelled -2.
    # "corners": four corners labelled 1, then one point labelled -1.
    box_as: Literal["box", "corners"] = "box"
    padding: int = 3


@dataclass(frozen=True)
class TaskSpec:
    """One text task: what the text encoder gets, how the decoder is run. `{text}` in `instruction` is the user's."""

    instruction: str
    instruction_tokens: int  # most context tokens, the end token included; a longer instruction is cut
    max_length: int  # L of section 11: length of the id array, begin token included
    beams: int = 1
    beams_per_node: int = 1
    alpha: float = 0.6  # exponent of the length penalty ((5 + i) / 6) ** alpha
    ban_repeat: bool = True  # greedy only: the previous token is not chosen again at once
    points_at: str = "begin,end,pad"  # positions whose points do not count (section 8); "^" inverts


@dataclass(frozen=True)
class ConversationSpec:
    """How a conversation about a picture becomes ids (GLaMM section 5). `deixis.conversation` is its reader.

    A prompt is the system text, a space, and for each turn "USER: " + question + " " + "ASSISTANT: " + answer + end.
    The ids are those of the tokens that text marks stand for.
    """

    system: str
    image_sentence: str  # before the first question; holds <image>
    image_tokens: int  # rows of `features` that stand for <image>
    begin_id: int
    end_id: int
    image_start_id: int
    image_end_id: int
    mask_id: int  # [SEG]
    phrase_start_id: int  # <p>
    phrase_end_id: int  # </p>
    region_id: int | None = None  # <bbox>; None: the model takes no boxes


@dataclass(frozen=True)
class MaskSpec:
    """Post-processing of mask logits (section 9.4; SAM for own prompts)."""

    threshold: float = 0.0  # logit
    token: int = 0  # mask token used for referring
    prompt_width: int = 256


@dataclass(frozen=True)
class DetectionSpec:
    """How `box_proposals` and `box_refine` are joined: selection, suppression, scores (section 10).

    All sorting is stable and descending. Suppression is greedy in that order: a box is dropped when its IoU with a kept
    one is at least the threshold, or when it has no coordinate above 0; the union counts as 1e-8 px at least. All in
    float32, px of the padded input.
    """

    candidates: int = 1000  # places with the highest scores, sigmoid(heatmap); at most all but one
    proposal_iou: float = 0.9  # suppression of the candidates, whose boxes are not clipped yet
    proposals: int = 256  # kept, then clipped to the input; missing ones are the last candidate with score 0
    # box_refine's deltas are divided by this: shift of the centre in widths and heights, growth as a logarithm
    delta_scale: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    max_log_scale: float = 4.135166556742356  # growth is capped here: ln(1000 / 16)
    # a detection scores more than this: sqrt(softmax(logits)[1] * proposal score). Boxes are clipped before they are
    # suppressed.
    score_threshold: float = 0.05
    detection_iou: float = 0.5
    max_detections: int = 100
    # the score of a caption joins that of its box: sqrt(score * exp(caption's score)); a default, callers may choose
    join_scores: bool = False


@dataclass(frozen=True)
class ParityRecord:
    """One comparison made at export: largest error relative to the array's largest magnitude."""

    error: float
    tolerance: float
    against: str = "torch fp32"


@dataclass(frozen=True)
class PrecisionTrial:
    """One precision of one graph as `deixis export --precision auto` measured it, all other graphs being in fp32."""

    precision: str
    drift: float | None  # as of parity records, against fp32; null: values that are not finite
    time: float | None  # of a run, relative to fp32: the median of interleaved runs; null: not measured
    points: dict[str, float] = field(default_factory=dict)  # change of each metric against fp32, in hundredths
    verdict: str = ""  # "chosen", or why it was not


@dataclass(frozen=True)
class PrecisionSearch:
    """The evidence for the precisions of the graphs, where a search chose them."""

    judged_by: str  # "drift", or so many pictures of which data
    machine: str  # where times were taken
    trials: dict[str, tuple[PrecisionTrial, ...]]  # by role
    fp32: dict[str, float] = field(default_factory=dict)  # metrics of the model in fp32 throughout
    chosen: dict[str, float] = field(default_factory=dict)  # metrics of this bundle


@dataclass(frozen=True)
class Provenance:
    exporter: str = ""
    created: str = ""  # ISO date
    source: str = ""  # checkpoint, with its sha256
    licence: str = ""
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    format: Format
    model: ModelInfo
    files: dict[str, FileInfo]  # every file of the bundle but the manifest, by posix path
    graphs: dict[str, Graph]  # by role
    dims: dict[str, DimRange]
    caches: Caches
    image: ImageSpec
    tokenizer: TokenizerSpec
    location: LocationSpec | None  # null when words have no places
    prompts: PromptSpec | None  # null without a prompt extractor
    # pixelllm: "caption", "region_caption", "trace", "refer", "dense_captions"
    # glamm: "caption", "region_caption", "refer", "grounded_caption", "ground_phrases", "ask"; there `instruction` is
    # the question, `instruction_tokens` the most tokens of one, `max_length` the most tokens of an answer
    tasks: dict[str, TaskSpec]
    mask: MaskSpec
    parity: dict[str, ParityRecord]
    # npz of golden vectors: "<role>/in/<name>" and "<role>/out/<name>"; "<role>/out[::k]/<name>" holds every k-th value
    # of an output in row-major order
    golden: str
    provenance: Provenance
    detection: DetectionSpec | None = None  # since 1.1; with the graphs box_proposals and box_refine
    conversation: ConversationSpec | None = None  # since 1.2; of the family glamm
    # since 1.2; what the global encoder of glamm sees, `image` being masks' input
    global_image: ImageSpec | None = None
    reductions: Reductions | None = None  # since 1.3; before, `decoder_step` gives logits only
    precision_search: PrecisionSearch | None = None  # since 1.3; where `--precision auto` chose

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        for name in (
            "detection",
            "conversation",
            "global_image",
            "reductions",
            "precision_search",
        ):  # an older runtime does not know the field
            if values[name] is None:
                del values[name]
        return json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
