"""Local attention: ordinary softmax attention over a bounded number of tokens, equation (6).

    segment   a token's own segment: the paper's
    sliding   and the whole segment before it, whose memory is read one segment later
    sink      and the first few tokens of all

What stands outside the own segment is called its context: so many tokens once the first segment is whole,
and none before.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from infini_attention.ops.options import check_choice

LOCAL_ATTENTION = ("segment", "sliding", "sink")


def context_tokens(local_attention: str, *, segment_length: int, sink_tokens: int) -> int:
    """How many tokens outside its own segment a token sees; ValueError for settings that cannot be right."""
    check_choice("local_attention", local_attention, LOCAL_ATTENTION)
    whole = isinstance(sink_tokens, int) and not isinstance(sink_tokens, bool)
    if local_attention == "sink" and not (whole and 1 <= sink_tokens <= segment_length):
        raise ValueError(
            f"sink_tokens is {sink_tokens!r}; give from 1 to segment_length, {segment_length}, or choose "
            "local_attention='segment'"
        )
    return {"segment": 0, "sliding": segment_length, "sink": sink_tokens}[local_attention]


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
    True = visible; None is causal, the last query being the last key: where there are more keys than queries,
    all see the ones before. `softcap` bounds the scores to softcap * tanh(score / softcap), as Gemma 2 does.
    Returns (batch, heads, length, value_dim).
    """
    if softcap is not None:
        return _softcapped(query, key, value, scale, softcap, mask)
    grouped, causal = query.shape[1] != key.shape[1], mask is None
    if causal and query.shape[2] != key.shape[2]:
        causal, mask = False, _lower_right(query, key)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
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
        mask = _causal(query, key)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * scale / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(
        dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)
    )
    return weights.to(value.dtype) @ value


def _lower_right(query: Tensor, key: Tensor) -> Tensor:
    """The causal mask of fewer queries than keys; on a GPU in words that its fast kernels understand."""
    if query.is_cuda and not torch.compiler.is_compiling():  # which cannot make such words inside a graph
        return causal_lower_right(query.shape[2], key.shape[2])
    return _causal(query, key)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """(length, keys) bool, True = visible, where the last query is the last key."""
    length, keys = query.shape[2], key.shape[2]
    return torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
