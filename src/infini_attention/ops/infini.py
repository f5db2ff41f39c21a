"""infini_attention(): the one entrance. Checks its arguments, plans the cuts, calls a backend."""

import math
import warnings
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from infini_attention.ops import feature_maps
from infini_attention.ops.copies import MOST_COPIES
from infini_attention.ops.layout import Layout, plan
from infini_attention.ops.local import context_tokens
from infini_attention.ops.normalization import normalized
from infini_attention.ops.options import Inputs, Options, autocast_type, check_choice, unreadable
from infini_attention.ops.parallel import parallel
from infini_attention.ops.reference import reference
from infini_attention.ops.state import MemoryState, state_dtype
from infini_attention.ops.triton.availability import obstacle, weights_obstacle

Backend = Callable[[Inputs, Layout, MemoryState, Options], tuple[Tensor, MemoryState]]

BACKENDS = ("reference", "parallel", "triton")
UPDATE_RULES = ("linear", "delta")
EMPTY_MEMORY = ("local", "gated")


def infini_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    segment_length: int,
    local_query: Tensor | None = None,
    local_key: Tensor | None = None,
    local_value: Tensor | None = None,
    context_key: Tensor | None = None,
    context_value: Tensor | None = None,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    empty_memory: str = "local",
    local_attention: str = "segment",
    sink_tokens: int = 4,
    state: MemoryState | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segment_weights: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    check_finite: bool = False,
) -> tuple[Tensor, MemoryState]:
    """Causal attention of unbounded reach: softmax inside a segment, a compressive memory for all before it.

    Equations (6) to (10) of arXiv 2404.07143. Feeding a sequence in pieces, carrying `state`, is the same
    computation as feeding it at once.

    Args:
        query: (batch, heads, length, head_dim), without position embedding; any floating dtype.
        key: (batch, kv_heads, length, head_dim), without position embedding; heads % kv_heads == 0, and query
            head h reads the memory of key/value head h // (heads // kv_heads).
        value: (batch, kv_heads, length, value_dim).
        gate: (heads,) logits, fp32 (fp64 with fp64 inputs); sigmoid(gate) is the memory's share.
        segment_length: N, tokens a segment.
        local_query: `query` with position embedding, for local attention; default `query`.
        local_key: `key` with position embedding; default `key`.
        local_value: the values that local attention sees; default `value`, and in the paper the same. In
            training they can be equal and reached by other gradients than what memory holds.
        context_key: `key` as later segments see it, where local attention sees outside its own: with the
            position embedding of a place that is segment_length ("sliding") or sink_tokens ("sink") before
            that of `local_key`, so that token j of a segment is N + j - i, or sink_tokens + j - i, from
            token i outside it. Default `local_key`.
        context_value: the values that later segments see; default `local_value`, whose numbers it must have:
            it is there for other gradients. A state keeps `local_value` alone of its open segment, so that
            what later segments see of an earlier call's tokens there has the numbers of that and no gradient.
        update_rule: "linear", equation (8), or "delta", equation (9).
        feature_map: sigma, a name of `ops.feature_maps`.
        normalization: of what memory answers to a query q: "sum", sigma(q) M / (sigma(q) z), equation (7);
            "root", sigma(q) M / sqrt(sigma(q) z); "none", sigma(q) M; "unit", the same with features of
            queries and keys scaled to length 1. The delta rule takes "sum" alone.
        empty_memory: "local": while memory holds nothing, local attention alone is the output;
            "gated": the literal equation (10), in which it is shrunk to its share.
        local_attention: what the softmax of a token in segment t is over. "segment", the paper's: that
            segment so far. "sliding": all of segment t - 1 too, and the memory read is M_{t-2}, of the
            segments before that; so each earlier token is seen or remembered, none both, and inputs of at
            most 2N tokens are ordinary attention. "sink": the row's first `sink_tokens` tokens too, for ever
            (attention sinks, arXiv 2309.17453); memory holds them like all others.
        sink_tokens: at most segment_length; of no meaning but for "sink".
        state: the tokens so far, from an earlier call; None starts afresh.
        padding_mask: (batch, length) bool, True = a real token. Padding is seen by nobody, enters no sum and
            moves no cut; the output there is 0.
        cu_seqlens: (documents + 1,) int32 or int64, from 0 to length: documents packed into a batch of one,
            each with its own memory; `state` then has one row a document.
        segment_weights: (rows, segments): how often each segment touched by this call counts in memory
            (for training). Under the delta rule their dtype decides: with a floating one, what a segment adds
            counts so often, what it takes out once; with an integer one, whole segments stand there so often
            in a row, at least once each. See `ops.copies.copied`.
        scale: of local scores; default head_dim ** -0.5.
        softcap: bounds local scores to softcap * tanh(score / softcap); default none.
        backend: "reference", "parallel", "triton", or "auto", the fastest that is right on the inputs' device
            and with such weights.
        check_finite: raise ValueError when a tensor holds NaN or infinity (costs a pass over the inputs).

    Returns:
        output: (batch, heads, length, value_dim), in query's dtype.
        state: MemoryState after these tokens; differentiable, `detach()` it to cut the graph.

    Raises:
        ValueError: a shape, dtype, name or combination that cannot be right; the text names value and remedy.
            Numbers in `segment_weights` are looked at unless the call is compiled or captured.
    """
    local_query = query if local_query is None else local_query
    local_key = key if local_key is None else local_key
    sigma = memory_map(update_rule, feature_map, normalization)
    check_choice("empty_memory", empty_memory, EMPTY_MEMORY)
    _check_numbers(segment_length, scale, softcap)
    context = context_tokens(local_attention, segment_length=segment_length, sink_tokens=sink_tokens)
    for name, given in (("context_key", context_key), ("context_value", context_value)):
        if given is not None and not context:
            raise ValueError(
                f"{name} is given, and with local_attention 'segment' nothing outside a segment is seen; "
                "leave it out, or choose local_attention='sliding' or 'sink'"
            )
    context_key = local_key if context and context_key is None else context_key
    _check_shapes(query, key, value, gate, local_query, local_key, local_value, context_key, context_value)
    _check_masks(query, padding_mask, cu_seqlens)
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    lengths = [0] * rows
    if state is None:
        state = MemoryState.before(
            key,
            value,
            segment_length=segment_length,
            feature_map=feature_map,
            local_attention=local_attention,
            sink_tokens=sink_tokens,
            rows=rows,
        )
    else:
        _check_state(state, rows, key, value, sigma, segment_length)
        _check_context(state, local_attention, context)
        lengths = state.length.tolist()
    if check_finite:
        tokens = {
            "query": query,
            "key": key,
            "value": value,
            "local_query": local_query,
            "local_key": local_key,
        }
        others = {"local_value": local_value, "context_key": context_key, "context_value": context_value}
        tokens |= {name: x for name, x in others.items() if x is not None}
        _check_finite({name: _without_padding(x, padding_mask) for name, x in tokens.items()})
        fields = {name: x for name, x in state.tensors().items() if name != "length"}
        _check_finite({"gate": gate} | fields)

    layout = plan(
        query.shape[0],
        query.shape[2],
        segment_length=segment_length,
        lengths=lengths,
        device=query.device,
        padding_mask=padding_mask,
        cu_seqlens=cu_seqlens,
    )
    if segment_weights is not None:
        segment_weights = checked_weights(segment_weights, layout, state.memory, update_rule)
    options = Options(
        segment_length=segment_length,
        update_rule=update_rule,
        feature_map=sigma,
        normalization=normalization,
        empty_memory=empty_memory,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
    )
    inputs = Inputs(
        query,
        key,
        value,
        local_query,
        local_key,
        local_value,
        context_key,
        context_value,
        gate,
        segment_weights,
    )
    width = max(query.shape[-1], *state.memory.shape[-2:])
    with torch.autocast(autocast_type(query.device), enabled=False):
        return _backend(backend, inputs, width, normalization)(inputs, layout, state, options)


