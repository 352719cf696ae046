"""The BERT/GIT text head: one stack of layers over the visual prefix, the context and the text (section 7.1).

It has the public members of `T5`, so the rest of a model, an export and a runtime treat both alike. There is no
encoder: the prefix (visual tokens, then context) attends to itself only, so its keys and values are the same whatever
the text. They are computed once per prompt, layer by layer, and take the place of T5's cross-attention keys and values.
A position of the text attends, in one softmax, to them and to the text up to itself. No position is inactive here: what
the teacher-forced pass gives, steps give too.

Letters in shapes: R rows of the text, N prompts (R = N * beams, grouped by prompt), Q visual tokens, C context tokens,
E = Q + C positions of the prefix, L or S positions of the text, T cache capacity, D width, H heads, Dh head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deixis_train.models.config import BertTextConfig
from deixis_train.models.text_rows import KeyValue, additive, group_rows, ungroup_rows

_INIT_STD = 0.02


class Embedding(nn.Module):
    """Words and learned positions, normalised."""

    def __init__(self, config: BertTextConfig, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab, config.emb)
        self.positions = nn.Embedding(config.max_positions, config.emb)
        self.norm = nn.LayerNorm(config.emb, eps=1e-8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """ids [R, S] at integer positions [S] -> [R, S, D]."""
        return self.dropout(self.norm(self.words(ids) + self.positions(positions)))


class BertLayer(nn.Module):
    """Attention and MLP, each with its residual normalised afterwards."""

    def __init__(self, config: BertTextConfig, dropout: float) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.query = nn.Linear(config.emb, config.emb)
        self.key = nn.Linear(config.emb, config.emb)
        self.value = nn.Linear(config.emb, config.emb)
        self.out = nn.Linear(config.emb, config.emb)
        self.attention_norm = nn.LayerNorm(config.emb, eps=1e-5)
        self.wi = nn.Linear(config.emb, config.mlp)
        self.wo = nn.Linear(config.mlp, config.emb)
        self.output_norm = nn.LayerNorm(config.emb, eps=1e-12)
        self.attention_dropout = nn.Dropout(dropout)
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x: Tensor) -> Tensor:
        """[R, S, D] -> [R, H, S, Dh]."""
        return x.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)

    def project_query(self, x: Tensor) -> Tensor:
        """[R, S, D] -> [R, H, S, Dh], scaled."""
        return self.split_heads(self.query(x)) * self.head_dim**-0.5

    def project_key_value(self, x: Tensor) -> KeyValue:
        """[R, S, D] -> keys and values, each [R, H, S, Dh]."""
        return self.split_heads(self.key(x)), self.split_heads(self.value(x))

    def prefix(self, x: Tensor, keys: KeyValue, bias: Tensor) -> Tensor:
        """The prefix [N, E, D] attends to its own `keys` and values; `bias` broadcasts to [N, H, E, E]."""
        scores = self.project_query(x) @ keys[0].transpose(-1, -2) + bias
        return self._finish(x, self.attention_dropout(F.softmax(scores, dim=-1)) @ keys[1])

    def forward(
        self,
        x: Tensor,
        self_bias: Tensor,
        cross: KeyValue,
        cross_bias: Tensor,
        cache: KeyValue | None = None,
        slots: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Text x [R, S, D] attends to the prefix, `cross` [N, H, E, Dh], and to itself.

        With a cache, new keys and values go to its `slots`, the position of every new element [R, H, S, Dh].
        `self_bias` broadcasts to [R, H, S, T], `cross_bias` to [N, H, (R / N) * S, E]. Returns x and the text's keys
        and values.
        """
        key, value = self.project_key_value(x)
        if cache is not None and slots is not None:
            key, value = cache[0].scatter(2, slots, key), cache[1].scatter(2, slots, value)
        query = self.project_query(x)
        prompts, prefix = cross[0].shape[0], cross[0].shape[2]
        to_prefix = group_rows(query, prompts) @ cross[0].transpose(-1, -2) + cross_bias
        to_text = query @ key.transpose(-1, -2) + self_bias
        weights = F.softmax(torch.cat([ungroup_rows(to_prefix, query), to_text], dim=-1), dim=-1)
        weights = self.attention_dropout(weights)
        from_prefix = group_rows(weights[..., :prefix], prompts) @ cross[1]
        attended = ungroup_rows(from_prefix, query) + weights[..., prefix:] @ value
        return self._finish(x, attended), (key, value)

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: [R, S, D] and [R, H, S, Dh] -> [R, S, D]."""
        x = self.attention_norm(x + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))
        return self.output_norm(x + self.dropout(self.wo(F.gelu(self.wi(x)))))


class BertText(nn.Module):
    """The text head. `dropout` acts in training mode only."""

    encoder_shares_weights = True  # the prefix runs through the layers of the text

    def __init__(self, config: BertTextConfig, dropout: float = 0.1) -> None:
        super().__init__()
        if config.emb % config.heads:
            raise ValueError(f"a width of {config.emb} cannot be divided among {config.heads} heads")
        self.config = config
        self.embedding = Embedding(config, dropout)
        self.layers = nn.ModuleList(BertLayer(config, dropout) for _ in range(config.layers))
        self.output = nn.Linear(config.emb, config.vocab)
        self.init_weights()

    @property
    def vocabulary_head(self) -> nn.Linear:
        """Features [..., D] to logits [..., V]."""
        return self.output

    def encode(self, visual: Tensor, context_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The prefix through all layers.

        Positions of the context start at 0 again, as the text's do. The visual tokens bear none.

        Args:
            visual: [N, Q, D] float, output of the visual projection.
            context_ids: [N, C] integer, 0 = padding, which nobody attends to; None for no context.

        Returns:
            keys and values of every layer side by side, [N, E, layers, 2, D], for `cross_kv`; and valid [N, E] bool,
            false on context padding.
        """
        x, valid = visual, torch.ones(visual.shape[:2], dtype=torch.bool, device=visual.device)
        if context_ids is not None:
            positions = torch.arange(context_ids.shape[1], device=visual.device)
            x = torch.cat([x, self.embedding(context_ids, positions)], dim=1)
            valid = torch.cat([valid, context_ids > 0], dim=1)
        bias = additive(valid[:, None, None, :], x.dtype)
        layers = list(self._layers())
        kept: list[Tensor] = []
        for layer in layers:
            key, value = layer.project_key_value(x)
            kept += [key, value]
            if layer is not layers[-1]:  # what the last layer makes of the prefix nobody reads
                x = layer.prefix(x, (key, value), bias)
        flat = torch.stack(kept, dim=-2).transpose(1, 2)  # [N, E, H, layers * 2, Dh]
        return flat.transpose(2, 3).flatten(3).unflatten(2, (len(layers), 2)), valid

    def cross_kv(self, encoded: Tensor) -> list[KeyValue]:
        """Keys and values of the prefix by layer, each [N, H, E, Dh], out of what `encode` returns."""
        flat = encoded.unflatten(-1, (self.config.heads, self.config.head_dim)).permute(2, 3, 0, 4, 1, 5)
        return [(flat[i][0], flat[i][1]) for i in range(self.config.layers)]

    def decode(
        self,
        ids: Tensor,
        encoded: Tensor | None,
        valid: Tensor,
        *,
        cross: Sequence[KeyValue] | None = None,
        with_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor]:
        """Teacher-forced pass over whole rows; padding in the text is not masked (section 7.1).

        Args:
            ids: [R, L] integer.
            encoded: what `encode` returns, or None when `cross` (what `cross_kv` gives) is passed instead. R is a
                multiple of N.
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
        x = self.embedding(ids, positions)
        self_bias = additive(positions[None, :] <= positions[:, None], x.dtype)
        cross_bias = additive(valid[:, None, None, :], x.dtype)
        for layer, layer_cross in zip(self._layers(), cross, strict=True):
            x, _ = layer(x, self_bias, layer_cross, cross_bias)
        return self.output(x) if with_logits else None, x

    def step(
        self,
        ids: Tensor,
        position: Tensor,
        cache: Sequence[KeyValue],
        cross: Sequence[KeyValue],
        valid: Tensor,
    ) -> tuple[Tensor, Tensor, list[KeyValue]]:
        """Consume S new tokens per row; arguments, result and promises are those of `T5.step`."""
        positions = position.reshape(1) + torch.arange(ids.shape[1], device=ids.device)
        keys = torch.arange(cache[0][0].shape[2], device=ids.device)
        x = self.embedding(ids, positions)
        self_bias = additive(keys[None, :] <= positions[:, None], x.dtype)
        cross_bias = additive(valid[:, None, None, :], x.dtype)
        slots = positions[:, None].expand(ids.shape[0], self.config.heads, ids.shape[1], self.config.head_dim)
        written: list[KeyValue] = []
        for layer, layer_cache, layer_cross in zip(self._layers(), cache, cross, strict=True):
            x, layer_cache = layer(x, self_bias, layer_cross, cross_bias, layer_cache, slots)
            written.append(layer_cache)
        return self.output(x[:, -1]), x, written

    def empty_cache(self, rows: int, capacity: int) -> list[KeyValue]:
        """Zeroed self-attention caches for `step`: per layer keys and values [rows, H, capacity, Dh]."""
        shape = (rows, self.config.heads, capacity, self.config.head_dim)
        weight = self.output.weight
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(self.config.layers)]

    def merge_lora(self) -> BertText:
        """There is no LoRA here: the head is trained in full (section 13). Returns self."""
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """BERT's scheme for training from nothing: normal of 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INIT_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def _layers(self) -> Iterable[BertLayer]:
        return cast(Iterable[BertLayer], self.layers)
