"""Local attention: ordinary softmax attention inside one segment, equation (6)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def local_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(Q K^T * scale) V, each query seeing what `mask` allows.

    `query` (batch, heads, length, head_dim), `key` (batch, kv_heads, keys, head_dim), `value`
    (batch, kv_heads, keys, value_dim). `mask` is bool, broadcastable to (batch, heads, length, keys),
    True = visible; None is causal, with as many keys as queries. `softcap` bounds the scores to
    softcap * tanh(score / softcap), as Gemma 2 does. Returns (batch, heads, length, value_dim).
    """
    if softcap is not None:
        return _softcapped(query, key, value, scale, softcap, mask)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def continued(old: Tensor, new: Tensor) -> Tensor:
    """`new` tokens after `old` ones, (batch, kv_heads, tokens, dim).

    A fresh segment is left as it is: SDPA rounds differently on a copy with other strides.
    """
    return torch.cat([old, new], dim=2) if old.shape[2] else new


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, mask: Tensor | None
) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(
        dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return weights.to(value.dtype) @ value
