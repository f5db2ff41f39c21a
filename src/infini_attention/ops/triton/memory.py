"""The memory as custom ops over the kernels: the write side and the read side, with their gradients.

`segment_states` makes the state before every segment out of keys and values; `mix` reads it and mixes it
with local attention's output. All are operators with fakes, so `torch.compile(fullgraph=True)` works.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from infini_attention.ops.triton import kernels, wide
from infini_attention.ops.triton.operator import operator

FUSED_MAPS = ("elu1", "exp", "relu2", "softplus", "identity")
MAX_BLOCK = (
    128  # the widest block of a head dimension that fits beside its tiles, in bf16, on data-centre GPUs
)
FILL = 132  # programs below which runs are split: one a multiprocessor of the largest of today's GPUs


class Tile(NamedTuple):
    """How a kernel is cut: tokens a tile, warps a program, stages of the load pipeline."""

    tokens: int
    warps: int
    stages: int


TILES = {  # the fastest of those tried on an H100, N = 2048, heads of 128
    "sums": Tile(64, 8, 3),
    "removal": Tile(64, 4, 3),
    "mix": Tile(64, 4, 3),
    "mix_backward": Tile(64, 8, 3),
    "removal_backward": Tile(64, 4, 3),
    "write_backward": Tile(64, 4, 2),
    "write_backward_delta": Tile(64, 8, 2),
    "wide": Tile(32, 8, 1),
}
SMALL_TILE = Tile(32, 4, 1)  # where a program has less shared memory than the tiles above were chosen for
HOPPER, AMPERE = 220_000, 160_000  # bytes of it at least, on data-centre GPUs; others have 101,376
SCAN_BLOCK, SCAN_WARPS = 512, 4  # elements of the state a program of the linear scan carries
DELTA_COLUMNS, DELTA_WARPS, DELTA_STAGES = 16, 8, 2  # columns of M a program of the delta scan carries

States = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@operator
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

    Returns, all fp32: memory and normalizer before each run, (runs, kv_heads, ...); after each row's last
    one, (rows, kv_heads, ...); and, for the delta rule, A of each run (runs, kv_heads, F, F) and
    1 / (sigma(K) z) (runs, kv_heads, N), kept for the gradient; empty for the linear rule. `weights` get no
    gradient.
    """
    sums, totals = _sums(key, value, feature_map, weights=weights)
    offsets = _offsets(segments, key.device)
    before_normalizer, last_normalizer = _scan(totals, normalizer, offsets)
    removal, reciprocal = memory.new_empty(0), memory.new_empty(0)
    if delta:
        removal, reciprocal = _removal(key, before_normalizer, feature_map)
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


@operator
def segment_states_backward(
    more_grad_value: Tensor | None,
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
    """Gradients of key, value, memory and normalizer of `segment_states`; the scans run backwards.

    `more_grad_value` is added to the values' gradient.
    """
    offsets = _offsets(segments, key.device)
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
        more_grad_value,
        feature_map,
        delta,
    )
    return grad_key, grad_value, grad_memory, grad_normalizer


