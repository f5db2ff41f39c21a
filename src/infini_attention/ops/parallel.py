"""All segments at once in torch: any device, any length.

Segments do not wait for each other. Local attention takes them as a batch; each segment's own sums

    B_s = sigma(K_s)^T V_s,   z_s = sum_t sigma(K_t),   A_s = sigma(K_s)^T diag(1 / sigma(K_s) z) sigma(K_s)

depend on nothing before it (A_s only on z, a prefix sum). What is left in order is one small step a
segment: M <- M + B_s for the linear rule (8), M <- M - A_s M + B_s for the delta rule (9). The scans keep
the state *before* each segment, so nothing is ever subtracted from a prefix sum.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from infini_attention.ops.context import attend_in_segments, delayed, next_context
from infini_attention.ops.copies import copied
from infini_attention.ops.layout import Layout, Output, Stretches, Whole
from infini_attention.ops.local import continued, local_attention
from infini_attention.ops.normalization import denominator, read
from infini_attention.ops.options import Inputs, Options, copies_in
from infini_attention.ops.scan import Runs, scan
from infini_attention.ops.state import MemoryState, is_empty

WholeSegments = Callable[[Inputs, Whole, MemoryState, Options], tuple[Tensor, MemoryState]]

BLOCK_TOKENS = 16_384  # without gradients, whole segments are taken in blocks: it bounds what is alive


def parallel(
    inputs: Inputs, layout: Layout, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Output (batch, heads, length, value_dim) and new state; see `infini_attention` for the contract."""
    block_tokens = None if inputs.needs_gradient(state) else BLOCK_TOKENS
    return walk(inputs, layout, state, options, _whole_segments, block_tokens)


def walk(
    inputs: Inputs,
    layout: Layout,
    state: MemoryState,
    options: Options,
    whole_segments: WholeSegments,
    block_tokens: int | None,
) -> tuple[Tensor, MemoryState]:
    """Finish the open segment, do all whole ones by `whole_segments`, open the next."""
    output = Output(layout, inputs.query, inputs.value.shape[-1])
    head, tail = layout.head(), layout.tail()
    if head is not None:
        values, state = _open_segment(_take(inputs, layout, head), head, state, options)
        output.write(head, values)
    for block in layout.whole(block_tokens, first_apart=inputs.context_key is not None):
        values, state = whole_segments(_take(inputs, layout, block), block, state, options)
        output.write(block, values)
    if tail is not None:
        values, state = _open_segment(_take(inputs, layout, tail), tail, state, options)
        output.write(tail, values)
    return output.tensor(), state


def _take(inputs: Inputs, layout: Layout, part: Stretches) -> Inputs:
    """The tokens and weights of one part: tensors (runs, heads, width, dim), weights (runs,)."""
    weights = inputs.segment_weights
    if weights is not None:
        weights = layout.take_weights(weights, part)
    return inputs.map(lambda x: layout.take(x, part), weights)


