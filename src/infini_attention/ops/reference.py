"""The paper's loop, one row and one segment at a time: slow, short, and the truth that tests compare with.

Equation numbers are those of arXiv 2404.07143. Beside them stands only what the paper leaves open: the
empty memory, a segment that arrives in several pieces, and what local attention sees outside its segment.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from infini_attention.ops.layout import Layout
from infini_attention.ops.local import continued, local_attention
from infini_attention.ops.normalization import read
from infini_attention.ops.options import Inputs, Options
from infini_attention.ops.state import MemoryState, is_empty


def reference(
    inputs: Inputs, layout: Layout, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    """Output (batch, heads, length, value_dim) and new state; see `infini_attention` for the contract."""
    heads, value_dim = inputs.query.shape[1], inputs.value.shape[-1]
    output = inputs.query.new_zeros(layout.batch * layout.length, heads, value_dim)
    states, first = [], 0
    for row, count in enumerate(layout.counts):
        tokens = torch.arange(first, first + count, device=output.device)
        tokens = tokens if layout.real is None else layout.real[tokens]
        row_state = state.select(torch.tensor([row]))
        row_output, row_state = _row(_pick(inputs, tokens, row), row_state, options)
        output = output.index_copy(0, tokens, row_output.squeeze(0).transpose(0, 1))
        states.append(row_state)
        first += count
    output = output.reshape(layout.batch, layout.length, heads, value_dim).transpose(1, 2)
    return output, MemoryState.cat(states)


def _pick(inputs: Inputs, tokens: Tensor, row: int) -> Inputs:
    """The tokens at the given flat (batch * length) positions, as a batch of one row."""
    weights = inputs.segment_weights
    return inputs.map(
        lambda x: x.transpose(1, 2).flatten(0, 1)[tokens].transpose(0, 1).unsqueeze(0),
        None if weights is None else weights[row : row + 1],
    )


def _row(inputs: Inputs, state: MemoryState, options: Options) -> tuple[Tensor, MemoryState]:
    """One sequence without padding: (1, heads, count, ...) inputs, a state of one row."""
    length, first, column = inputs.query.shape[2], 0, 0
    outputs = [inputs.query.new_zeros(1, inputs.query.shape[1], 0, inputs.value.shape[-1])]
    while first < length:
        last = min(first + options.segment_length - int(state.open_length), length)
        piece = inputs.map(lambda x: x[:, :, first:last], inputs.segment_weights)  # noqa: B023
        output, state = _piece(piece, column, state, options)
        outputs.append(output)
        first, column = last, column + 1
    return torch.cat(outputs, dim=2), state


def _piece(inputs: Inputs, column: int, state: MemoryState, options: Options) -> tuple[Tensor, MemoryState]:
    """Tokens that lie in one segment: attend, then add them to the open segment's sums."""
    sigma, group = options.feature_map, inputs.query.shape[1] // inputs.key.shape[1]
    dtype = state.memory.dtype
    M, z = state.memory, state.normalizer
    V = inputs.value.to(dtype)
    sigma_q, sigma_k = sigma(inputs.query.to(dtype)), sigma(inputs.key.to(dtype))

    # (6) local attention over the segment so far, and what stands outside it
    used = int(state.open_length)  # places beyond it are there for rows with a longer open segment
    K_local = continued(state.local_key[:, :, :used], inputs.local_key)
    V_local = continued(state.local_value[:, :, :used], inputs.seen_value)
    first = int(state.length) < options.segment_length
    A_dot = _local(inputs.local_query, *_seen(K_local, V_local, first, state), options)

    # (7) read the memory of all segments before those
    heads_M, heads_z = (x.repeat_interleave(group, dim=1) for x in state.readable)
    A_mem = read(sigma_q, heads_M, heads_z, options.normalization)

    # (10) mix; an empty memory has no share, unless the paper's literal form is asked for
    share = torch.sigmoid(inputs.gate.to(dtype))[None, :, None, None]
    if options.empty_memory == "local":
        share = torch.where(is_empty(heads_z)[..., None, None], torch.zeros_like(share), share)
    A = share * A_mem + (1 - share) * A_dot.to(dtype)

    # (8), (9) the segment's sums; `weight` is how often it counts, as copies are made once it is whole
    weights = inputs.segment_weights
    weight = 1 if weights is None or inputs.copies is not None else weights[0, column]
    values = weight * V
    if options.update_rule == "delta":
        values = values - read(sigma_k, M, z, options.normalization)
    pending_memory = state.pending_memory + sigma_k.transpose(-1, -2) @ values
    pending_normalizer = state.pending_normalizer + (weight * sigma_k).sum(dim=2)

    context = _continued_context(inputs, used, state)
    length = state.length + inputs.query.shape[2]
    if int(length) % options.segment_length == 0:  # the segment is whole: it becomes memory
        V_outside = V_local
        if inputs.context_value is not None:
            V_outside = continued(state.local_value[:, :, :used].detach(), inputs.context_value)
        context = _next_context(context, V_outside, first, state)
        M, z = M + pending_memory, z + pending_normalizer
        copies = 1 if inputs.copies is None else int(inputs.copies[0, column])
        M, z = _again(M, z, sigma_k, V, copies - 1, options)
        pending_memory, pending_normalizer = torch.zeros_like(M), torch.zeros_like(z)
        K_local, V_local = K_local[:, :, :0], V_local[:, :, :0]
    new_state = replace(
        state,
        memory=M,
        normalizer=z,
        pending_memory=pending_memory,
        pending_normalizer=pending_normalizer,
        local_key=K_local,
        local_value=V_local,
        length=length,
        **context,
    )
    return A.to(inputs.query.dtype), new_state


