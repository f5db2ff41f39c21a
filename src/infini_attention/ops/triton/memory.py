"""The memory as two custom ops over the kernels: the write side and the read side, with their gradients.

`segment_states` makes the state before every segment out of keys and values; `mix` reads it and mixes it
with local attention's output. Both have fakes, so `torch.compile(fullgraph=True)` sees through them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from infini_attention.ops.triton import kernels

FUSED_MAPS = ("elu1", "exp", "relu2", "softplus", "identity")
FILL = 264  # programs that fill the largest of today's GPUs twice over


class Tile(NamedTuple):
    """How a kernel is cut: tokens a tile, warps a program, stages of the load pipeline."""

    tokens: int
    warps: int
    stages: int


TILES = {
    "sums": Tile(64, 8, 3),
    "reciprocal": Tile(64, 4, 1),
    "mix": Tile(64, 4, 1),
    "mix_backward": Tile(64, 8, 1),
    "removal_backward": Tile(64, 8, 1),
    "write_backward": Tile(64, 8, 1),
}
SCAN_BLOCK, SCAN_WARPS = 512, 4  # elements of the state a program of the linear scan carries
DELTA_COLUMNS, DELTA_WARPS = 16, 8  # columns of M a program of the delta scan carries

States = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("infini_attention::segment_states", mutates_args=())
def segment_states(
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    segments: list[int],
    feature_map: str,
    delta: bool,
) -> States:
    """The write side, equations (8) and (9), for whole segments that stand row after row.

    `key` (runs, kv_heads, N, F) and `value` (runs, kv_heads, N, V) with a contiguous last axis; `weights`
    (runs,) fp32 or None; `memory` (rows, kv_heads, F, V) and `normalizer` (rows, kv_heads, F) fp32: the state
    before the first segment; `segments`: how many of the runs belong to each row.

    Returns, all fp32: memory and normalizer before each run, (runs, kv_heads, ...); after each row's last one,
    (rows, kv_heads, ...); and, for the delta rule, A of each run (runs, kv_heads, F, F) and 1 / (sigma(K) z)
    (runs, kv_heads, N), kept for the gradient; empty for the linear rule. `weights` get no gradient.
    """
    sums, totals = _sums(key, value, feature_map, weights=weights)
    offsets = _offsets(tuple(segments), key.device)
    before_normalizer, last_normalizer = _scan(totals, normalizer, offsets)
    removal, reciprocal = key.new_empty(0, dtype=torch.float32), key.new_empty(0, dtype=torch.float32)
    if delta:
        reciprocal = _reciprocal(key, before_normalizer, feature_map)
        removal, _ = _sums(key, key, feature_map, value_map=feature_map, value_scale=reciprocal)
        before_memory, last_memory = _delta_scan(sums, removal, memory, offsets)
    else:
        before_memory, last_memory = _scan(sums, memory, offsets)
    return before_memory, before_normalizer, last_memory, last_normalizer, removal, reciprocal


@segment_states.register_fake
def _(
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    segments: list[int],
    feature_map: str,
    delta: bool,
) -> States:
    runs, heads, tokens, features = key.shape
    return (
        memory.new_empty(runs, heads, features, value.shape[-1]),
        memory.new_empty(runs, heads, features),
        torch.empty_like(memory),
        torch.empty_like(normalizer),
        memory.new_empty((runs, heads, features, features) if delta else (0,)),
        memory.new_empty((runs, heads, tokens) if delta else (0,)),
    )


@torch.library.custom_op("infini_attention::segment_states_backward", mutates_args=())
def segment_states_backward(
    grad_before_memory: Tensor,
    grad_before_normalizer: Tensor,
    grad_last_memory: Tensor,
    grad_last_normalizer: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    before_memory: Tensor,
    before_normalizer: Tensor,
    removal: Tensor,
    reciprocal: Tensor,
    segments: list[int],
    feature_map: str,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of key, value, memory and normalizer of `segment_states`; the scans run backwards."""
    offsets = _offsets(tuple(segments), key.device)
    denominator_grad = grad_removal = reciprocal
    if delta:
        grad_sums, grad_memory = _delta_scan(
            grad_before_memory, removal, grad_last_memory, offsets, backwards=True
        )
        grad_removal = grad_sums @ before_memory.transpose(-1, -2)
        grad_removal = -(grad_removal + grad_removal.transpose(-1, -2))
        denominator_grad = _removal_backward(key, reciprocal, grad_removal, feature_map)
        _, more = _sums(key, None, feature_map, total_scale=denominator_grad)
        grad_before_normalizer = grad_before_normalizer + more
    else:
        grad_sums, grad_memory = _scan(grad_before_memory, grad_last_memory, offsets, backwards=True)
    grad_totals, grad_normalizer = _scan(
        grad_before_normalizer, grad_last_normalizer, offsets, backwards=True
    )
    grad_key, grad_value = _write_backward(
        key,
        value,
        weights,
        before_normalizer,
        reciprocal,
        denominator_grad,
        grad_sums,
        grad_totals,
        grad_removal,
        feature_map,
        delta,
    )
    return grad_key, grad_value, grad_memory, grad_normalizer