def memory_map(update_rule: str, feature_map: str, normalization: str) -> feature_maps.FeatureMap:
    """The map by which queries and keys reach such a memory; ValueError unless the three go together."""
    sigma = normalized(feature_maps.get(feature_map), normalization)
    check_choice("update_rule", update_rule, UPDATE_RULES)
    if update_rule == "delta" and not sigma.nonnegative:
        raise ValueError(
            f"feature_map {feature_map!r} can be negative, and the delta rule diverges with it; "
            "choose a non-negative map such as 'elu1', or update_rule='linear'"
        )
    if update_rule == "delta" and normalization != "sum":
        raise ValueError(
            f"normalization is {normalization!r}, and the delta rule diverges with it: a segment would take "
            "out more than there is; choose normalization='sum', or update_rule='linear'"
        )
    if normalization == "root" and not sigma.nonnegative:
        raise ValueError(
            f"feature_map {feature_map!r} can be negative, and normalization 'root' takes the root of a sum "
            "of its features; choose a non-negative map such as 'elu1', or another normalization"
        )
    return sigma


def choose_backend(
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    normalization: str = "sum",
) -> tuple[str, str]:
    """The backend that "auto" takes for such tensors on `device`, and the reason in words."""
    reason = obstacle(torch.device(device), dtype, head_dim, normalization)
    if reason is None:
        return "triton", "fused kernels for NVIDIA GPUs"
    return "parallel", f"all segments at once in torch, because {reason}"


