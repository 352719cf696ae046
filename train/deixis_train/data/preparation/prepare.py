"""A sample to an example: augmented, fitted, tokenised, with the place of every token (section 14)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deixis_train.data.batches import Example, Floats, Ints
from deixis_train.data.formats.errors import DataError
from deixis_train.data.preparation.alignment import (
    EOS,
    PAD,
    Alignment,
    align_by_rank,
    align_by_text,
    points_of_tokens,
    valid_utterances,
)
from deixis_train.data.preparation.geometry import (
    Placement,
    decode_mask,
    has_area,
    place_centered,
    place_fitted,
    place_randomly,
)
from deixis_train.data.samples import Box, Row, Sample


class TextEncoder(Protocol):
    """What is needed of `tokenizers.Tokenizer`: encodings with `ids` and, in characters of the text, `offsets`."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True)
class Preparation:
    """How samples of a source become examples. The defaults leave pictures and rows as they are.

    image_size: side S of the square input, px.
    text_length: L. Texts become BOS w1..wn EOS and are cut to L: a text that is too long has no EOS (section 7).
    context_length: C. Contexts become w1..wn EOS and are cut to C.
    scale: range of the random scale of training; flip: probability of a horizontal flip in training.
    center_crop: evaluation sees the centre at full height or width, not the whole picture (COCO captions).
    max_rows: rows per picture in training, drawn without replacement; None or evaluation: all.
    instructions: context of rows that have none of their own; drawn uniformly, evaluation takes the first.
    referring: context of rows that have none of their own: this followed by the row's text, e.g. "where is ". Goes
        before `instructions`.
    prefix_split: training draws a word of the text, possibly the first: what stands before it is the context, the
        rest the text (stage 0). Evaluation asks for the whole text with no context, or with an instruction.
    prompt_jitter: in training each side of a prompt's box moves by up to this share of the box's width or height.
    masks: decode the rows' masks. Texts then always have L positions, because the mask adapter reads features at
        padding too (section 9); otherwise they are padded to the longest of the picture.
    begin_id, end_id: BOS and EOS of the text head; PAD is 0 for all of them.
    alignment: of narrations, see `alignment.py`. "text" falls back on "rank" for a narration whose utterances do not
        spell the caption.
    """

    image_size: int
    text_length: int
    context_length: int
    scale: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    center_crop: bool = False
    max_rows: int | None = None
    instructions: tuple[str, ...] = ()
    referring: str | None = None
    prefix_split: bool = False
    prompt_jitter: float = 0.0
    masks: bool = False
    alignment: Alignment = "rank"
    begin_id: int = PAD
    end_id: int = EOS

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.text_length < 2 or self.context_length < 0:
            raise ValueError(
                f"image_size {self.image_size}, text_length {self.text_length}, context_length {self.context_length}: "
                "at least 1, 2 and 0 are needed"
            )
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {self.scale} is no range of positive factors")
        if not 0 <= self.flip <= 1 or not 0 <= self.prompt_jitter < 0.5:
            raise ValueError(f"flip {self.flip} must lie in 0..1, prompt_jitter {self.prompt_jitter} below 0.5")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows {self.max_rows} leaves no rows")

    @property
    def moves_pictures(self) -> bool:
        """Whether training sees pictures otherwise than evaluation, so that cached features cannot be used."""
        return self.scale != (1.0, 1.0) or self.flip > 0 or self.center_crop

    def prepare(
        self,
        sample: Sample,
        rng: np.random.Generator,
        *,
        image: NDArray[np.uint8] | None,
        tokenizer: TextEncoder,
        training: bool,
    ) -> Example:
        """Make an example of a sample. Everything random comes from `rng`: the same state gives the same example.

        Args:
            image: the stored picture, RGB uint8 [height, width, 3], or None where features are cached.
            tokenizer: its own post-processing is not used.
            training: augment and draw; otherwise the whole picture with all rows.

        Returns:
            The example; its `sample` has only the rows that the example has, in their order (their texts and contexts
            are the original ones). Rows of which the cut leaves no box are dropped in training; when that would
            leave none, the whole picture is taken instead, at scale 1. `instances` are in the order of the sample's;
            one that the cut does not show is all zeros. Positions that are words bear a place: their utterance's, or
            for rows with a box but without utterances that box.

        Raises DataError when the picture's size is not the sample's, ValueError when an augmented example is asked for
        without a picture.
        """
        if image is None and training and self.moves_pictures:
            raise ValueError("cached features need scale (1, 1), no flip and no center_crop")
        if image is not None and image.shape != (sample.height, sample.width, 3):
            raise DataError(
                f"{sample.where}: {sample.image} has the shape {list(image.shape)}, not "
                f"[{sample.height}, {sample.width}, 3] as the data set says"
            )
        size, original = self.image_size, (sample.height, sample.width)
        if training:
            placement = place_randomly(original, size, self.scale, self.flip, rng)
        else:
            placement = place_centered(original, size) if self.center_crop else place_fitted(original, size)
        rows = sample.rows
        if training:
            rows = tuple(row for row in sample.rows if _is_seen(row, placement))
            if not rows:
                rows, placement = sample.rows, place_fitted(original, size)
            if self.max_rows is not None and len(rows) > self.max_rows:
                rows = tuple(rows[i] for i in sorted(rng.permutation(len(rows))[: self.max_rows]))
        drawn = [self._draw(row, rng, training) for row in rows]
        text, points = self._texts([row for row, _ in drawn], sample, placement, tokenizer)
        whole = np.array([row.prompt is None for row in rows], bool)
        return Example(
            sample=replace(sample, rows=rows),
            image=None if image is None else placement.place_image(image, size),
            valid_hw=placement.valid,
            scale=placement.scale,
            text=text,
            context=self._contexts([context for _, context in drawn], tokenizer),
            prompts=self._prompts(rows, placement, rng, training),
            whole=whole,
            boxes=_boxes([row.box for row in rows], placement),
            points=points,
            masks=self._masks(rows, placement),
            instances=_boxes([instance.box for instance in sample.instances], placement),
        )

    def _draw(self, row: Row, rng: np.random.Generator, training: bool) -> tuple[Row, str]:
        """The row as it is to be written, and its context. One number is drawn, whether it is needed or not."""
        chance = rng.random() if training else 0.0
        if row.context:
            return row, row.context
        if self.referring is not None:
            return row, self.referring + row.text
        if self.prefix_split and training:
            words = row.text.split()
            at = int(chance * len(words))
            return replace(row, text=" ".join(words[at:])), " ".join(words[:at])
        if self.instructions:
            return row, self.instructions[int(chance * len(self.instructions))]
        return row, ""

    def _texts(
        self, rows: list[Row], sample: Sample, placement: Placement, tokenizer: TextEncoder
    ) -> tuple[Ints, Floats]:
        """Ids [K, L] and the corners that they point at [K, L, 4], px of the input."""
        encodings = [tokenizer.encode(row.text.strip(), add_special_tokens=False) for row in rows]
        ids = _padded(
            [[self.begin_id, *encoding.ids, self.end_id] for encoding in encodings], self.text_length, fixed=self.masks
        )
        points, special = np.zeros((*ids.shape, 4), np.float32), (PAD, self.begin_id, self.end_id)
        for k, (row, encoding) in enumerate(zip(rows, encodings, strict=True)):
            words = ~np.isin(ids[k], special)
            if row.utterances:
                owners = self._owners(row, [end for _, end in encoding.offsets], int(words.sum()))
                stored = points_of_tokens(ids[k], owners, row.utterances, sample.width, sample.height, special)
                placed = (stored != 0).any(-1)
                points[k, placed] = placement.place_boxes(stored[placed])
            elif row.box is not None:
                points[k, words] = placement.place_boxes(row.box)
        return ids, points

    def _owners(self, row: Row, ends: list[int], words: int) -> Ints:
        if self.alignment == "text":
            owners = align_by_text(row.text.strip(), ends, row.utterances)
            if owners is not None:
                return owners[:words]
        return align_by_rank(words, valid_utterances(row.utterances))

    def _contexts(self, texts: list[str], tokenizer: TextEncoder) -> Ints:
        # T5's own tokenizer ignores white space at the ends, others make a token of it
        sequences = [
            [*tokenizer.encode(t.strip(), add_special_tokens=False).ids, self.end_id] if t else [] for t in texts
        ]
        return _padded(sequences, self.context_length)

    def _prompts(self, rows: tuple[Row, ...], placement: Placement, rng: np.random.Generator, training: bool) -> Floats:
        height, width = placement.valid
        prompts = np.tile(np.array([0, 0, width, height], np.float32), (len(rows), 1))
        for k, row in enumerate(rows):
            if row.prompt is None:
                continue
            box = placement.place_boxes(row.prompt)
            if training and self.prompt_jitter:
                side = np.tile(box[2:] - box[:2], 2)
                box = box + (rng.uniform(-self.prompt_jitter, self.prompt_jitter, 4) * side).astype(np.float32)
                box = np.clip(box, 0, np.array([width, height, width, height], np.float32))
            prompts[k] = box
        return prompts

    def _masks(self, rows: tuple[Row, ...], placement: Placement) -> NDArray[np.uint8] | None:
        if not self.masks or all(row.mask is None for row in rows):
            return None
        masks = np.zeros((len(rows), self.image_size, self.image_size), np.uint8)
        for k, row in enumerate(rows):
            if row.mask is not None:
                masks[k] = placement.place_mask(decode_mask(row.mask), self.image_size)
        return masks


def _padded(sequences: list[list[int]], length: int, *, fixed: bool = False) -> Ints:
    """Ids [K, at most `length`], cut and padded with 0; `fixed`: exactly that many."""
    width = length if fixed else min(length, max(map(len, sequences), default=0))
    ids = np.zeros((len(sequences), width), np.int64)
    for k, sequence in enumerate(sequences):
        kept = sequence[:width]
        ids[k, : len(kept)] = kept
    return ids


def _is_seen(row: Row, placement: Placement) -> bool:
    return all(has_area(placement.place_boxes(box)) for box in (row.box, row.prompt) if box is not None)


def _boxes(boxes: list[Box] | list[Box | None], placement: Placement) -> Floats:
    """[N, 4] px of the input; zeros for None, and for what the cut does not show."""
    placed = np.zeros((len(boxes), 4), np.float32)
    for n, box in enumerate(boxes):
        if box is not None:
            moved = placement.place_boxes(box)
            placed[n] = moved if has_area(moved) else 0
    return placed