def _again(
    M: Tensor, z: Tensor, sigma_k: Tensor, V: Tensor, times: int, options: Options
) -> tuple[Tensor, Tensor]:
    """(9) of a whole segment so many times more, all of them with the z of before the first."""
    for _ in range(times):
        M = M + sigma_k.transpose(-1, -2) @ (V - read(sigma_k, M, z, options.normalization))
    return M, z + times * sigma_k.sum(dim=2)


def _seen(key: Tensor, value: Tensor, first: bool, state: MemoryState) -> tuple[Tensor, Tensor]:
    """The open segment's keys and values after those outside it, of which the `first` segment sees none."""
    if first or state.context_key is None or state.context_value is None:
        return key, value
    return torch.cat([state.context_key, key], dim=2), torch.cat([state.context_value, value], dim=2)


def _continued_context(inputs: Inputs, used: int, state: MemoryState) -> dict[str, Any]:
    """What the state keeps of the open segment for later segments to see."""
    if inputs.context_key is None or state.open_context_key is None:
        return {}
    key = continued(state.open_context_key[:, :, :used], inputs.context_key)
    return {"open_context_key": key[:, :, : state.context_tokens]}


def _next_context(context: dict[str, Any], value: Tensor, first: bool, state: MemoryState) -> dict[str, Any]:
    """What the next segment sees outside it, after one that is whole and hands on the values `value`."""
    if not context:
        return {}
    key = context["open_context_key"]
    changes: dict[str, Any] = {"open_context_key": key[:, :, :0]}
    if state.local_attention == "sliding":
        changes |= {"earlier_memory": state.memory, "earlier_normalizer": state.normalizer}
    elif not first:
        return changes
    return changes | {"context_key": key, "context_value": value[:, :, : state.context_tokens]}


def _local(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    new, total = query.shape[2], key.shape[2]
    mask = None
    if new != total:  # query i is token total - new + i of the segment
        mask = torch.ones(new, total, dtype=torch.bool, device=query.device).tril(total - new)
    return local_attention(query, key, value, scale=options.scale, softcap=options.softcap, mask=mask)