def _backend(name: str, inputs: Inputs, width: int, normalization: str) -> Backend:
    check_choice("backend", name, ("auto", *BACKENDS))
    query, reason = inputs.query, None
    if name in ("auto", "triton"):
        reason = obstacle(query.device, query.dtype, width, normalization)
        reason = reason or weights_obstacle(inputs.segment_weights)
    if name == "triton" and reason is not None:
        raise ValueError(f"backend is 'triton', but {reason}; use backend='auto'")
    if name == "auto" and reason is not None:
        if query.is_cuda:
            _warn_once(reason)
        name = "parallel"
    return {"reference": reference, "parallel": parallel}.get(name, _triton)


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"infini_attention takes its slower torch path, because {reason}", stacklevel=4)


def _triton(
    inputs: Inputs, layout: Layout, state: MemoryState, options: Options
) -> tuple[Tensor, MemoryState]:
    from infini_attention.ops.triton.backend import fused

    return fused(inputs, layout, state, options)


def _check_shapes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    local_query: Tensor,
    local_key: Tensor,
    local_value: Tensor | None,
    context_key: Tensor | None,
    context_value: Tensor | None,
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; give (batch, heads, length, head_dim)")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}; convert it to a floating dtype")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}; "
                "convert them to one dtype and device"
            )
    batch, heads, length, head_dim = query.shape
    kv_heads = key.shape[1]
    if key.shape != (batch, kv_heads, length, head_dim):
        raise ValueError(
            f"key has shape {tuple(key.shape)}; with query {tuple(query.shape)} it must be "
            f"({batch}, kv_heads, {length}, {head_dim})"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value has shape {tuple(value.shape)}; its first three sizes must be those of key, "
            f"{tuple(key.shape[:3])}"
        )
    if batch == 0:
        raise ValueError(f"query has shape {tuple(query.shape)}, a batch of no rows; leave out the call")
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"query has {heads} heads and key {kv_heads}; heads must be a multiple of kv_heads")
    encoded = [("local_query", local_query, query), ("local_key", local_key, key)]
    encoded += [] if local_value is None else [("local_value", local_value, value)]
    encoded += [] if context_key is None else [("context_key", context_key, key)]
    encoded += [] if context_value is None else [("context_value", context_value, value)]
    for name, local, plain in encoded:
        if local.shape != plain.shape or local.dtype != plain.dtype or local.device != plain.device:
            raise ValueError(
                f"{name} is {tuple(local.shape)} {local.dtype} on {local.device}; it must be like "
                f"{name.split('_')[1]}, {tuple(plain.shape)} {plain.dtype} on {plain.device}"
            )
    if gate.shape != (heads,) or gate.device != query.device:
        raise ValueError(
            f"gate is {tuple(gate.shape)} on {gate.device}; "
            f"give one logit a query head, ({heads},) on {query.device}"
        )
    if gate.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gate has dtype {gate.dtype}, in which it stops moving; keep it fp32: gate.float()")


def _check_numbers(segment_length: int, scale: float | None, softcap: float | None) -> None:
    if isinstance(segment_length, bool) or not isinstance(segment_length, int) or segment_length < 1:
        raise ValueError(f"segment_length is {segment_length!r}; give a whole number of at least 1")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; give a finite number, or None for head_dim ** -0.5")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap is {softcap}; give a positive number, or None for no cap")


