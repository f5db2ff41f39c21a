"""What tokens see outside their own segment, and which memory they read beside it.

A *context* is the whole segment before ("sliding") or the row's first tokens ("sink"). Segments are handed
theirs as they are handed a memory: by a scan. With "sliding", what a segment reads is the memory of all
segments before its context, which is that of the segment before it:

    segment t   attends to t - 1 and t, reads M_{t-2}        every earlier token is in one of the two
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from infini_attention.ops.flags import flags
from infini_attention.ops.layout import Whole
from infini_attention.ops.local import local_attention
from infini_attention.ops.options import Inputs, Options
from infini_attention.ops.scan import scan
from infini_attention.ops.state import MemoryState


def attend_in_segments(
    inputs: Inputs, block: Whole, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Local attention of whole segments, (runs, heads, N, value_dim), and the state with the next context."""
    key, value, mask = inputs.local_key, inputs.seen_value, None
    if inputs.context_key is not None:
        keys, values, state = hand_on(inputs.context_key, inputs.handed_on_value, block, state)
        if not all(block.first):
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            mask = _mask(block, options.segment_length, keys.shape[2], keys.device)
    local = local_attention(
        inputs.local_query, key, value, scale=options.scale, softcap=options.softcap, mask=mask
    )
    return local, state


def hand_on(
    key: Tensor, value: Tensor, block: Whole, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """Keys and values outside each run that it sees, and the state with each row's next context.

    `key` and `value` are those of the runs' tokens as later segments see them, (runs, kv_heads, N, dim).
    """
    assert state.context_key is not None and state.context_value is not None
    keys, next_key = _contexts(state.context_key, key, block, state)
    values, next_value = _contexts(state.context_value, value, block, state)
    return keys, values, replace(state, context_key=next_key, context_value=next_value)


def delayed(
    memory: Tensor, normalizer: Tensor, block: Whole, state: MemoryState
) -> tuple[Tensor, Tensor, MemoryState]:
    """What each run reads, and the new state; `memory` and `normalizer` are of all segments before each."""
    if state.earlier_memory is None or state.earlier_normalizer is None:
        return memory, normalizer, state
    read_memory, last_memory = scan(state.earlier_memory, block, lambda _, runs: memory[runs])
    read_normalizer, last = scan(state.earlier_normalizer, block, lambda _, runs: normalizer[runs])
    # Not views of what was read: they would keep all of that alive.
    state = replace(state, earlier_memory=last_memory.clone(), earlier_normalizer=last.clone())
    return read_memory, read_normalizer, state


def next_context(
    state: MemoryState, key: Tensor, value: Tensor, *, whole: Sequence[bool], first: Sequence[bool]
) -> MemoryState:
    """The state whose rows that have become `whole` hand on a context, `first` of all or not.

    `key` and `value` are the first tokens of each row's segment, as many as a context takes; `state` is that
    in which the segment is not in memory yet.
    """
    old_key, old_value = state.context_key, state.context_value
    old_memory, old_normalizer = state.earlier_memory, state.earlier_normalizer
    assert old_key is not None and old_value is not None
    if old_memory is None or old_normalizer is None:  # sinks are those of the first segment
        whole = [ended and is_first for ended, is_first in zip(whole, first, strict=True)]
    else:
        state = replace(
            state,
            earlier_memory=_where(whole, state.memory, old_memory),
            earlier_normalizer=_where(whole, state.normalizer, old_normalizer),
        )
    return replace(
        state,
        context_key=_where(whole, key, old_key),
        context_value=_where(whole, value, old_value),
    )


def _contexts(start: Tensor, x: Tensor, block: Whole, state: MemoryState) -> tuple[Tensor, Tensor]:
    """The context before each run, and each row's after its last one, of tokens `x` (runs, heads, N, dim)."""
    new = x[:, :, : state.context_tokens]
    if state.local_attention == "sliding" or all(block.first):
        before, last = scan(start, block, lambda _, runs: new[runs])
    elif not any(block.first):
        before, last = scan(start, block, lambda old, _: old)
    else:
        first = flags(block.first, x.device)[:, None, None, None]
        before, last = scan(start, block, lambda old, runs: torch.where(first[runs], new[runs], old))
    return before, last.clone()  # not a view of what was read: it would keep all of that alive


def _mask(block: Whole, length: int, context: int, device: torch.device) -> Tensor | None:
    """(runs, 1, length, context + length) bool, True = visible; None where all runs see their context."""
    if not any(block.first):
        return None
    seen = ~flags(block.first, device)[:, None, None].expand(-1, length, context)
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril().expand(len(seen), -1, -1)
    return torch.cat([seen, causal], dim=2)[:, None]


def _where(rows: Sequence[bool], new: Tensor, old: Tensor) -> Tensor:
    """A copy of `new` in the given rows, of `old` in the others."""
    if all(rows):
        return new.clone()
    if not any(rows):
        return old
    chosen = flags(rows, old.device).view(-1, *[1] * (old.dim() - 1))
    return torch.where(chosen, new, old)
