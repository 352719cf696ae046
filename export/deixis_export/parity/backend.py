"""What a parity run asks of the thing it checks, whether PyTorch modules or exported graphs.

To check another way of running the model, write a class with the members of `Backend` and a function that opens it, and
name it in `deixis_export.parity.__main__`. The exported graphs live in `backend_onnx.py`, which offers

    def open_backend(model: PixelLLM) -> contextlib.AbstractContextManager[Backend]

and is imported only for `--through onnx`: it exports the model it is given into a temporary bundle, loads that through
the runtime, and answers every method with what the graphs and the runtime's own decoding give. A value that no graph
emits is None and is printed as `torch-only`. None is never a way to skip something that a graph does emit.

All arrays are numpy; floats are float32, ids int64. B pictures, S side of the padded input in pixels, R prompts (rows),
`image_index` [R] the picture of each prompt, Q visual tokens, E width of the text model, C context length, K beams,
L text length, P points per token. Boxes are XYXY pixels of the padded input, points are x, y.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deixis_train.models.pixelllm import PixelLLM

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
LogitsFn = Callable[[Ids, int], Floats]


@dataclass(frozen=True)
class Decoding:
    """How to decode: `beams` = 1 is greedy with the ban on repeating the previous token (section 11)."""

    beams: int
    per_node: int
    alpha: float
    begin_id: int
    end_id: int


@dataclass(frozen=True)
class EncodedImages:
    """Encoded pictures.

    Attributes:
        features: fused maps [B, g, g, C1 + C2], or None.
        sam: maps of the SAM branch [B, h, h, C2], or None.
        handle: whatever the backend itself needs later.
    """

    features: Floats | None
    sam: Floats | None
    handle: Any


@dataclass(frozen=True)
class Caption:
    """Decoded captions.

    Attributes:
        tokens: [R, K, L], best beam last; positions never written hold EOS, unfilled slots are all 0 (section 11).
        scores: [R, K].
        points: of the best beam, read while it was decoded, [R, L, P, 2] as fractions of the real width and height.
            Only the positions of words are looked at. None without a location head.
    """

    tokens: Ids
    scores: Floats
    points: Floats | None


@dataclass(frozen=True)
class TextPass:
    """One teacher-forced pass with the reference's masking (section 7), all positions.

    Attributes:
        features: [R, L, E].
        points: [R, L, P, 2] fractions; None without a location head.
        spare: spare channels of the points [R, L, P, 2], or None.
        logits: [R, L, V], or None.
        encoded: output of the text encoder [R, Q + C, E], or None.
        valid: its valid mask [R, Q + C] bool, or None.
    """

    features: Floats
    points: Floats | None
    spare: Floats | None = None
    logits: Floats | None = None
    encoded: Floats | None = None
    valid: NDArray[np.bool_] | None = None


class Detector(Protocol):
    """The box decoder in its stages, for every picture of a batch: g fused grid, D channels of the pyramid, A places of
    all levels, P proposals, N detections, K beams. Nothing of it is clipped unless said.
    """

    def dense(self, features: Floats) -> tuple[list[Floats], Floats, Floats]:
        """Fused features [B, g, g, C] -> pyramid (maps [B, D, h, w] of P3 to P7), heatmap logits [B, A] and the box of
        every place [B, A, 4].
        """
        ...

    def peaks(self, boxes: Floats, heatmap: Floats) -> tuple[Floats, Floats]:
        """Boxes and scores of the best places, [B, k, 4] and [B, k]."""
        ...

    def propose(self, boxes: Floats, scores: Floats) -> tuple[Floats, Floats]:
        """Suppression of peaks, padded: boxes [B, P, 4] and scores [B, P]."""
        ...

    def clip(self, boxes: Floats) -> Floats:
        """Boxes [..., 4] inside the input."""
        ...

    def refine(self, pyramid: list[Floats], boxes: Floats) -> tuple[Floats, Floats]:
        """Logits [B, P, 2] and deltas [B, P, 4] of given boxes [B, P, 4]."""
        ...

    def finish(self, boxes: Floats, scores: Floats, logits: Floats, deltas: Floats) -> tuple[Floats, Floats]:
        """Detections, boxes [B, N, 4] and scores [B, N], from clipped proposals and what `refine` said of them."""
        ...

    def detect(self, features: Floats) -> tuple[Floats, Floats]:
        """The same from fused features [B, g, g, C], all stages chained."""
        ...

    def join(self, scores: Floats, log_probs: Floats) -> Floats:
        """Scores of boxes [B, N] joined with those of their captions [B, N]."""
        ...

    def rank(self, scores: Floats, beam_scores: Floats, count: int) -> tuple[Floats, Ids, Ids]:
        """The best pairs of box [B, N] and beam [B, N, K]: score, box and beam, each [B, count]."""
        ...


class Backend(Protocol):
    """A runnable PixelLLM.

    `model` is the PyTorch model when the backend runs exactly that, so that values inside it can be compared;
    otherwise None.
    """

    model: PixelLLM | None

    @property
    def detector(self) -> Detector | None:
        """None when the model has none."""
        ...

    def encode_images(self, image: Floats, valid_hw: Floats) -> EncodedImages:
        """Padded pictures [B, S, S, 3], RGB 0..255, and their real (height, width) [B, 2]."""
        ...

    def extract_prompts(self, images: EncodedImages, image_index: Ids, boxes: Floats, as_points: bool) -> Floats:
        """Visual prefixes [R, Q, E] for boxes [R, 4]. `as_points` gives a box as its four corners (use_box_rate 0)."""
        ...

    def caption(self, visual: Floats, context: Ids | None, length: int, decoding: Decoding) -> Caption:
        """Decode captions in arrays of `length` ids. context [R, C] is padded with 0; None for none."""
        ...

    def text_pass(self, visual: Floats, context: Ids | None, tokens: Ids) -> TextPass:
        """Run given tokens [R, L] through the decoder."""
        ...

    def steps(self, visual: Floats, context: Ids | None, tokens: Ids) -> Floats:
        """Logits [R, L, V] of the same tokens, one by one through the decoder with caches."""
        ...

    def masks(
        self, images: EncodedImages, image_index: Ids, boxes: Floats, visual: Floats, features: Floats
    ) -> tuple[Floats, Floats]:
        """Referring masks: logits [R, 4h, 4h] and predicted IoU [R]. Features [R, L, E] are those of `text_pass`."""
        ...

    def search(self, logits_fn: LogitsFn, begin: Ids, decoding: Decoding) -> tuple[Ids, Floats] | None:
        """The decoder alone on a synthetic language model, or None if it cannot run without graphs.

        Args:
            logits_fn: takes whole rows [B * K, L], beams of a row adjacent, and a position; gives logits [B * K, V].
            begin: start arrays [B, L].

        Returns:
            tokens [B, K, L] and scores [B, K], best last.
        """
        ...
