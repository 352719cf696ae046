"""The comparison of the BERT/GIT text head, which brings its own parameters and gets a model of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache

import torch

from deixis_export.parity.backend import Backend, Floats, TextPass
from deixis_export.parity.context import Context, as_floats, emitted
from deixis_export.parity.report import Absent, Array, GoldenFile, Report
from deixis_train.loaders.flax import load_flax
from deixis_train.loaders.golden import config_from_golden
from deixis_train.loaders.report import CheckpointError
from deixis_train.models.config import BertTextConfig, PixelLLMConfig
from deixis_train.models.pixelllm import PixelLLM

PARAMS = "params/"


def bert_text(context: Context, file: GoldenFile, report: Report) -> None:
    with ExitStack() as stack:

        @cache
        def opened() -> tuple[PixelLLM, Backend]:
            model = _model(context, file)
            return model, stack.enter_context(context.open_backend(model))

        @cache
        def inputs(with_context: bool) -> tuple[Floats, Array | None, Array]:
            """The visual prefix, the context and the text. No graph holds the projection alone: it runs in PyTorch."""
            with torch.inference_mode():
                visual = opened()[0].visual_projection(as_floats(file["visual"])).numpy()
            ids = file["context_tokens"].astype("int64") if with_context else None
            return visual, ids, file["text_tokens"].astype("int64")

        @cache
        def whole(with_context: bool) -> TextPass:
            return opened()[1].text_pass(*inputs(with_context))

        for suffix, with_context in {"": True, "_noctx": False}.items():
            report.check(file, f"feats{suffix}", lambda w=with_context: whole(w).features)
            report.check(file, f"logits{suffix}", lambda w=with_context: emitted(whole(w).logits))
            steps: Callable[[], Floats] = lambda w=with_context: opened()[1].steps(*inputs(w))  # noqa: E731
            report.check(file, f"logits{suffix}", steps, label=" (cached steps)")


def _model(context: Context, file: GoldenFile) -> PixelLLM:
    """A model with the head of the file. Whatever is no text head, and no visual projection, is random."""
    model = PixelLLM(_config(context)).eval()
    tree = {name.replace(PARAMS, "textual/", 1): file[name] for name in file if name.startswith(PARAMS)}
    report = load_flax(model, tree)
    if lacking := [name for name in report.missing if name.startswith("textual/")]:
        raise Absent(f"{file.name} has no {lacking[0].replace('textual/', PARAMS, 1)}")
    if wrong := [*report.unexpected, *report.misshapen]:
        raise CheckpointError(f"{file.name}: does not fit the sizes in config.json: {wrong[0]}")
    return model


def _config(context: Context) -> PixelLLMConfig:
    sizes = context.values.get("bert")
    if not sizes:
        raise Absent("config.json has no bert")
    head = BertTextConfig(
        vocab=sizes["vocab"],
        emb=sizes["hidden"],
        heads=sizes["heads"],
        layers=sizes["layers"],
        mlp=4 * sizes["hidden"],
        max_positions=sizes["max_cap"],
    )
    config = config_from_golden(context.values)
    return dataclasses.replace(config, bert=head, mask_decoder=None, mask_adapter=None, box_decoder=None)


CASES = {"bert_text.npz": bert_text}
