"""The PyTorch model behind the `Backend` protocol. Captions come from the uncached reference decoders."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deixis_export.parity.backend import Caption, Decoding, EncodedImages, Floats, Ids, LogitsFn, TextPass
from deixis_export.parity.detectors import TorchDetector
from deixis_train.models.decoding import beam_search, begin_tokens, greedy
from deixis_train.models.pixelllm import PixelLLM
from deixis_train.models.prompt_encoder import pixelllm_prompt


class TorchBackend:
    def __init__(self, model: PixelLLM) -> None:
        self.model: PixelLLM | None = model.eval()
        self._model = model

    @property
    def detector(self) -> TorchDetector | None:
        return None if self._model.box_decoder is None else TorchDetector(self._model.box_decoder)

    @torch.inference_mode()
    def encode_images(self, image: Floats, valid_hw: Floats) -> EncodedImages:
        scene = self._model.encode_image(_floats(image), _floats(valid_hw))
        return EncodedImages(self._model.features(scene).numpy(), scene.sam.numpy(), scene)

    @torch.inference_mode()
    def extract_prompts(self, images: EncodedImages, image_index: Ids, boxes: Floats, as_points: bool) -> Floats:
        points, labels = pixelllm_prompt(_floats(boxes), 0.0 if as_points else 1.0)
        features = self._model.features(images.handle)
        return self._model.extract_prompt(features, _ids(image_index), points, labels).numpy()

    @torch.inference_mode()
    def caption(self, visual: Floats, context: Ids | None, length: int, decoding: Decoding) -> Caption:
        text = self._model.text
        encoded, valid = text.encode(_floats(visual), None if context is None else _ids(context))
        cross = text.cross_kv(encoded)

        def logits_fn(tokens: Tensor, position: int) -> Tensor:
            _, features = text.decode(tokens, None, valid, cross=cross, with_logits=False)
            return text.vocabulary_head(features[:, position])

        begin = begin_tokens(len(visual), length, decoding.begin_id, decoding.end_id)
        if decoding.beams == 1:
            tokens, scores = greedy(logits_fn, begin, decoding.end_id)
            tokens, scores = tokens[:, None], scores[:, None]
        else:
            tokens, scores = beam_search(
                logits_fn, begin, decoding.beams, decoding.per_node, decoding.alpha, decoding.end_id
            )
        points = None
        if self._model.point_predictor is not None:
            # The cached step, so that the way a runtime reads points is compared as well.
            cache = text.empty_cache(len(visual), length)
            _, features, _ = text.step(tokens[:, -1], torch.tensor(0), cache, cross, valid)
            points = self._model.locate(features).numpy()
        return Caption(tokens.numpy(), scores.numpy(), points)

    @torch.inference_mode()
    def text_pass(self, visual: Floats, context: Ids | None, tokens: Ids) -> TextPass:
        encoded, valid = self._model.text.encode(_floats(visual), None if context is None else _ids(context))
        logits, features = self._model.text.decode(_ids(tokens), encoded, valid)
        assert logits is not None
        predictor = self._model.point_predictor
        return TextPass(
            features=features.numpy(),
            points=None if predictor is None else predictor(features).numpy(),
            spare=None if predictor is None else predictor.spare(features).numpy(),
            logits=logits.numpy(),
            encoded=encoded.numpy(),
            valid=valid.numpy(),
        )

    @torch.inference_mode()
    def steps(self, visual: Floats, context: Ids | None, tokens: Ids) -> Floats:
        text, ids = self._model.text, _ids(tokens)
        encoded, valid = text.encode(_floats(visual), None if context is None else _ids(context))
        cross, cache = text.cross_kv(encoded), text.empty_cache(*ids.shape)
        logits = []
        for position in range(ids.shape[1]):
            at = torch.tensor([position])
            found, _, cache = text.step(ids[:, position : position + 1], at, cache, cross, valid)
            logits.append(found)
        return torch.stack(logits, dim=1).numpy()

    @torch.inference_mode()
    def masks(
        self, images: EncodedImages, image_index: Ids, boxes: Floats, visual: Floats, features: Floats
    ) -> tuple[Floats, Floats]:
        logits, iou = self._model.mask(
            images.handle.sam, _ids(image_index), _floats(boxes), _floats(visual), _floats(features)
        )
        return logits.numpy(), iou.numpy()

    def search(self, logits_fn: LogitsFn, begin: Ids, decoding: Decoding) -> tuple[Ids, Floats] | None:
        def torch_logits_fn(tokens: Tensor, position: int) -> Tensor:
            return torch.from_numpy(logits_fn(tokens.numpy(), position))

        if decoding.beams == 1:
            tokens, scores = greedy(torch_logits_fn, _ids(begin), decoding.end_id)
            return tokens[:, None].numpy(), scores[:, None].numpy()
        tokens, scores = beam_search(
            torch_logits_fn, _ids(begin), decoding.beams, decoding.per_node, decoding.alpha, decoding.end_id
        )
        return tokens.numpy(), scores.numpy()


def _floats(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.float32)


def _ids(array: np.ndarray) -> Tensor:
    return torch.tensor(np.asarray(array), dtype=torch.int64)