def _whole_segments(
    inputs: Inputs, block: Whole, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Segments that are complete, of rows that have none open."""
    before_M, before_z, memory, normalizer = write_segments(
        inputs.key, inputs.value, inputs.segment_weights, state.memory, state.normalizer, block, options
    )
    local, state = attend_in_segments(inputs, block, state, options)
    before_M, before_z, state = delayed(before_M, before_z, block, state)
    output = _mix(inputs, local, before_M, before_z, options)
    return output, state.after_whole_segments(memory, normalizer, block.segments)


def write_segments(
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    block: Whole,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The write side, (8) and (9), of whole segments: M and z before each, and after each row's last one.

    `key` and `value` are (runs, kv_heads, N, dim), `weights` (runs,), None, or int64 where they are copies;
    `memory` and `normalizer` the state before each row's first segment, (rows, kv_heads, ...).
    """
    keys, values = _features(key, memory, options), value.to(memory.dtype)

    normalizer_sums = _weighted(keys.sum(dim=2), weights)
    before_z, normalizer = scan(normalizer, block, lambda z, runs: z + normalizer_sums[runs])

    memory_sums, copies = keys.transpose(-1, -2) @ values, copies_in(weights)
    if copies is None:
        memory_sums = _weighted(memory_sums, weights)
    if options.update_rule == "delta":
        removal = keys.transpose(-1, -2) @ (keys / denominator(keys, before_z))  # A_s
        if copies is not None:
            removal, memory_sums = copied(keys, values, removal, memory_sums, before_z, copies)

        def step(M: Tensor, runs: Runs) -> Tensor:
            return M - removal[runs] @ M + memory_sums[runs]
    else:

        def step(M: Tensor, runs: Runs) -> Tensor:
            return M + memory_sums[runs]

    before_M, memory = scan(memory, block, step)
    return before_M, before_z, memory, normalizer


def _open_segment(
    inputs: Inputs, part: Stretches, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """One run a row, inside the row's open segment; segments that become whole are added to memory."""
    keys, values = _features(inputs.key, state.memory, options), inputs.value.to(state.memory.dtype)
    if not part.alike:
        valid = part.valid(inputs.query.device)[:, None, :, None]
        keys, values = torch.where(valid, keys, 0), torch.where(valid, values, 0)

    local_keys = continued(state.local_key, inputs.local_key)
    local_values = continued(state.local_value, inputs.seen_value)
    local = _attend_in_open_segment(inputs.local_query, local_keys, local_values, part, state, options)
    output = _mix(inputs, local, *state.readable, options)

    new_values = _weighted(values, inputs.segment_weights)
    if options.update_rule == "delta":
        new_values = new_values - read(keys, state.memory, state.normalizer, options.normalization)
    pending = replace(
        state,
        pending_memory=state.pending_memory + keys.transpose(-1, -2) @ new_values,
        pending_normalizer=state.pending_normalizer + _weighted(keys.sum(dim=2), inputs.segment_weights),
        local_key=local_keys,
        local_value=local_values,
        length=state.length + torch.tensor(part.counts),
    )
    if inputs.context_key is not None:
        assert state.open_context_key is not None
        new = inputs.context_key[:, :, : max(0, state.context_tokens - min(part.used))]
        pending = replace(pending, open_context_key=continued(state.open_context_key, new))
    handed_on = local_values
    if inputs.context_value is not None:
        handed_on = continued(state.local_value.detach(), inputs.context_value)
    if part.alike:
        return output, _alike_closed(pending, part, handed_on)
    return output, _closed(pending, part, state, handed_on)


def _attend_in_open_segment(
    query: Tensor, key: Tensor, value: Tensor, part: Stretches, state: MemoryState, options: Options
) -> Tensor:
    """Local attention of new tokens to `key` and `value`, those of the open segment so far."""
    context, width = 0, state.local_key.shape[2]
    if state.context_key is not None and state.context_value is not None and not all(part.first):
        context = state.context_tokens
        key, value = (
            torch.cat([state.context_key, key], dim=2),
            torch.cat([state.context_value, value], dim=2),
        )
    mask = _open_mask(part, context, width, key.device)
    return local_attention(query, key, value, scale=options.scale, softcap=options.softcap, mask=mask)


def _alike_closed(pending: MemoryState, part: Stretches, handed_on: Tensor) -> MemoryState:
    """The state after these tokens where all rows have as many in their open segments.

    `handed_on` are the values of all of those, as later segments see them.
    """
    if part.used[0] + part.counts[0] < pending.segment_length:
        if part.used[0]:
            return pending
        # Not a view of what was read: it would keep all of that alive.
        return pending.with_open(Tensor.clone)
    if pending.open_context_key is not None:
        key, value = pending.open_context_key, handed_on[:, :, : pending.context_tokens]
        whole = [True] * len(part.first)
        pending = next_context(pending, key, value, whole=whole, first=part.first)
    pending = pending.with_open(lambda x: x[:, :, :0].clone())
    return replace(
        pending,
        memory=pending.memory + pending.pending_memory,
        normalizer=pending.normalizer + pending.pending_normalizer,
        pending_memory=torch.zeros_like(pending.memory),
        pending_normalizer=torch.zeros_like(pending.normalizer),
    )


def _closed(pending: MemoryState, part: Stretches, state: MemoryState, handed_on: Tensor) -> MemoryState:
    """The same where rows differ: some segments become whole, others stay open."""
    size, old = pending.segment_length, state.local_key.shape[2]
    ends = [used + new for used, new in zip(part.used, part.counts, strict=True)]
    device = pending.memory.device
    whole = [end == size for end in ends]
    finished = torch.tensor(whole, device=device)[:, None, None]
    still_open = [end % size for end in ends]
    kept = _kept(torch.tensor(part.used), still_open, old).to(device)
    if state.open_context_key is not None:
        pending = _closed_context(pending, part, state, whole, handed_on)
    memory, normalizer = (
        pending.memory + pending.pending_memory,
        pending.normalizer + pending.pending_normalizer,
    )
    return replace(
        pending,
        memory=torch.where(finished[..., None], memory, pending.memory),
        normalizer=torch.where(finished, normalizer, pending.normalizer),
        pending_memory=torch.where(finished[..., None], 0, pending.pending_memory),
        pending_normalizer=torch.where(finished, 0, pending.pending_normalizer),
        local_key=_gather(pending.local_key, kept),
        local_value=_gather(pending.local_value, kept),
    )


def _closed_context(
    pending: MemoryState, part: Stretches, state: MemoryState, whole: list[bool], handed_on: Tensor
) -> MemoryState:
    """The contexts of rows that differ, and their open segments' keys as later ones will see them."""
    assert state.open_context_key is not None and pending.open_context_key is not None
    context, device = state.context_tokens, pending.memory.device
    used = torch.tensor(part.used)
    ends = [min(used + new, context) for used, new in zip(part.used, part.counts, strict=True)]
    keys, width = pending.open_context_key, state.open_context_key.shape[2]
    if any(whole):
        full = [context if ended else 0 for ended in whole]
        key = _gather(keys, _kept(used, full, width).to(device))
        value = _gather(handed_on, _kept(used, full, state.local_value.shape[2]).to(device))
        pending = next_context(pending, key, value, whole=whole, first=part.first)
    still_open = [0 if ended else end for end, ended in zip(ends, whole, strict=True)]
    return replace(pending, open_context_key=_gather(keys, _kept(used, still_open, width).to(device)))


def _open_mask(part: Stretches, context: int, width: int, device: torch.device) -> Tensor | None:
    """(rows or 1, 1, new, context + width + new): which keys each new token sees.

    1 1 | 1 1 0 | 1 0 0      a row with a context of 2, 2 of 3 places of the state used, and 3 new tokens
    1 1 | 1 1 0 | 1 1 0
    1 1 | 1 1 0 | 1 1 1

    None where nothing is before them, which is plain causal.
    """
    if not context and not width:
        return None
    new = part.width
    alike = part.alike and (not context or len(set(part.first)) == 1)
    rows = slice(1) if alike else slice(None)
    used, first = torch.tensor(part.used[rows]), torch.tensor(part.first[rows])
    outside = ~first[:, None].expand(-1, context)
    old = torch.arange(width) < used[:, None]
    causal = torch.ones(new, new, dtype=torch.bool).tril()
    before = torch.cat([outside, old], dim=1)
    both = [before[:, None].expand(-1, new, -1), causal.expand(len(used), new, new)]
    return torch.cat(both, dim=2)[:, None].to(device)


def _kept(used: Tensor, still_open: list[int], width: int) -> Tensor:
    """(rows, longest open): where each row's open tokens stand among `width` old places and the new ones.

    Places beyond a row's open segment are -1.
    """
    places = torch.arange(max(still_open))
    sources = torch.where(places < used[:, None], places, width + places - used[:, None])
    return torch.where(places < torch.tensor(still_open)[:, None], sources, -1)


def _gather(x: Tensor, places: Tensor) -> Tensor:
    """(rows, heads, n, dim) and (rows, m) to (rows, heads, m, dim); zero where `places` is -1."""
    places = places[:, None, :, None]
    index = places.clamp(min=0).expand(-1, x.shape[1], -1, x.shape[3])
    return torch.where(places < 0, 0, x.gather(2, index))


def _weighted(x: Tensor, weights: Tensor | None) -> Tensor:
    """`x` (runs, ...) times how often each run's segment counts."""
    return x if weights is None else x * weights.view(-1, *[1] * (x.dim() - 1))


def _features(x: Tensor, memory: Tensor, options: Options) -> Tensor:
    return options.feature_map(x.to(memory.dtype))


def _mix(inputs: Inputs, local: Tensor, memory: Tensor, normalizer: Tensor, options: Options) -> Tensor:
    """Equations (7) and (10): the gate's mixture of what memory and local attention answer."""
    runs, heads, length, _ = inputs.query.shape
    features = options.feature_map(inputs.query.to(memory.dtype))
    grouped = features.reshape(runs, memory.shape[1], -1, features.shape[-1])  # a group reads one memory
    from_memory = read(grouped, memory, normalizer, options.normalization).reshape(runs, heads, length, -1)

    share = torch.sigmoid(inputs.gate.to(memory.dtype)).view(1, heads, 1, 1)
    if options.empty_memory == "local":
        empty = is_empty(normalizer).repeat_interleave(heads // memory.shape[1], dim=1)
        share = torch.where(empty[..., None, None], 0, share)
    return torch.lerp(local.to(memory.dtype), from_memory, share).to(inputs.query.dtype)
