"""The backend "triton": whole segments by local attention of the best library and the fused memory."""

from dataclasses import replace

import torch
from torch import Tensor

from infini_attention.ops.context import attend_in_segments, delayed
from infini_attention.ops.layout import Layout, Whole
from infini_attention.ops.options import Inputs, Options, copies_in
from infini_attention.ops.parallel import walk
from infini_attention.ops.state import MemoryState
from infini_attention.ops.triton.memory import (
    FUSED_MAPS,
    Mix,
    SegmentStates,
    mix,
    mix_into,
    segment_states,
    strided,
)


def fused(inputs: Inputs, layout: Layout, state: MemoryState, options: Options) -> tuple[Tensor, MemoryState]:
    """Output (batch, heads, length, value_dim) and new state; see `infini_attention` for the contract."""
    whole_segments = _trained_segments if inputs.needs_gradient(state) else _inferred_segments
    return walk(inputs, layout, state, options, whole_segments, None)


def write_segments(
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    block: Whole,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `parallel.write_segments` says, without copies."""
    assert copies_in(weights) is None
    (key,), name = _fusible(key, options=options)
    state, delta = (memory.contiguous(), normalizer.contiguous()), options.update_rule == "delta"
    _, *states = SegmentStates.apply(key, strided(value), weights, *state, block.segments, name, delta)
    return tuple(states)


def _trained_segments(
    inputs: Inputs, block: Whole, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Whole segments with gradients."""
    (query, key), name = _fusible(inputs.query, inputs.key, options=options)
    value, before_memory, before_normalizer, memory, normalizer = SegmentStates.apply(
        key,
        strided(inputs.value),
        inputs.segment_weights,
        state.memory.contiguous(),
        state.normalizer.contiguous(),
        block.segments,
        name,
        options.update_rule == "delta",
    )
    local, state = attend_in_segments(replace(inputs, value=value), block, state, options)
    before_memory, before_normalizer, state = delayed(before_memory, before_normalizer, block, state)
    local, gated = strided(local), options.empty_memory == "gated"
    output = Mix.apply(query, local, inputs.gate.float(), before_memory, before_normalizer, name, gated)
    return output, state.after_whole_segments(memory, normalizer, block.segments)


def _inferred_segments(
    inputs: Inputs, block: Whole, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Whole segments without gradients: the mixture takes the place of local attention's output."""
    (query, key), name = _fusible(inputs.query, inputs.key, options=options)
    before_memory, before_normalizer, memory, normalizer, *_ = segment_states(
        key,
        strided(inputs.value),
        inputs.segment_weights,
        state.memory.contiguous(),
        state.normalizer.contiguous(),
        block.segments,
        name,
        options.update_rule == "delta",
    )
    del _  # the delta rule's matrices, as large as all states together
    local, state = attend_in_segments(inputs, block, state, options)
    before_memory, before_normalizer, state = delayed(before_memory, before_normalizer, block, state)
    local, gated = strided(local), options.empty_memory == "gated"
    arguments = query, local, inputs.gate.float(), before_memory, before_normalizer
    if torch.compiler.is_compiling():  # an operator's output must not be one of its other arguments
        output = mix(*arguments, name, gated)
    else:
        output = mix_into(*arguments, local, name, gated)
    return output, state.after_whole_segments(memory, normalizer, block.segments)


def _fusible(*tensors: Tensor, options: Options) -> tuple[list[Tensor], str]:
    """Queries or keys, and the map that the kernels apply to them."""
    name = options.feature_map.name
    if name in FUSED_MAPS:
        return [strided(x) for x in tensors], name
    # A map that widens, or one registered by the user. What fp16 holds may be too much for it once mapped.
    dtype = torch.float32 if tensors[0].dtype == torch.float16 else tensors[0].dtype
    return [strided(options.feature_map(x.float()).to(dtype)) for x in tensors], "identity"
