"""Attention as matrix products around a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute ``F.scaled_dot_product_attention``: (…, L, E), (…, S, E), (…, S, V) to (…, L, V)."""
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    if is_causal:
        size = query.shape[-2], key.shape[-2]
        attn_mask = torch.ones(size, dtype=torch.bool, device=query.device).tril()
    mask = None if attn_mask is None else additive(attn_mask, query, keep=True)
    return _attend(query, key, value, mask, dropout_p, scale)[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return the attended values, and the attention weights."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = torch.matmul(query * scale, key.transpose(-2, -1))
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, -1)
    if dropout > 0:
        weights = F.dropout(weights, dropout)
    return torch.matmul(weights, value), weights


def additive(mask: Tensor, like: Tensor, keep: bool) -> Tensor:
    """Return a mask as numbers to add; ``keep``: whether a boolean one is true where nothing is masked."""
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=like.device)
    return zeros.masked_fill(~mask if keep else mask, -torch.inf)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute ``F.multi_head_attention_forward`` on (L, N, E) or (L, E): what ``nn.MultiheadAttention`` calls."""
    batched = query.dim() == 3
    if not batched:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    weights: Sequence[Any] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases: Sequence[Any] = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    # the batch first, as the NPU expects it
    parts = [
        F.linear(tensor.transpose(0, 1), weight, bias)
        for tensor, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(length, parts[1].shape[1], dtype=torch.bool, device=query.device).triu(1)
    more = [(bias_k, bias_v)] if bias_k is not None and bias_v is not None else []
    more += [(key.new_zeros(width), value.new_zeros(width))] if add_zero_attn else []
    for tokens in more:  # that every query may attend to
        for index, token in enumerate(tokens, 1):
            parts[index] = torch.cat([parts[index], token.reshape(1, 1, -1).expand(batch, 1, -1)], 1)
    q, k, v = (part.reshape(batch, part.shape[1], num_heads, width // num_heads).transpose(1, 2) for part in parts)
    attn_mask, key_padding_mask = (_with_columns(one, len(more)) for one in (attn_mask, key_padding_mask))
    mask = None
    if attn_mask is not None:
        mask = additive(attn_mask, q, keep=False)
        if mask.dim() == 3:
            mask = mask.reshape(batch, num_heads, *mask.shape[-2:])
    if key_padding_mask is not None:
        padding = additive(key_padding_mask, q, keep=False)[:, None, None, :]
        mask = padding if mask is None else mask + padding
    seen, looked = _attend(q, k, v, mask, dropout_p if training else 0.0)
    # laid out in memory as PyTorch does, which decides what a dropout behind it drops
    joined = seen.permute(2, 0, 1, 3).reshape(length, batch, width)
    output = F.linear(joined, out_proj_weight, out_proj_bias)
    if not batched:
        output = output.squeeze(1)
    if not need_weights:
        return output, None
    if average_attn_weights:
        looked = looked.mean(1)
    return output, looked if batched else looked.squeeze(0)


def supports_multi_head_attention(*args: Any, **kwargs: Any) -> bool:
    """Return whether :func:`multi_head_attention` can compute a call: not with static keys."""
    bound = dict(zip(_ATTENTION_ARGUMENTS, args, strict=False)) | kwargs
    return bound.get("static_k") is None and bound.get("static_v") is None


def _with_columns(mask: Tensor | None, count: int) -> Tensor | None:
    """Return a mask with further columns, of keys that are not masked."""
    if mask is None or count == 0:
        return mask
    return torch.cat([mask, mask.new_zeros((*mask.shape[:-1], count))], -1)


_ATTENTION_ARGUMENTS = multi_head_attention.__code__.co_varnames[: multi_head_attention.__code__.co_argcount]