def _check_masks(query: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    batch, _, length, _ = query.shape
    if padding_mask is not None:
        if padding_mask.dtype != torch.bool or padding_mask.shape != (batch, length):
            raise ValueError(
                f"padding_mask is {tuple(padding_mask.shape)} {padding_mask.dtype}; give ({batch}, {length}) "
                "torch.bool with True at real tokens"
            )
        if cu_seqlens is not None:
            raise ValueError(
                "padding_mask and cu_seqlens contradict each other; packed documents are unpadded: drop one"
            )
    if cu_seqlens is None:
        return
    if batch != 1:
        raise ValueError(
            f"cu_seqlens packs documents into a batch of 1, and query's batch is {batch}; reshape it to 1"
        )
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "give (documents + 1,) int32 or int64"
        )
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != length or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"cu_seqlens is {ends}; it must rise from 0 to the length, {length}")


def _check_state(
    state: MemoryState,
    rows: int,
    key: Tensor,
    value: Tensor,
    sigma: feature_maps.FeatureMap,
    segment_length: int,
) -> None:
    if state.segment_length != segment_length:
        raise ValueError(
            f"state was made with segment_length {state.segment_length}, this call has {segment_length}; "
            "use the same"
        )
    feature_dim = sigma.feature_dim(key.shape[-1])
    expected = (rows, key.shape[1], feature_dim, value.shape[-1])
    if state.memory.shape != expected:
        raise ValueError(
            f"state.memory has shape {tuple(state.memory.shape)}; these inputs need {expected} "
            "(rows, kv_heads, feature_dim, value_dim): use a state of the same model, batch and feature map"
        )
    dtype = state_dtype(key.dtype)
    if state.memory.dtype != dtype or state.normalizer.dtype != dtype:
        raise ValueError(
            f"state.memory has dtype {state.memory.dtype}; with {key.dtype} inputs it must be {dtype}"
        )
    if state.memory.device != key.device:
        raise ValueError(
            f"state is on {state.memory.device}, inputs on {key.device}; "
            f"move it: state.to({str(key.device)!r})"
        )
    if state.local_key.dtype != key.dtype:
        raise ValueError(
            f"state's open segment is {state.local_key.dtype}, inputs are {key.dtype}; convert the inputs"
        )


def _check_context(state: MemoryState, local_attention: str, context: int) -> None:
    given = state.local_attention, state.context_tokens
    if given != (local_attention, context):
        raise ValueError(
            f"state was made with local_attention {given[0]!r} and {given[1]} tokens outside the segment, "
            f"this call has {local_attention!r} and {context}; use the same"
        )


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise ValueError(
                f"{name} holds {bad} values that are NaN or infinite; look for where they were made"
            )


def _without_padding(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Tokens with zeros in place of padding, which nobody sees."""
    return x if padding_mask is None else x.masked_fill(~padding_mask[:, None, :, None], 0)


def checked_weights(weights: Tensor, layout: Layout, memory: Tensor, update_rule: str) -> Tensor:
    """Segment weights in the dtype of `memory` and on its device; copies under the delta rule stay int64.

    Raises ValueError for a wrong shape, and for numbers that cannot be right.
    """
    expected = (layout.rows, layout.columns)
    if weights.shape != expected:
        raise ValueError(
            f"segment_weights has shape {tuple(weights.shape)}; "
            f"this call touches (rows, segments) = {expected}"
        )
    if weights.dtype == torch.bool or weights.is_complex():
        raise ValueError(
            f"segment_weights are {weights.dtype}; give how often each segment counts, in a floating or an "
            "integer dtype"
        )
    if update_rule == "delta" and not weights.is_floating_point():
        return _checked_copies(weights.to(memory.device, torch.int64), layout)
    weights = weights.to(memory.device, memory.dtype)
    if not unreadable(weights) and not bool(((weights >= 0) & torch.isfinite(weights)).all()):
        raise ValueError(
            f"segment_weights has minimum {weights.min().item()}; weights are finite and at least 0"
        )
    return weights


def _checked_copies(copies: Tensor, layout: Layout) -> Tensor:
    if layout.head() is not None or layout.tail() is not None:
        raise ValueError(
            "segment_weights are whole numbers, copies of segments under the delta rule, and a segment is "
            "not whole in this call; give whole segments, or weights of a floating dtype"
        )
    if unreadable(copies):
        return copies
    touched = torch.arange(layout.columns) < torch.tensor(layout.segments)[:, None]
    made = copies[touched.to(copies.device)]
    if not bool(((made >= 1) & (made <= MOST_COPIES)).all()):
        raise ValueError(
            f"segment_weights are from {made.min().item()} to {made.max().item()}; copies of a segment "
            f"are at least 1 and at most {MOST_COPIES:,}"
        )
    return copies
