"""The write side by itself: what whole segments leave in a state, without what their tokens read."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infini_attention.ops.context import delayed, hand_on
from infini_attention.ops.infini import memory_map
from infini_attention.ops.layout import Layout, Whole, plan
from infini_attention.ops.options import Options, autocast_type
from infini_attention.ops.parallel import write_segments
from infini_attention.ops.state import MemoryState
from infini_attention.ops.triton.availability import obstacle, weights_obstacle


def write_whole(
    key: Tensor,
    value: Tensor,
    *,
    segment_length: int,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    local_attention: str = "segment",
    sink_tokens: int = 4,
    context_key: Tensor | None = None,
    state: MemoryState | None = None,
) -> MemoryState:
    """The state that `infini_attention` returns for these tokens, at a part of its cost; gradients flow.

    Args:
        key: (batch, kv_heads, length, head_dim), without position embedding; whole segments.
        value: (batch, kv_heads, length, value_dim).
        segment_length: N, tokens a segment.
        update_rule: "linear" or "delta".
        feature_map: sigma, a name of `ops.feature_maps`.
        normalization: as in `infini_attention`, and so are all that follow.
        local_attention: "segment", "sliding" or "sink".
        sink_tokens: of "sink".
        context_key: like `key`, where local attention is not of the segment alone.
        state: what these tokens come after, with no segment open; None at the start.

    Raises:
        ValueError: a segment that is not whole, here or in `state`; an update rule, feature map or
            normalization that `infini_attention` refuses.
    """
    sigma = memory_map(update_rule, feature_map, normalization)
    if state is None:
        state = MemoryState.before(
            key,
            value,
            segment_length=segment_length,
            feature_map=feature_map,
            local_attention=local_attention,
            sink_tokens=sink_tokens,
        )
    lengths, (batch, _, length, _) = state.length.tolist(), key.shape
    layout = plan(batch, length, segment_length=segment_length, lengths=lengths, device=key.device)
    if length % segment_length or any(layout.open_lengths):
        raise ValueError(
            f"{length} tokens after {max(layout.open_lengths)} of an open segment are not whole segments of "
            f"{segment_length}; use infini_attention"
        )
    options = Options.of_writing(segment_length, update_rule, sigma, normalization)
    with torch.autocast(autocast_type(key.device), enabled=False):
        for block in layout.whole(first_apart=context_key is not None):
            state = _written(key, value, context_key, layout, block, state, options)
    return state


def writer(key: Tensor, memory: Tensor, weights: Tensor | None, normalization: str) -> Callable[..., Any]:
    """`write_segments` in fused kernels where these can take such tensors, else in torch."""
    reason = obstacle(key.device, key.dtype, max(memory.shape[-2:]), normalization)
    if reason is None and weights_obstacle(weights) is None:
        from infini_attention.ops.triton import backend

        return backend.write_segments
    return write_segments


def _written(
    key: Tensor,
    value: Tensor,
    context_key: Tensor | None,
    layout: Layout,
    block: Whole,
    state: MemoryState,
    options: Options,
) -> MemoryState:
    """The state after the segments of one block."""
    key, value = layout.take(key, block), layout.take(value, block)
    write = writer(key, state.memory, None, options.normalization)
    before_M, before_z, memory, normalizer = write(
        key, value, None, state.memory, state.normalizer, block, options
    )
    if context_key is not None:
        *_, state = hand_on(layout.take(context_key, block), value, block, state)
    *_, state = delayed(before_M, before_z, block, state)
    return state.after_whole_segments(memory, normalizer, block.segments)
