"""LLaMA's SentencePiece file as `tokenizer.json`, so that the runtime needs the `tokenizers` library only.

The ids are those of the slow tokenizer that GLaMM was trained with (GLaMM specification section 5.3): text is cut at
added tokens, white space beside those given as plain strings goes, and every piece that is left gets a leading space.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

model_format: Any = sentencepiece_model_pb2  # its classes are made at run time
SPACE = "▁"  # how pieces spell a space


def tokenizer_json_from_sentencepiece(model_file: str | os.PathLike[str], added_tokens: Mapping[str, int]) -> str:
    """Text of a `tokenizer.json` that encodes as the SentencePiece BPE model with tokens added behind it.

    Begin and end are never added by it. The model's control tokens (`<s>`, `</s>`) and the unknown token are special:
    decoding may skip them. Added tokens are not, and are decoded with a space before them.

    Args:
        model_file: `tokenizer.model`.
        added_tokens: text to id, of tokens given as plain strings; ids continue those of the model.

    Raises:
        ValueError: no SentencePiece model, one of another kind than LLaMA's, or ids with gaps. One line.
    """
    model = _read(Path(model_file))
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    added = sorted(added_tokens.items(), key=lambda item: item[1])
    expected = list(range(len(vocabulary), len(vocabulary) + len(added)))
    if [number for _, number in added] != expected:
        raise ValueError(
            f"{model_file}: has {len(vocabulary)} pieces, so {len(added)} added tokens must have the ids from there on "
            f"without gaps; found {', '.join(f'{text} {number}' for text, number in added)}"
        )
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(model, vocabulary),
            unk_token=model.pieces[model.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])  # type: ignore[assignment]
    apart = [decoders.Replace(text, f" {text}") for text, _ in added]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [*apart, decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    kinds = model_format.ModelProto.SentencePiece
    control = [piece.piece for piece in model.pieces if piece.type in (kinds.CONTROL, kinds.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text, lstrip=True, rstrip=True, normalized=False) for text, _ in added])
    return tokenizer.to_str()


def _read(path: Path) -> Any:
    model = model_format.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except DecodeError:
        raise ValueError(f"{path}: not a SentencePiece model") from None
    if not model.pieces:
        raise ValueError(f"{path}: not a SentencePiece model: it has no pieces")
    kinds = model_format.ModelProto.SentencePiece
    known = {kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE}
    normaliser = model.normalizer_spec
    wanted = {
        "a BPE model": model.trainer_spec.model_type == model_format.TrainerSpec.BPE,
        "byte fallback": model.trainer_spec.byte_fallback,
        "text taken as it is (normaliser identity)": not normaliser.precompiled_charsmap,
        "a leading space added": normaliser.add_dummy_prefix,
        "repeated spaces kept": not normaliser.remove_extra_whitespaces,
        "spaces spelled as pieces": normaliser.escape_whitespaces,
        "no user-defined pieces": all(piece.type in known for piece in model.pieces),
    }
    if lacking := [name for name, holds in wanted.items() if not holds]:
        raise ValueError(f"{path}: not a model of LLaMA's kind, which needs {', '.join(lacking)}")
    return model


def _merges(model: Any, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    """Pairs in the order in which SentencePiece joins them: any two pieces whose union is one, best score first."""
    normal = [piece for piece in model.pieces if piece.type == model_format.ModelProto.SentencePiece.NORMAL]
    names = {piece.piece for piece in normal}
    merges = []
    for piece in sorted(normal, key=lambda own: own.score, reverse=True):
        text = piece.piece
        pairs = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        merges += sorted(
            (pair for pair in pairs if names.issuperset(pair)),
            key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]),
        )
    return merges