@segment_states_backward.register_fake
def _(
    more_grad_value: Tensor | None,
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


class SegmentStates(torch.autograd.Function):
    """`segment_states` with its gradient, and the values handed through.

    Whoever takes the values from here gives their gradient back to here, where the kernel adds it to the
    memory's: a pass over the values less. Returns (values, *the first four of `segment_states`).
    """

    @staticmethod
    def forward(ctx, key, value, weights, memory, normalizer, segments, feature_map, delta):
        """See `segment_states`."""
        *states, removal, reciprocal = segment_states(
            key, value, weights, memory, normalizer, segments, feature_map, delta
        )
        before_memory, before_normalizer, *_ = states
        ctx.save_for_backward(
            key, value, weights, memory, before_memory, before_normalizer, removal, reciprocal
        )
        ctx.settings = segments, feature_map, delta
        ctx.set_materialize_grads(False)
        return value.view_as(value), *states

    @staticmethod
    def backward(ctx, grad_value, *gradients):
        """Gradients of key, value, memory and normalizer."""
        key, value, weights, memory, before_memory, before_normalizer, removal, reciprocal = ctx.saved_tensors
        segments, feature_map, delta = ctx.settings
        shapes = before_memory, before_normalizer, memory, memory[..., 0]
        before, before_z, last, last_z = (
            torch.zeros_like(tensor) if gradient is None else gradient.contiguous()
            for gradient, tensor in zip(gradients, shapes, strict=True)
        )
        grad_value = None if grad_value is None else strided(grad_value)
        grad_key, grad_value, grad_memory, grad_normalizer = segment_states_backward(
            grad_value,
            before,
            before_z,
            last,
            last_z,
            key,
            value,
            weights,
            before_memory,
            before_normalizer,
            removal,
            reciprocal,
            segments,
            feature_map,
            delta,
        )
        return grad_key, grad_value, None, grad_memory, grad_normalizer, None, None, None


@operator
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
    fp32; `memory` (runs, kv_heads, F, V) and `normalizer` (runs, kv_heads, F) fp32: the state before each
    run. An empty memory has no share unless `gated`. Returns (runs, heads, N, V) in local's dtype.
    """
    return mix_into(query, local, gate, memory, normalizer, torch.empty_like(local), feature_map, gated)


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


def mix_into(
    query: Tensor,
    local: Tensor,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    output: Tensor,
    feature_map: str,
    gated: bool,
) -> Tensor:
    """`mix`, written to `output`, which may be `local`; returns `output`."""
    runs, heads, tokens, features = query.shape
    kv_heads, values = memory.shape[1], local.shape[-1]
    cut = _cut("mix", query, features, values, runs * kv_heads)
    kernels.mix_kernel[(cut.programs, cut.blocks_v)](
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
        kv_heads,
        cut.splits,
        GROUP=heads // kv_heads,
        MAP=feature_map,
        GATED=gated,
        BLOCK_V=cut.block_v,
        BLOCKS_F=cut.blocks_f,
        **cut.options,
    )
    return output


@operator
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
    is_wide = _is_wide(query, features, values)
    grad_query, grad_local = torch.empty_like(query), torch.empty_like(local)
    grad_share, scale, denominator_grad = gate.new_empty(3, runs, heads, tokens).unbind()
    tensors = (
        query,
        local,
        gate,
        memory,
        normalizer,
        grad_output,
        grad_query,
        grad_local,
        grad_share,
        scale,
        denominator_grad,
        *query.stride()[:3],
        *local.stride()[:3],
        *grad_output.stride()[:3],
        *grad_query.stride()[:3],
        *grad_local.stride()[:3],
    )
    cut = _cut("wide" if is_wide else "mix_backward", query, features, values, runs * kv_heads)
    settings = {"GROUP": heads // kv_heads, "MAP": feature_map, "GATED": gated}
    if is_wide:
        options = _wide_options(cut)
        tiles = -(-tokens // options["BLOCK_N"])
        wide.wide_mix_backward_kernel[(runs * heads * tiles,)](
            *tensors, tokens, features, values, heads, **settings, **options
        )
    else:
        kernels.mix_backward_kernel[(cut.programs,)](
            *tensors,
            tokens,
            features,
            values,
            kv_heads,
            cut.splits,
            BLOCK_V=cut.block_v,
            **settings,
            **cut.options,
        )
    grad_memory, grad_normalizer = _sums(
        query, grad_output, feature_map, kv_heads=kv_heads, scale=scale, total_scale=denominator_grad
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


class Mix(torch.autograd.Function):
    """`mix` with its gradient."""

    @staticmethod
    def forward(ctx, *inputs):
        """See `mix`."""
        *tensors, feature_map, gated = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = feature_map, gated
        return mix(*inputs)

    @staticmethod
    def backward(ctx, grad_output):
        """Gradients of query, local, gate, memory and normalizer."""
        return *mix_backward(strided(grad_output), *ctx.saved_tensors, *ctx.settings), None, None


def strided(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis and offsets within a run that fit 32 bits."""
    return x if x.stride(-1) == 1 and x.shape[2] * x.stride(2) < 2**31 else x.contiguous()


class Cut(NamedTuple):
    """The launch of one kernel: programs on axis 0, splits among them, blocks of the head dimensions."""

    programs: int
    splits: int
    blocks_f: int
    blocks_v: int
    block_v: int
    options: dict[str, Any]  # the constants it is compiled for


def _cut(kernel: str, like: Tensor, features: int, values: int, pairs: int) -> Cut:
    """How `kernel` is laid over `pairs` of run and head, for tokens like `like`, (runs, heads, N, dim).

    Tiles of 4 bytes an element, and heads of several blocks, fill shared memory sooner: the first are
    shorter and neither is pipelined.
    """
    tokens, narrow = like.shape[2], like.dtype == torch.bfloat16
    tile = TILES[kernel] if _shared_memory(like.device) >= HOPPER else SMALL_TILE
    pipelined = narrow and not _is_wide(like, features, values)
    block_n = min(tile.tokens if narrow else 32, _power(tokens))
    tiles = -(-tokens // block_n)
    splits = -(-tiles // -(-tiles // max(1, min(FILL // pairs, tiles))))  # no split is left without tiles
    operand, precision = _operand(like.dtype)
    options = {
        "OPERAND": operand,
        "PRECISION": precision,
        "FULL": tokens % (block_n * splits) == 0
        and features == _block(features, like)
        and values == _block(values, like),
        "BLOCK_N": block_n,
        "BLOCK_F": _block(features, like),
        "STAGES": tile.stages if pipelined else 1,
        "num_warps": tile.warps,
    }
    block_f, block_v = options["BLOCK_F"], _block(values, like)
    return Cut(pairs * splits, splits, -(-features // block_f), -(-values // block_v), block_v, options)


def _is_wide(like: Tensor, features: int, values: int) -> bool:
    """Whether a head takes several blocks, so that its matrices do not all stay in a program."""
    return max(features, values) > _block(MAX_BLOCK, like)


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory a program may have."""
    if device.type != "cuda":  # Triton's interpreter
        return HOPPER
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]


def _operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """What dtype and precision products are taken in: fp16 features may overflow, so they go as tf32."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else "tf32x3"


def _block(width: int, like: Tensor) -> int:
    """The block that covers a head dimension of tokens like `like`, or the largest that fits."""
    narrow, roomy = like.dtype == torch.bfloat16, _shared_memory(like.device) >= AMPERE
    halvings = (not narrow) + (not roomy)  # each for twice the bytes, or half the room
    return min(MAX_BLOCK >> halvings, _power(width))


def _power(width: int) -> int:
    """The smallest power of two of at least `width` and at least 16, the least a product takes."""
    return max(16, 1 << (width - 1).bit_length())


def _total(parts: Tensor) -> Tensor:
    """The sum over splits, (runs, heads, splits, ...)."""
    return parts.squeeze(2) if parts.shape[2] == 1 else parts.sum(dim=2)


def _offsets(segments: list[int], device: torch.device) -> Tensor:
    """(rows + 1,) int32: where each row's runs begin."""
    rows, each = len(segments), segments[0]
    if each and segments == [each] * rows:
        # Made where it is read, so that a CUDA graph holds it and copies nothing from the host.
        return torch.arange(0, each * rows + 1, each, dtype=torch.int32, device=device)
    return _uneven_offsets(tuple(segments), device)


@lru_cache(maxsize=64)  # for the layers of a forward pass: the host waits for each copy
def _uneven_offsets(segments: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor((0, *segments), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def _sums(
    key: Tensor,
    value: Tensor | None,
    feature_map: str,
    *,
    kv_heads: int | None = None,
    weights: Tensor | None = None,
    scale: Tensor | None = None,
    total_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum (a sigma(k))^T v and sum b sigma(k) of each run; without `value` only the second is formed.

    `scale` a and `total_scale` b are (runs, heads, N); see `kernels.sums_kernel`.
    """
    runs, heads, tokens, features = key.shape
    kv_heads = heads if kv_heads is None else kv_heads
    outer = value is not None
    value = key if value is None else value
    values = value.shape[-1] if outer else 16
    cut = _cut("sums", key, features, values, runs * kv_heads)
    sizes = (runs, kv_heads, cut.splits, features)
    memory = key.new_empty((*sizes, values) if outer else (0, 0, 1), dtype=torch.float32)
    normalizer = key.new_empty(sizes, dtype=torch.float32)
    kernels.sums_kernel[(cut.programs, cut.blocks_f, cut.blocks_v)](
        key,
        value,
        scale,
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
        cut.splits,
        GROUP=heads // kv_heads,
        MAP=feature_map,
        OUTER=outer,
        SCALED=scale is not None,
        TOTAL_SCALED=total_scale is not None,
        WEIGHTED=weights is not None,
        BLOCK_V=cut.block_v,
        **cut.options,
    )
    return _total(memory), _total(normalizer)


def _removal(key: Tensor, normalizer: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """A of each run and 1 / (sigma(K) z) of each token; see `kernels.removal_kernel`."""
    runs, heads, tokens, features = key.shape
    cut = _cut("removal", key, features, features, runs * heads)
    blocks = cut.blocks_f
    removal = normalizer.new_empty(runs, heads, cut.splits, features, features)
    reciprocal = normalizer.new_empty(runs, heads, tokens)
    kernels.removal_kernel[(cut.programs, blocks, blocks)](
        key,
        normalizer,
        reciprocal,
        removal,
        *key.stride()[:3],
        tokens,
        features,
        heads,
        cut.splits,
        MAP=feature_map,
        BLOCKS_F=blocks,
        **cut.options,
    )
    return _total(removal), reciprocal


def _scan(sums: Tensor, start: Tensor, offsets: Tensor, *, backwards: bool = False) -> tuple[Tensor, Tensor]:
    """Exclusive prefix sums over each row's runs, and the total; see `kernels.scan_kernel`."""
    rows, heads = start.shape[:2]
    elements = start[0, 0].numel()
    before, last = torch.empty_like(sums), torch.empty_like(start, memory_format=torch.contiguous_format)
    block = min(SCAN_BLOCK, _power(elements))
    kernels.scan_kernel[(rows * heads, -(-elements // block))](
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
    block_f = min(MAX_BLOCK, _power(features))
    before, last = torch.empty_like(sums), torch.empty_like(start, memory_format=torch.contiguous_format)
    kernels.delta_scan_kernel[(rows * heads, -(-values // DELTA_COLUMNS))](
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
        HALVES=-(-features // block_f),
        PRECISION="tf32x3",
        BLOCK_F=block_f,
        BLOCK_V=DELTA_COLUMNS,
        STAGES=1 if features > MAX_BLOCK else DELTA_STAGES,
        num_warps=DELTA_WARPS,
    )
    return before, last


def _removal_backward(key: Tensor, reciprocal: Tensor, grad_removal: Tensor, feature_map: str) -> Tensor:
    runs, heads, tokens, features = key.shape
    cut = _cut("removal_backward", key, features, 16, runs * heads)
    denominator_grad = torch.empty_like(reciprocal)
    kernels.removal_backward_kernel[(cut.programs,)](
        key,
        reciprocal,
        grad_removal,
        denominator_grad,
        *key.stride()[:3],
        tokens,
        features,
        heads,
        cut.splits,
        MAP=feature_map,
        BLOCKS_F=cut.blocks_f,
        **cut.options,
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
    more_grad_value: Tensor | None,
    feature_map: str,
    delta: bool,
) -> tuple[Tensor, Tensor]:
    runs, heads, tokens, features = key.shape
    values = value.shape[-1]
    is_wide = _is_wide(key, features, values)
    kernel = "wide" if is_wide else "write_backward_delta" if delta else "write_backward"
    cut = _cut(kernel, key, features, values, runs * heads)
    grad_key, grad_value = torch.empty_like(key), torch.empty_like(value)
    tensors = (
        key,
        value,
        weights,
        normalizer,
        reciprocal,
        denominator_grad,
        grad_sums,
        grad_totals,
        grad_removal,
        more_grad_value,
        grad_key,
        grad_value,
        *key.stride()[:3],
        *value.stride()[:3],
        *(value if more_grad_value is None else more_grad_value).stride()[:3],
        *grad_key.stride()[:3],
        *grad_value.stride()[:3],
    )
    settings = {
        "MAP": feature_map,
        "WEIGHTED": weights is not None,
        "DELTA": delta,
        "ADDED": more_grad_value is not None,
    }
    if is_wide:
        options = _wide_options(cut)
        tiles = -(-tokens // options["BLOCK_N"])
        wide.wide_write_backward_kernel[(runs * heads * tiles,)](
            *tensors, tokens, features, values, heads, **settings, **options
        )
    else:
        kernels.write_backward_kernel[(cut.programs,)](
            *tensors,
            tokens,
            features,
            values,
            heads,
            cut.splits,
            BLOCK_V=cut.block_v,
            **settings,
            **cut.options,
        )
    return grad_key, grad_value


def _wide_options(cut: Cut) -> dict[str, Any]:
    """Constants of the kernels in `wide`, which mask everything and go block by block."""
    options = {name: value for name, value in cut.options.items() if name not in ("FULL", "STAGES")}
    options |= {"BLOCK_V": cut.block_v, "BLOCKS_F": cut.blocks_f, "BLOCKS_V": cut.blocks_v}
    return options | {"num_stages": 1}
