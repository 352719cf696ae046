"""A LLaMA alone as a step graph: the decoder of glamm without pictures, for tests on published language models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from deixis.bundle import ParityRecord
from deixis.errors import ExportError
from deixis_export.bundle_parts import graph_tolerance, require
from deixis_export.export import trace_and_write
from deixis_export.graph_spec import run_torch
from deixis_export.graphs_glamm import empty_caches, language_step_spec
from deixis_export.session import GraphSession, relative_error
from deixis_export.weights import PrecisionName, WeightFile, round_to_fp16
from deixis_train.models.glamm.llama import Llama

_ROWS, _NEW, _POSITION, _CAPACITY = 2, 5, 4, 12  # of the example: new ids behind some that are filled


@torch.no_grad()
def export_language_model(llama: Llama, folder: Path, precision: PrecisionName = "fp32", seed: int = 0) -> ParityRecord:
    """Write `decoder_step.onnx` and its weights `decoder_step.data` into an existing folder.

    Inputs are `ids` [R, S], `position` [1] and `banned` [R] int64 and the caches `self_key.i`, `self_value.i`
    [R, Hkv, T, Dh], outputs `top_ids` and `top_log_probs` [R, K], `states` [R, S, D], the caches, and `logits`
    [R, vocab] of the last position. A vocabulary head that is the
    embedding table is stored once, and stays out of int8.

    Args:
        llama: in float32. It is changed: LoRA is folded, weights are rounded to the stored precision.

    Returns:
        The error against the model with the same weights.

    Raises:
        ExportError: the graph differs from the model beyond tolerance, or fp16 cannot hold a weight.
    """
    llama.eval().merge_lora()
    if precision != "fp32":
        try:
            round_to_fp16(llama, "llama")
        except ValueError as error:
            raise ExportError(str(error)) from None
    spec, generator = language_step_spec(llama.config), torch.Generator().manual_seed(seed)

    def words(length: int) -> torch.Tensor:
        return torch.randint(0, llama.config.vocab, (_ROWS, length), generator=generator)

    empty, banned = empty_caches(llama.config, _ROWS, _CAPACITY), torch.tensor([-1, 3])
    begin = {"ids": words(_POSITION), "position": torch.tensor([0]), "banned": banned}
    first = run_torch(spec, llama, {**begin, **empty})
    filled = {name: first[name.replace(".", "_out.")] for name in empty}
    example = {"ids": words(_NEW), "position": torch.tensor([_POSITION]), "banned": banned, **filled}
    expected = {name: value.numpy() for name, value in run_torch(spec, llama, example).items()}
    with WeightFile(folder / f"{spec.role}.data") as weights:
        trace_and_write(spec, llama, example, folder, weights, precision)
    with GraphSession(folder / f"{spec.role}.onnx") as session:
        actual = session.run({name: np.ascontiguousarray(value.numpy()) for name, value in example.items()})
    record = ParityRecord(relative_error(actual, expected), graph_tolerance(precision), "torch with the same weights")
    require(f"graph/{spec.role}", record)
    return record
