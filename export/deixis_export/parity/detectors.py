"""The two detectors behind `backend.Detector`: PyTorch's, and the graphs with the runtime's selection."""

from __future__ import annotations

import numpy as np
import torch

from deixis import detection
from deixis.bundle import DetectionSpec
from deixis_export.chain import GraphChain
from deixis_export.parity.backend import Floats, Ids
from deixis_train.models.box_decoder import BoxDecoder, Proposals
from deixis_train.models.box_decoder.dense_captions import rank_beams, score_with_caption
from deixis_train.models.box_decoder.proposals import clip_boxes, peaks, suppress


class TorchDetector:
    def __init__(self, decoder: BoxDecoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def dense(self, features: Floats) -> tuple[list[Floats], Floats, Floats]:
        maps = self._decoder.dense(_tensor(features))
        return [level.numpy() for level in maps.pyramid], maps.heatmap.numpy(), self._decoder.boxes(maps).numpy()

    def peaks(self, boxes: Floats, heatmap: Floats) -> tuple[Floats, Floats]:
        found, scores = peaks(_tensor(boxes), _tensor(heatmap), self._decoder.config.pre_nms_test)
        return found.numpy(), scores.numpy()

    def propose(self, boxes: Floats, scores: Floats) -> tuple[Floats, Floats]:
        config = self._decoder.config
        found = suppress(_tensor(boxes), _tensor(scores), config.proposal_iou, config.post_nms_test)
        return found.boxes.numpy(), found.scores.numpy()

    def clip(self, boxes: Floats) -> Floats:
        return clip_boxes(_tensor(boxes), self._decoder.image_size).numpy()

    @torch.inference_mode()
    def refine(self, pyramid: list[Floats], boxes: Floats) -> tuple[Floats, Floats]:
        logits, deltas = self._decoder.roi([_tensor(level) for level in pyramid], _tensor(boxes))
        return logits.numpy(), deltas.numpy()

    def finish(self, boxes: Floats, scores: Floats, logits: Floats, deltas: Floats) -> tuple[Floats, Floats]:
        proposals = Proposals(_tensor(boxes), _tensor(scores))
        found = self._decoder.finish(proposals, _tensor(logits), _tensor(deltas))
        return found.boxes.numpy(), found.scores.numpy()

    @torch.inference_mode()
    def detect(self, features: Floats) -> tuple[Floats, Floats]:
        found = self._decoder(_tensor(features))
        return found.boxes.numpy(), found.scores.numpy()

    def join(self, scores: Floats, log_probs: Floats) -> Floats:
        return score_with_caption(_tensor(scores), _tensor(log_probs)).numpy()

    def rank(self, scores: Floats, beam_scores: Floats, count: int) -> tuple[Floats, Ids, Ids]:
        ranked = rank_beams(_tensor(scores), _tensor(beam_scores), count)
        return ranked.scores.numpy(), ranked.box.numpy(), ranked.beam.numpy()


class GraphDetector:
    def __init__(self, chain: GraphChain) -> None:
        self._chain = chain

    @property
    def _spec(self) -> DetectionSpec:
        return self._chain.pipeline.detection

    @property
    def _size(self) -> int:
        return self._chain.pipeline.manifest.image.size

    def dense(self, features: Floats) -> tuple[list[Floats], Floats, Floats]:
        maps = self._chain.run("box_proposals", {"features": _array(features)})
        return [maps[name] for name in self._levels], maps["heatmap"], maps["boxes"]

    def peaks(self, boxes: Floats, heatmap: Floats) -> tuple[Floats, Floats]:
        found = [detection.top_places(*x, self._spec.candidates) for x in zip(boxes, heatmap, strict=True)]
        return np.stack([x for x, _ in found]), np.stack([s for _, s in found])

    def propose(self, boxes: Floats, scores: Floats) -> tuple[Floats, Floats]:
        spec = self._spec
        found = [detection.suppress(*x, spec.proposal_iou, spec.proposals) for x in zip(boxes, scores, strict=True)]
        return np.stack([x for x, _ in found]), np.stack([s for _, s in found])

    def clip(self, boxes: Floats) -> Floats:
        return detection.clip_boxes(boxes, self._size)

    def refine(self, pyramid: list[Floats], boxes: Floats) -> tuple[Floats, Floats]:
        levels = {name: _array(level) for name, level in zip(self._levels, pyramid, strict=True)}
        judged = self._chain.run("box_refine", {**levels, "boxes": _array(boxes)})
        return judged["logits"], judged["deltas"]

    def finish(self, boxes: Floats, scores: Floats, logits: Floats, deltas: Floats) -> tuple[Floats, Floats]:
        pictures = zip(boxes, scores, logits, deltas, strict=True)
        return _stacked([detection.finish(*picture, self._spec, self._size) for picture in pictures])

    def detect(self, features: Floats) -> tuple[Floats, Floats]:
        return _stacked(self._chain.pipeline.detect_features(_array(features), lambda: None))

    def join(self, scores: Floats, log_probs: Floats) -> Floats:
        return detection.join_scores(scores, log_probs)

    def rank(self, scores: Floats, beam_scores: Floats, count: int) -> tuple[Floats, Ids, Ids]:
        ranked = [detection.rank_beams(*picture, count) for picture in zip(scores, beam_scores, strict=True)]
        joint, box, beam = (np.stack(part) for part in zip(*ranked, strict=True))
        return joint, box, beam

    @property
    def _levels(self) -> list[str]:
        """Names of the pyramid's maps, in the order of the levels."""
        inputs = self._chain.pipeline.manifest.graphs["box_refine"].inputs
        return sorted(name for name in inputs if name != "boxes")


def _stacked(found: list[detection.Detections]) -> tuple[Floats, Floats]:
    return np.stack([x.boxes for x in found]), np.stack([x.scores for x in found])


def _tensor(array: Floats) -> torch.Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float32)


def _array(array: Floats) -> Floats:
    return np.ascontiguousarray(array, np.float32)