@segment_states_backward.register_fake
def _(
    grad_before_memory: Tensor,
    grad_before_normalizer: Tensor,
    grad_last_memory: Tensor,
    grad_last_normalizer: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    before_memory: Tensor,
    before_normalizer: Tensor,
    removal: Tensor,
    reciprocal: Tensor,
    segments: list[int],
    feature_map: str,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(key),
        torch.empty_like(value),
        torch.empty_like(grad_last_memory),
        torch.empty_like(grad_last_normalizer),
    )


def _keep_for_states(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    key, value, weights, _, _, segments, feature_map, delta = inputs
    before_memory, before_normalizer, last_memory, last_normalizer, removal, reciprocal = output
    ctx.save_for_backward(key, value, weights, before_memory, before_normalizer, removal, reciprocal)
    ctx.settings = segments, feature_map, delta
    ctx.mark_non_differentiable(removal, reciprocal)
    ctx.set_materialize_grads(False)
    ctx.like = last_memory, last_normalizer


def _states_gradients(ctx, grad_memory, grad_normalizer, grad_last, grad_last_normalizer, *_):  # type: ignore[no-untyped-def]
    key, value, weights, before_memory, before_normalizer, removal, reciprocal = ctx.saved_tensors
    like = before_memory, before_normalizer, *ctx.like
    given = grad_memory, grad_normalizer, grad_last, grad_last_normalizer
    gradients = [
        torch.zeros_like(tensor) if gradient is None else gradient.contiguous()
        for gradient, tensor in zip(given, like, strict=True)
    ]
    grad_key, grad_value, grad_start, grad_start_normalizer = segment_states_backward(
        *gradients, key, value, weights, before_memory, before_normalizer, removal, reciprocal, *ctx.settings
    )
    return grad_key, grad_value, None, grad_start, grad_start_normalizer, None, None, None


segment_states.register_autograd(_states_gradients, setup_context=_keep_for_states)


@torch.library.custom_op("infini_attention::mix", mutates_args=())
def mix(
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    feature_map: str,
    gated: bool,
) -> Tensor:
    """The read side, equations (7) and (10): sigmoid(gate) of what memory answers, the rest of `local`.

    `query` (runs, heads, N, F) and `local` (runs, heads, N, V) with a contiguous last axis; `gate` (heads,)
    fp32; `memory` (runs, kv_heads, F, V) and `normalizer` (runs, kv_heads, F) fp32: the state before each run.
    An empty memory has no share unless `gated`. Returns (runs, heads, N, V) in local's dtype.
    """
    output = torch.empty_like(local)
    _mix(query, local, gate, memory, normalizer, output, feature_map, gated)
    return output


@mix.register_fake
def _(
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    feature_map: str,
    gated: bool,
) -> Tensor:
    return torch.empty_like(local)


@torch.library.custom_op("infini_attention::mix_", mutates_args=("local",))
def mix_(
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    feature_map: str,
    gated: bool,
) -> None:
    """`mix`, written over `local`; for inference, where nobody needs local attention's output afterwards."""
    _mix(query, local, gate, memory, normalizer, local, feature_map, gated)


@torch.library.custom_op("infini_attention::mix_backward", mutates_args=())
def mix_backward(
    grad_output: Tensor,
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    feature_map: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, local, gate, memory and normalizer of `mix`."""
    runs, heads, tokens, features = query.shape
    kv_heads, values = memory.shape[1], local.shape[-1]
    block_f, blocks_f = _blocks(features)
    block_v, blocks_v = _blocks(values)
    block_n, launch = _tile("mix_backward", tokens)
    tiles = triton.cdiv(tokens, block_n)
    grad_query, grad_local = torch.empty_like(query), torch.empty_like(local)
    grad_share = gate.new_empty(runs, heads, tiles)
    value_scale = gate.new_empty(runs, heads, tokens)
    denominator_grad = gate.new_empty(runs, heads, tokens)
    operand, precision = _operand(query.dtype)
    kernels.mix_backward_kernel[(runs * heads * tiles,)](
        query,
        local,
        gate,
        memory,
        normalizer,
        grad_output,
        grad_query,
        grad_local,
        grad_share,
        value_scale,
        denominator_grad,
        *query.stride()[:3],
        *local.stride()[:3],
        *grad_output.stride()[:3],
        *grad_query.stride()[:3],
        *grad_local.stride()[:3],
        tokens,
        features,
        values,
        heads,
        GROUP=heads // kv_heads,
        MAP=feature_map,
        GATED=gated,
        OPERAND=operand,
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        BLOCKS_F=blocks_f,
        BLOCKS_V=blocks_v,
        **launch,
    )
    grad_memory, grad_normalizer = _sums(
        query,
        grad_output,
        feature_map,
        kv_heads=kv_heads,
        value_scale=value_scale,
        total_scale=denominator_grad,
    )
    share = torch.sigmoid(gate)
    grad_gate = grad_share.sum(dim=(0, 2)) * share * (1 - share)
    return grad_query, grad_local, grad_gate, grad_memory, grad_normalizer


@mix_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    feature_map: str,
    gated: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(query),
        torch.empty_like(local),
        torch.empty_like(gate),
        torch.empty_like(memory),
        torch.empty_like(normalizer),
    )


def _keep_for_mix(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, feature_map, gated = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = feature_map, gated


def _mix_gradients(ctx, grad_output):  # type: ignore[no-untyped-def]
    if grad_output.stride(-1) != 1:
        grad_output = grad_output.contiguous()
    return *mix_backward(grad_output, *ctx.saved_tensors, *ctx.settings), None, None


mix.register_autograd(_mix_gradients, setup_context=_keep_for_mix)


def _operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What dtype and precision products are taken in: fp16 features may overflow, so they go as tf32."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else "tf32x3"


def _blocks(width: int) -> tuple[int, int]:
    """Block size and number of blocks that cover a head dimension."""
    block = min(128, max(16, triton.next_power_of_2(width)))
    return block, triton.cdiv(width, block)


def _tile(kernel: str, tokens: int) -> tuple[int, dict[str, int]]:
    """Tokens a tile of `kernel` takes from segments of `tokens`, and its launch options."""
    tile = TILES[kernel]
    block_n = min(tile.tokens, max(16, triton.next_power_of_2(tokens)))
    return block_n, {"num_warps": tile.warps, "num_stages": tile.stages}


@lru_cache(maxsize=64)
def _offsets(segments: tuple[int, ...], device: torch.device) -> Tensor:
    """(rows + 1,) int32: where each row's runs begin."""
    return torch.tensor((0, *segments), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _sums(
    key: Tensor,
    value: Tensor | None,
    feature_map: str,
    *,
    value_map: str = "identity",
    kv_heads: int | None = None,
    weights: Tensor | None = None,
    value_scale: Tensor | None = None,
    total_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum sigma(k)^T (a v) and sum b sigma(k) of each run; see `kernels.sums_kernel`.

    Without `value` only the second, without a use for the second it costs next to nothing.
    """
    runs, heads, tokens, features = key.shape
    kv_heads = heads if kv_heads is None else kv_heads
    outer = value is not None
    value = key if value is None else value
    values = value.shape[-1]
    block_f, blocks_f = _blocks(features)
    block_v, blocks_v = _blocks(values) if outer else (16, 1)
    block_n, launch = _tile("sums", tokens)
    splits = FILL // (runs * kv_heads * blocks_f * blocks_v)
    splits = max(1, min(splits, triton.cdiv(tokens, block_n)))
    memory = key.new_empty((runs, kv_heads, splits, features, values) if outer else (0,), dtype=torch.float32)
    normalizer = key.new_empty(runs, kv_heads, splits, features, dtype=torch.float32)
    operand, precision = _operand(key.dtype)
    kernels.sums_kernel[(runs * kv_heads * splits, blocks_f, blocks_v)](
        key,
        value,
        value_scale,
        total_scale,
        weights,
        memory,
        normalizer,
        *key.stride()[:3],
        *value.stride()[:3],
        tokens,
        features,
        values,
        kv_heads,
        splits,
        GROUP=heads // kv_heads,
        MAP_X=feature_map,
        MAP_Y=value_map,
        SCALED_Y=value_scale is not None,
        SCALED_X=total_scale is not None,
        WEIGHTED=weights is not None,
        OUTER=outer,
        TOTAL=True,
        OPERAND=operand,
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        **launch,
    )
    if splits == 1:
        return memory.squeeze(2) if outer else memory, normalizer.squeeze(2)
    return memory.sum(dim=2) if outer else memory, normalizer.sum(dim=2)


def _reciprocal(key: Tensor, normalizer: Tensor, feature_map: str) -> Tensor:
    runs, heads, tokens, features = key.shape
    block_n, launch = _tile("reciprocal", tokens)
    reciprocal = normalizer.new_empty(runs, heads, tokens)
    kernels.reciprocal_kernel[(runs * heads * triton.cdiv(tokens, block_n),)](
        key,
        normalizer,
        reciprocal,
        *key.stride()[:3],
        tokens,
        features,
        heads,
        MAP=feature_map,
        OPERAND=_operand(key.dtype)[0],
        BLOCK_N=block_n,
        BLOCK_F=max(16, triton.next_power_of_2(features)),
        **launch,
    )
    return reciprocal


def _scan(sums: Tensor, start: Tensor, offsets: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Exclusive prefix sums over each row's runs, and the total; see `kernels.scan_kernel`."""
    rows, heads = start.shape[:2]
    elements = start[0, 0].numel()
    before, last = torch.empty_like(sums), torch.empty_like(start, memory_format=torch.contiguous_format)
    block = min(SCAN_BLOCK, max(16, triton.next_power_of_2(elements)))
    kernels.scan_kernel[(rows * heads, triton.cdiv(elements, block))](
        sums,
        start.contiguous(),
        before,
        last,
        offsets,
        heads,
        elements,
        REVERSED=backwards,
        BLOCK=block,
        num_warps=SCAN_WARPS,
    )
    return before, last


def _delta_scan(
    sums: Tensor, removal: Tensor, start: Tensor, offsets: Tensor, *, backwards: bool = False
) -> tuple[Tensor, Tensor]:
    """The affine scan of the delta rule; see `kernels.delta_scan_kernel`."""
    rows, heads, features, values = start.shape
    block_f, halves = _blocks(features)
    before, last = torch.empty_like(sums), torch.empty_like(start, memory_format=torch.contiguous_format)
    kernels.delta_scan_kernel[(rows * heads, triton.cdiv(values, DELTA_COLUMNS))](
        sums,
        removal,
        start.contiguous(),
        before,
        last,
        offsets,
        heads,
        features,
        values,
        REVERSED=backwards,
        HALVES=halves,
        PRECISION="tf32x3",
        BLOCK_F=block_f,
        BLOCK_V=DELTA_COLUMNS,
        num_warps=DELTA_WARPS,
    )
    return before, last


def _mix(
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    output: Tensor,
    feature_map: str,
    gated: bool,
) -> None:
    runs, heads, tokens, features = query.shape
    values = local.shape[-1]
    block_f, blocks_f = _blocks(features)
    block_v, blocks_v = _blocks(values)
    block_n, launch = _tile("mix", tokens)
    operand, precision = _operand(query.dtype)
    kernels.mix_kernel[(runs * heads * triton.cdiv(tokens, block_n), blocks_v)](
        query,
        local,
        gate,
        memory,
        normalizer,
        output,
        *query.stride()[:3],
        *local.stride()[:3],
        *output.stride()[:3],
        tokens,
        features,
        values,
        heads,
        GROUP=heads // memory.shape[1],
        MAP=feature_map,
        GATED=gated,
        OPERAND=operand,
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        BLOCKS_F=blocks_f,
        **launch,
    )


def _removal_backward(key: Tensor, reciprocal: Tensor, grad_removal: Tensor, feature_map: str) -> Tensor:
    runs, heads, tokens, features = key.shape
    block_f, blocks_f = _blocks(features)
    block_n, launch = _tile("removal_backward", tokens)
    operand, precision = _operand(key.dtype)
    denominator_grad = torch.empty_like(reciprocal)
    kernels.removal_backward_kernel[(runs * heads * triton.cdiv(tokens, block_n),)](
        key,
        reciprocal,
        grad_removal,
        denominator_grad,
        *key.stride()[:3],
        tokens,
        features,
        heads,
        MAP=feature_map,
        OPERAND=operand,
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCKS_F=blocks_f,
        **launch,
    )
    return denominator_grad


def _write_backward(
    key: Tensor,
    value: Tensor,
    weights: Tensor | None,
    normalizer: Tensor,
    reciprocal: Tensor,
    denominator_grad: Tensor,
    grad_sums: Tensor,
    grad_totals: Tensor,
    grad_removal: Tensor,
    feature_map: str,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    runs, heads, tokens, features = key.shape
    values = value.shape[-1]
    block_f, blocks_f = _blocks(features)
    block_v, blocks_v = _blocks(values)
    block_n, launch = _tile("write_backward", tokens)
    operand, precision = _operand(key.dtype)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    kernels.write_backward_kernel[(runs * heads * triton.cdiv(tokens, block_n),)](
        key,
        value,
        weights,
        normalizer,
        reciprocal,
        denominator_grad,
        grad_sums,
        grad_totals,
        grad_removal,
        grad_key,
        grad_value,
        *key.stride()[:3],
        *value.stride()[:3],
        *grad_key.stride()[:3],
        *grad_value.stride()[:3],
        tokens,
        features,
        values,
        heads,
        MAP=feature_map,
        WEIGHTED=weights is not None,
        DELTA=delta,
        OPERAND=operand,
        PRECISION=precision,
        BLOCK_N=block_n,
        BLOCK_F=block_f,
        BLOCK_V=block_v,
        BLOCKS_F=blocks_f,
        BLOCKS_V=blocks_v,
        **launch,
    )
    return grad_key, grad_value
