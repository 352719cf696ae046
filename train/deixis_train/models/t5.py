"""T5 1.1 encoder-decoder with LoRA, a visual prefix and an output of features: the text half of PixelLLM (section 7).

Two ways to run the decoder give the same numbers:

- `decode`: one teacher-forced pass over a whole token array, with the reference's masking of inactive positions;
- `step`: a few new tokens against caches of keys and values, with causality as the only self-attention mask. It is what
  a runtime needs for generation and what the export turns into a graph.

Parameter names follow T5X (`encoder.layers.0.attention.query.weight`, `decoder.logits_dense.weight`, ...). Matrices are
stored the PyTorch way, [out, in]. Letters in shapes: R rows of the decoder, N prompts (R = N * beams, grouped by
prompt), Q visual tokens, C context tokens, E = Q + C encoder positions, L or S decoder positions, T cache capacity,
D width, H heads, Dh head width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.models.config import T5Config
from deixis_train.models.layers import LoraLinear, RMSNorm, merge_lora, projection
from deixis_train.models.text_rows import KeyValue, additive, group_rows


def relative_buckets(distance: Tensor, bidirectional: bool, buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance = key position - query position (section 7). Integers in, int64 of the same shape out."""
    offset = torch.zeros_like(distance, dtype=torch.int64)
    if bidirectional:
        buckets //= 2
        offset = buckets * (distance > 0).long()
        n = distance.abs()
    else:
        n = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = n.float().clamp(min=1) / exact + torch.finfo(torch.float32).eps
    far = exact + (torch.log(ratio) / math.log(max_distance / exact) * (buckets - exact)).long()
    return offset + torch.where(n < exact, n.long(), far.clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """Bias of a self-attention score by distance; one table per stack, shared by its layers.

    Buckets no longer change beyond `max_distance`, so a table over the clipped distances says it all. It depends on
    weights alone: an export folds it, and a bias is one Gather.
    """

    distance_buckets: Tensor

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.max_distance = config.relpos_max_distance
        self.rel_embedding = nn.Parameter(torch.empty(config.heads, config.relpos_buckets))
        distance = torch.arange(-self.max_distance, self.max_distance + 1)
        buckets = relative_buckets(distance, bidirectional, config.relpos_buckets, self.max_distance)
        self.register_buffer("distance_buckets", buckets, persistent=False)

    def forward(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """[S] and [T] integer positions -> [H, S, T]."""
        table = self.rel_embedding[:, self.distance_buckets]
        distance = key_positions[None, :] - query_positions[:, None]
        return table[:, distance.clamp(-self.max_distance, self.max_distance) + self.max_distance]


class Attention(nn.Module):
    """Multi-head attention without 1/sqrt(d) and without biases; LoRA on query and value."""

    def __init__(self, config: T5Config, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.head_dim = config.heads, config.head_dim
        self.query = projection(config.emb, inner, rank, scale)
        self.key = nn.Linear(config.emb, inner, bias=False)
        self.value = projection(config.emb, inner, rank, scale)
        self.out = nn.Linear(inner, config.emb, bias=False)
        self.dropout = nn.Dropout(dropout)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def project_query(self, x: Tensor) -> Tensor:
        """[R, S, D] -> [R, H, S, Dh]."""
        return self._split(self.query(x))

    def project_key_value(self, x: Tensor) -> KeyValue:
        """[R, S, D] -> keys and values, each [R, H, S, Dh]."""
        return self._split(self.key(x)), self._split(self.value(x))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """`bias` is added to the scores and broadcasts to [R, H, S, T]. Returns [R, H, S, Dh]."""
        weights = F.softmax(query @ key.transpose(-1, -2) + bias, dim=-1)
        return self.dropout(weights) @ value

    def merge_heads(self, x: Tensor) -> Tensor:
        """[R, H, S, Dh] -> [R, S, D]."""
        return self.out(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """wo(GELU_tanh(wi_0 x) * wi_1 x)."""

    def __init__(self, config: T5Config, dropout: float) -> None:
        super().__init__()
        self.wi_0 = nn.Linear(config.emb, config.mlp, bias=False)
        self.wi_1 = nn.Linear(config.emb, config.mlp, bias=False)
        self.wo = nn.Linear(config.mlp, config.emb, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(self.dropout(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)))


class EncoderLayer(nn.Module):
    def __init__(self, config: T5Config, dropout: float) -> None:
        super().__init__()
        self.pre_attention_layer_norm = RMSNorm(config.emb)
        self.attention = Attention(config, config.enc_rank, config.enc_scale, dropout)
        self.pre_mlp_layer_norm = RMSNorm(config.emb)
        self.mlp = Mlp(config, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        normed = self.pre_attention_layer_norm(x)
        key, value = self.attention.project_key_value(normed)
        attended = self.attention.attend(self.attention.project_query(normed), key, value, bias)
        x = x + self.dropout(self.attention.merge_heads(attended))
        return x + self.dropout(self.mlp(self.pre_mlp_layer_norm(x)))


class Encoder(nn.Module):
    def __init__(self, config: T5Config, dropout: float) -> None:
        super().__init__()
        self.relpos_bias = RelativeBias(config, bidirectional=True)
        self.layers = nn.ModuleList(EncoderLayer(config, dropout) for _ in range(config.layers))
        self.encoder_norm = RMSNorm(config.emb)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """Embeddings [R, E, D] and valid [R, E] bool -> [R, E, D]."""
        positions = torch.arange(x.shape[1], device=x.device)
        pairs = valid[:, None, :, None] & valid[:, None, None, :]
        bias = additive(pairs, x.dtype) + self.relpos_bias(positions, positions)
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.encoder_norm(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: T5Config, dropout: float) -> None:
        super().__init__()
        self.pre_self_attention_layer_norm = RMSNorm(config.emb)
        self.self_attention = Attention(config, config.dec_rank, config.dec_scale, dropout)
        self.pre_cross_attention_layer_norm = RMSNorm(config.emb)
        self.encoder_decoder_attention = Attention(config, config.dec_rank, config.dec_scale, dropout)
        self.pre_mlp_layer_norm = RMSNorm(config.emb)
        self.mlp = Mlp(config, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        self_bias: Tensor,
        cross: KeyValue,
        cross_bias: Tensor,
        cache: KeyValue | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Rows x [R, S, D] against `cross` [N, H, E, Dh]; with a cache, new keys and values go to its `slots`.

        `slots` is the position of every new element, [R, H, S, Dh]. `cross_bias` [N, 1, 1 or (R / N) * S, E].
        Returns x and the keys and values attended to.
        """
        normed = self.pre_self_attention_layer_norm(x)
        key, value = self.self_attention.project_key_value(normed)
        if cache is not None and slots is not None:
            key, value = cache[0].scatter(2, slots, key), cache[1].scatter(2, slots, value)
        attended = self.self_attention.attend(self.self_attention.project_query(normed), key, value, self_bias)
        x = x + self.dropout(self.self_attention.merge_heads(attended))

        # Rows of a prompt are adjacent: here they are one longer row. `cross_bias` is the same for all layers, so that
        # a graph computes this shape once.
        grouped = self.pre_cross_attention_layer_norm(x).reshape(cross_bias.shape[0], -1, x.shape[2])
        query = self.encoder_decoder_attention.project_query(grouped)
        attended = self.encoder_decoder_attention.attend(query, *cross, cross_bias)
        x = x + self.dropout(self.encoder_decoder_attention.merge_heads(attended).reshape_as(x))
        return x + self.dropout(self.mlp(self.pre_mlp_layer_norm(x))), (key, value)


class Decoder(nn.Module):
    def __init__(self, config: T5Config, dropout: float) -> None:
        super().__init__()
        self.relpos_bias = RelativeBias(config, bidirectional=False)
        self.layers = nn.ModuleList(DecoderLayer(config, dropout) for _ in range(config.layers))
        self.decoder_norm = RMSNorm(config.emb)
        self.logits_dense = nn.Linear(config.emb, config.vocab, bias=False)
        self.dropout = nn.Dropout(dropout)


class T5(nn.Module):
    """The text model. `dropout` acts in training mode only.

    `BertText` has the same public members; who uses a text head need not know which it is.
    """

    encoder_shares_weights = False  # with the decoder, so that an export would store them once

    def __init__(self, config: T5Config, dropout: float = 0.1) -> None:
        super().__init__()
        self.config = config
        self.token_embedder = nn.Embedding(config.vocab, config.emb)
        self.encoder = Encoder(config, dropout)
        self.decoder = Decoder(config, dropout)
        self.init_weights()

    @property
    def vocabulary_head(self) -> nn.Linear:
        """Features [..., D] to logits [..., V]."""
        return self.decoder.logits_dense

    def encode(self, visual: Tensor, context_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encoder over the visual prefix followed by the embedded context.

        Args:
            visual: [R, Q, D] float, output of the visual projection.
            context_ids: [R, C] integer, 0 = padding; None for no context.

        Returns:
            encoded [R, E, D] and valid [R, E] bool, false on context padding.
        """
        valid = torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        x = visual
        if context_ids is not None:
            x = torch.cat([x, self.token_embedder(context_ids)], dim=1)
            valid = torch.cat([valid, context_ids > 0], dim=1)
        return self.encoder(x, valid), valid

    def cross_kv(self, encoded: Tensor) -> list[KeyValue]:
        """Cross-attention keys and values of every layer, each [N, H, E, Dh]; computed once per prompt."""
        layers = cast(Iterable[DecoderLayer], self.decoder.layers)
        return [layer.encoder_decoder_attention.project_key_value(encoded) for layer in layers]

    def decode(
        self,
        ids: Tensor,
        encoded: Tensor | None,
        valid: Tensor,
        *,
        cross: Sequence[KeyValue] | None = None,
        with_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Teacher-forced pass over whole rows, masked as the reference does (section 7).

        A position is active when the token after it is not 0; the last position never is. Inactive positions attend
        uniformly and their features mean nothing, but the mask adapter reads them, so they are imitated too.

        Args:
            ids: [R, L] integer.
            encoded: [N, E, D], or None when `cross` (what `cross_kv` gives) is passed instead. R is a multiple of N.
            valid: [N, E] bool.
            with_logits: False leaves out the vocabulary matrix; the logits are then None.

        Returns:
            logits [R, L, V] or None, and features [R, L, D].
        """
        if cross is None:
            if encoded is None:
                raise ValueError("decode needs either encoded or cross")
            cross = self.cross_kv(encoded)
        positions = torch.arange(ids.shape[1], device=ids.device)
        active = F.pad(ids[:, 1:], (0, 1)) > 0
        causal = positions[None, :] <= positions[:, None]
        dtype = self.token_embedder.weight.dtype
        self_mask = causal & active[:, None, :, None] & active[:, None, None, :]
        self_bias = additive(self_mask, dtype) + self.decoder.relpos_bias(positions, positions)
        queries = group_rows(active[:, None, :, None], valid.shape[0])
        cross_bias = additive(queries & valid[:, None, None, :], dtype)

        x = self.decoder.dropout(self.token_embedder(ids))
        for layer, layer_cross in zip(self.decoder.layers, cross, strict=True):
            x, _ = layer(x, self_bias, layer_cross, cross_bias)
        features = self.decoder.decoder_norm(x)
        logits = self.decoder.logits_dense(self.decoder.dropout(features)) if with_logits else None
        return logits, features

    def step(
        self,
        ids: Tensor,
        position: Tensor,
        cache: Sequence[KeyValue],
        cross: Sequence[KeyValue],
        valid: Tensor,
    ) -> tuple[Tensor, Tensor, list[KeyValue]]:
        """Consume S new tokens per row. A wide step (S > 1, position 0) is the prefill.

        The caches are not changed in place: new ones come back. Slots not yet written must hold finite numbers.

        Args:
            ids: [R, S] integer, the tokens at positions `position` to `position + S - 1`.
            position: integer tensor with one element, shared by all rows.
            cache: per layer, self-attention keys and values [R, H, T, Dh] (`empty_cache` to start with).
            cross: per layer, keys and values [N, H, E, Dh] from `cross_kv`; R = N * beams, beams of a prompt adjacent.
            valid: [N, E] bool.

        Returns:
            logits [R, V] of the last position, features [R, S, D] of every position, and the new caches.
        """
        positions = position.reshape(1) + torch.arange(ids.shape[1], device=ids.device)
        keys = torch.arange(cache[0][0].shape[2], device=ids.device)
        dtype = self.token_embedder.weight.dtype
        causal = keys[None, :] <= positions[:, None]
        self_bias = additive(causal, dtype) + self.decoder.relpos_bias(positions, keys)
        cross_bias = additive(valid[:, None, None, :], dtype)

        # One index for all layers. A scatter becomes one ONNX node that can write in place; index_copy becomes two.
        slots = positions[:, None].expand(ids.shape[0], self.config.heads, ids.shape[1], self.config.head_dim)

        x = self.token_embedder(ids)
        written: list[KeyValue] = []
        for layer, layer_cache, layer_cross in zip(self.decoder.layers, cache, cross, strict=True):
            x, layer_cache = layer(x, self_bias, layer_cross, cross_bias, layer_cache, slots)
            written.append(layer_cache)
        features = self.decoder.decoder_norm(x)
        return self.decoder.logits_dense(features[:, -1]), features, written

    def empty_cache(self, rows: int, capacity: int) -> list[KeyValue]:
        """Zeroed self-attention caches for `step`: per layer keys and values [rows, H, capacity, Dh]."""
        shape = (rows, self.config.heads, capacity, self.config.head_dim)
        return [
            (self.token_embedder.weight.new_zeros(shape), self.token_embedder.weight.new_zeros(shape))
            for _ in range(self.config.layers)
        ]

    def merge_lora(self) -> T5:
        """Fold every A B product into its matrix, in place; the function stays the same. Returns self."""
        merge_lora(self)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """T5's scheme for training from nothing: fan-in scaled, queries also by the head width, LoRA's B zero."""
        config = self.config
        nn.init.normal_(self.token_embedder.weight, std=1.0)
        nn.init.normal_(self.decoder.logits_dense.weight, std=config.emb**-0.5)
        for module in self.modules():
            if isinstance(module, Attention):
                # The missing 1/sqrt(d) of the scores sits in the scale of the queries.
                _init_projection(module.query, (config.emb * config.head_dim) ** -0.5)
                _init_projection(module.key, config.emb**-0.5)
                _init_projection(module.value, config.emb**-0.5)
                _init_projection(module.out, (config.heads * config.head_dim) ** -0.5)
            elif isinstance(module, Mlp):
                nn.init.normal_(module.wi_0.weight, std=config.emb**-0.5)
                nn.init.normal_(module.wi_1.weight, std=config.emb**-0.5)
                nn.init.normal_(module.wo.weight, std=config.mlp**-0.5)
            elif isinstance(module, RelativeBias):
                nn.init.normal_(module.rel_embedding, std=config.emb**-0.5)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)


def _init_projection(linear: nn.Module, std: float) -> None:
    assert isinstance(linear, nn.Linear | LoraLinear)
    nn.init.normal_(linear.weight, std=std)
    if isinstance(linear, LoraLinear):
        nn.init.normal_(linear.lora_a, std=std)
        nn.init.zeros_(linear.lora_b)
