"""The backend "triton": whole segments by local attention of the best library and the fused memory."""

import torch
from torch import Tensor

from infini_attention.ops.layout import Layout, Whole
from infini_attention.ops.local import local_attention
from infini_attention.ops.options import Inputs, Options
from infini_attention.ops.parallel import walk
from infini_attention.ops.state import MemoryState
from infini_attention.ops.triton.memory import FUSED_MAPS, mix, mix_, segment_states


def fused(inputs: Inputs, layout: Layout, state: MemoryState, options: Options) -> tuple[Tensor, MemoryState]:
    """Output (batch, heads, length, value_dim) and new state; see `infini_attention` for the contract."""
    in_place = not inputs.needs_gradient(state)

    def whole_segments(
        inputs: Inputs, block: Whole, state: MemoryState, options: Options
    ) -> tuple[Tensor, MemoryState]:
        return _whole_segments(inputs, block, state, options, in_place)

    return walk(inputs, layout, state, options, whole_segments, None)


def _whole_segments(
    inputs: Inputs, block: Whole, state: MemoryState, options: Options, in_place: bool
) -> tuple[Tensor, MemoryState]:
    query, key, name = inputs.query, inputs.key, options.feature_map.name
    if name not in FUSED_MAPS:  # a map that widens or was registered by the user
        query, key = (options.feature_map(x.float()).to(x.dtype) for x in (query, key))
        name = "identity"
    before_memory, before_normalizer, memory, normalizer, *_ = segment_states(
        _rows_contiguous(key),
        _rows_contiguous(inputs.value),
        inputs.segment_weights,
        state.memory.contiguous(),
        state.normalizer.contiguous(),
        block.segments,
        name,
        options.update_rule == "delta",
    )
    local = local_attention(
        inputs.local_query, inputs.local_key, inputs.value, scale=options.scale, softcap=options.softcap
    )
    query, gated = _rows_contiguous(query), options.empty_memory == "gated"
    if in_place:
        output = _rows_contiguous(local)
        mix_(query, output, inputs.gate, before_memory, before_normalizer, name, gated)
    else:
        output = mix(query, local, inputs.gate, before_memory, before_normalizer, name, gated)
    return output, state.after_whole_segments(memory, normalizer, block.segments)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
