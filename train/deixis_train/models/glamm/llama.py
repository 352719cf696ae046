"""LLaMA, the language model of GLaMM (section 5). Parameter names are Hugging Face's.

Two ways to run it give the same numbers: `forward` takes whole rows, `step` a few new positions against caches of keys
and values. Letters in shapes: R rows, L or S positions, T cache capacity, D width, H heads, Hkv heads of keys and
values, Dh head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deixis_train.models.glamm.config import LlamaConfig
from deixis_train.models.layers import LoraLinear, RMSNorm, merge_heads, merge_lora, projection, split_heads
from deixis_train.models.text_rows import KeyValue, additive


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, half: int) -> Tensor:
    """Rotary position code in the half-split form: channel i pairs with i + `half`, which is Dh / 2.

    x [R, H, S, Dh], cosine and sine [S, Dh] -> [R, H, S, Dh].
    """
    return x * cosine + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sine


class LlamaAttention(nn.Module):
    """Causal attention; several heads may share one head of keys and values."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        inner, inner_kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        lora = (config.lora_rank, config.lora_scale, config.lora_dropout)
        self.q_proj = projection(config.emb, inner, *lora)
        self.k_proj = nn.Linear(config.emb, inner_kv, bias=False)
        self.v_proj = projection(config.emb, inner_kv, *lora)
        self.o_proj = nn.Linear(inner, config.emb, bias=False)

    def project(self, x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, S, D] -> rotated queries [R, H, S, Dh], rotated keys and values [R, Hkv, S, Dh]."""
        query = split_heads(self.q_proj(x), self.heads)
        key = split_heads(self.k_proj(x), self.kv_heads)
        value = split_heads(self.v_proj(x), self.kv_heads)
        half = self.head_dim // 2
        return rotate(query, cosine, sine, half), rotate(key, cosine, sine, half), value

    def group(self, query: Tensor) -> Tensor:
        """[R, H, S, Dh] -> [R, Hkv, H / Hkv, S, Dh]: adjacent heads share their keys and values."""
        return query.unflatten(1, (self.kv_heads, self.heads // self.kv_heads))

    def forward(self, x: Tensor, allowed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Whole rows x [R, L, D]; `allowed` bool [R or 1, 1, L, L] says which query sees which key."""
        query, key, value = self.project(x, cosine, sine)
        shared = self.heads // self.kv_heads
        attended = F.scaled_dot_product_attention(
            self.group(query).flatten(2, 3), key, value, attn_mask=allowed.repeat(1, 1, shared, 1)
        )
        attended = attended.unflatten(2, (shared, -1)).flatten(1, 2)
        return self.o_proj(merge_heads(attended))

    def step(
        self, x: Tensor, cache: KeyValue, slots: Tensor, end: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """New positions x [R, S, D] against the cache; `bias` [S, `end`] is added to the scores.

        Written out rather than left to `scaled_dot_product_attention`, whose exported form scales all keys every time.
        """
        query, key, value = self.project(x, cosine, sine)
        key, value = cache[0].scatter(2, slots, key), cache[1].scatter(2, slots, value)
        query = self.group(query * self.head_dim**-0.5).flatten(2, 3)
        scores = query @ key[:, :, :end].transpose(-1, -2)
        scores = scores.unflatten(2, (self.heads // self.kv_heads, -1)) + bias
        weights = F.softmax(scores.float(), dim=-1).to(scores.dtype).flatten(2, 3)
        attended = (weights @ value[:, :, :end]).unflatten(2, (self.heads // self.kv_heads, -1)).flatten(1, 2)
        return self.o_proj(merge_heads(attended)), (key, value)


class LlamaMlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.emb, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.emb, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.emb, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.emb, config.rms_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.emb, config.rms_eps)
        self.mlp = LlamaMlp(config)

    def forward(self, x: Tensor, allowed: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), allowed, cosine, sine)
        return x + self.mlp(self.post_attention_layernorm(x))

    def step(
        self, x: Tensor, cache: KeyValue, slots: Tensor, end: Tensor, bias: Tensor, cosine: Tensor, sine: Tensor
    ) -> tuple[Tensor, KeyValue]:
        attended, cache = self.self_attn.step(self.input_layernorm(x), cache, slots, end, bias, cosine, sine)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nn.Module):
    """The language model; it takes embeddings, because visual ones are spliced in between those of words."""

    inverse_frequencies: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.heads % config.kv_heads:
            raise ValueError(f"{config.heads} heads cannot share {config.kv_heads} heads of keys and values evenly")
        if config.head_dim % 2:
            raise ValueError(f"rotary positions need an even head width, not {config.head_dim}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab, config.emb)
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.emb, config.rms_eps)
        self.lm_head = None if config.tied else nn.Linear(config.emb, config.vocab, bias=False)
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        self.register_buffer("inverse_frequencies", config.rope_base**-exponents, persistent=False)
        self.init_weights()

    def embed(self, ids: Tensor) -> Tensor:
        """[R, S] integer -> [R, S, D]."""
        return self.embed_tokens(ids)

    def head(self, states: Tensor) -> Tensor:
        """[..., D] -> logits [..., vocab]."""
        return F.linear(states, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(states)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., S, Dh] of integer positions [..., S]; the angles are computed in float32."""
        angles = positions.to(torch.float32)[..., None] * self.inverse_frequencies.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        embeds: Tensor,
        valid: Tensor | None = None,
        layers: int | None = None,
        branch: Tensor | None = None,
    ) -> Tensor:
        """Whole rows, each position seeing itself and the valid ones before it.

        Args:
            embeds: [R, L, D].
            valid: [R, L] bool, False on padding. Positions count from the start of a row whatever is valid, and what
                comes out at padding means nothing. None: all are valid.
            layers: stop behind that many layers, without the final norm; None runs all.
            branch: [R, L] int64, for rows that go on in several ways from one beginning: 0 for what they share, then
                1, 2 ... for each continuation, which sees the beginning and itself, and counts its positions as if
                the others were not there. None: one way.

        Returns:
            States [R, L, D], after the final norm.
        """
        positions = torch.arange(embeds.shape[1], device=embeds.device)
        allowed = (positions[None, :] <= positions[:, None])[None, None]
        counted = positions
        if branch is not None:
            key, query = branch[:, None, None, :], branch[:, None, :, None]
            allowed = allowed & ((key == 0) | (key == query))
            counted = allowed.sum(-1) - 1  # [R, 1, L]
        if valid is not None:
            # A position always sees itself: a row of scores without any key would become NaN.
            own = positions[None, :] == positions[:, None]
            allowed = allowed & (valid[:, None, None, :] | own)
        cosine, sine = self._rotation(counted, embeds.dtype)
        x = embeds
        for layer in self.layers[:layers]:
            x = layer(x, allowed, cosine, sine)
        return self.norm(x) if layers is None else x

    def step(self, embeds: Tensor, position: Tensor, cache: Sequence[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        """Consume S new positions per row. A wide step (S > 1) is the prefill, or a follow-up question.

        The caches are not changed in place: new ones come back. Slots not yet written are not read.

        Args:
            embeds: [R, S, D], at positions `position` to `position + S - 1`.
            position: int64 with one element, shared by all rows.
            cache: per layer keys (rotated) and values [R, Hkv, T, Dh], T >= position + S (`empty_cache` to begin with).

        Returns:
            States [R, S, D] after the final norm, and the new caches.
        """
        rows, length = embeds.shape[:2]
        positions = position.reshape(1) + torch.arange(length, device=embeds.device)
        # Only what is written is attended to, so the cost follows the position and not the capacity.
        end = positions[-1] + 1
        keys = torch.arange(cache[0][0].shape[2], device=embeds.device)[:end]
        bias = additive(keys[None, :] <= positions[:, None], embeds.dtype)
        cosine, sine = self._rotation(positions, embeds.dtype)
        # One index for all layers. A scatter becomes one ONNX node that can write in place; index_copy becomes two.
        slots = positions[:, None].expand(rows, self.config.kv_heads, length, self.config.head_dim)
        x = embeds
        written: list[KeyValue] = []
        for layer, layer_cache in zip(cast(Iterable[LlamaBlock], self.layers), cache, strict=True):
            x, layer_cache = layer.step(x, layer_cache, slots, end, bias, cosine, sine)
            written.append(layer_cache)
        return self.norm(x), written

    def empty_cache(self, rows: int, capacity: int) -> list[KeyValue]:
        """Zeroed caches for `step`: per layer keys and values [rows, Hkv, capacity, Dh]."""
        shape = (rows, self.config.kv_heads, capacity, self.config.head_dim)
        like = self.embed_tokens.weight
        return [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(self.config.layers)]

    def merge_lora(self) -> Llama:
        """Fold every A B product into its matrix, in place; the function stays the same. Returns self."""
        merge_lora(self)
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Start values for training from nothing: normal of 0.02, smaller where a block adds to the stream.

        LoRA's second factor starts at zero, so that the factors change nothing at first.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | LoraLinear | nn.Embedding):
                adds = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 * (2 * self.config.layers) ** -0.5 if adds else 0.02)
            if isinstance(module, LoraLinear):
                self._init_factors(module)

    def init_lora(self) -> None:
        """Start values of the LoRA factors alone, beside matrices that have learned."""
        for module in self.modules():
            if isinstance(module, LoraLinear):
                self._init_factors(module)

    @torch.no_grad()
    def _init_factors(self, module: LoraLinear) -> None:
        nn.init.normal_(module.lora_a, std=self.config.emb**-0.5)
        nn.init.zeros_(module.lora_b)
