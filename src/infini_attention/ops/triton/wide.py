"""Gradients for heads of several blocks (head_dim over 128, not in bf16 over 64): a tile a program.

Names and conventions are those of `kernels`; these trade passes over the tiles for registers.
"""

import triton
import triton.language as tl

from infini_attention.ops.triton.kernels import (
    _features_slope,
    _mapped,
    _matrix,
    _reciprocal,
    _store_tile,
    _tile,
)


@triton.jit
def wide_mix_backward_kernel(
    query_GQNF,
    local_GQNV,
    gate_Q,
    memory_GHFV,
    normalizer_GHF,
    grad_output_GQNV,
    grad_query_GQNF,
    grad_local_GQNV,
    grad_share_GQN,
    numerator_scale_GQN,
    denominator_grad_GQN,
    query_stride_g,
    query_stride_h,
    query_stride_n,
    local_stride_g,
    local_stride_h,
    local_stride_n,
    output_stride_g,
    output_stride_h,
    output_stride_n,
    grad_query_stride_g,
    grad_query_stride_h,
    grad_query_stride_n,
    grad_local_stride_g,
    grad_local_stride_h,
    grad_local_stride_n,
    N,
    F,
    V,
    HEADS,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    GATED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    BLOCKS_V: tl.constexpr,
):
    """Gradients of one tile's queries and local outputs, and what the memory's gradient is summed from.

    With y = numerator / denominator and dy = share * d_output: `numerator_scale` is share / denominator
    (times d_output, the numerator's gradient) and `denominator_grad` is -(dy . y) / denominator.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    run_head = (pid // tiles).to(tl.int64)
    head, g = run_head % HEADS, run_head // HEADS
    state = g * (HEADS // GROUP) + head // GROUP
    query = query_GQNF + g * query_stride_g + head * query_stride_h
    local = local_GQNV + g * local_stride_g + head * local_stride_h
    grad_output = grad_output_GQNV + g * output_stride_g + head * output_stride_h
    grad_query = grad_query_GQNF + g * grad_query_stride_g + head * grad_query_stride_h
    grad_local = grad_local_GQNV + g * grad_local_stride_g + head * grad_local_stride_h
    memory = memory_GHFV + state * F * V
    normalizer = normalizer_GHF + state * F

    product = tl.zeros((BLOCK_N,), tl.float32)
    largest = 0.0
    for block_f in tl.static_range(BLOCKS_F):
        rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
        x = _tile(query, query_stride_n, tokens, rows, N, F, False)
        phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, False)
        z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
        product += tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=0))
    empty = largest == 0
    reciprocal = _reciprocal(product)
    share = tl.sigmoid(tl.load(gate_Q + head))
    if not GATED:
        share = tl.where(empty, 0.0, share)

    read_products = tl.zeros((BLOCK_N,), tl.float32)  # d_output . y
    local_products = tl.zeros((BLOCK_N,), tl.float32)  # d_output . local
    for block_v in tl.static_range(BLOCKS_V):
        columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        numerator = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for block_f in tl.static_range(BLOCKS_F):
            rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
            x = _tile(query, query_stride_n, tokens, rows, N, F, False)
            phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, False)
            M = _matrix(memory, rows, columns, F, V).to(OPERAND)
            numerator = tl.dot(phi, M, numerator, input_precision=PRECISION)
        gradient = _tile(grad_output, output_stride_n, tokens, columns, N, V, False).to(tl.float32)
        from_local = _tile(local, local_stride_n, tokens, columns, N, V, False).to(tl.float32)
        read_products += tl.sum(gradient * numerator, axis=1)
        local_products += tl.sum(gradient * from_local, axis=1)
        _store_tile(grad_local, grad_local_stride_n, tokens, columns, N, V, (1 - share) * gradient, False)
    read_products *= reciprocal

    inside = tokens < N
    scale = share * reciprocal
    denominator_grad = -scale * read_products
    tl.store(numerator_scale_GQN + run_head * N + tokens, scale, mask=inside)
    tl.store(denominator_grad_GQN + run_head * N + tokens, denominator_grad, mask=inside)
    kept = 1.0
    if not GATED:
        kept = tl.where(empty, 0.0, 1.0)
    tl.store(grad_share_GQN + run_head * N + tokens, kept * (read_products - local_products), mask=inside)

    for block_f in tl.static_range(BLOCKS_F):
        rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
        z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
        grad_phi = denominator_grad[:, None] * z[None, :]
        for block_v in tl.static_range(BLOCKS_V):
            columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
            gradient = _tile(grad_output, output_stride_n, tokens, columns, N, V, False).to(tl.float32)
            scaled = (gradient * scale[:, None]).to(OPERAND)
            M = _matrix(memory, rows, columns, F, V).to(OPERAND)
            grad_phi = tl.dot(scaled, tl.trans(M), grad_phi, input_precision=PRECISION)
        x = _tile(query, query_stride_n, tokens, rows, N, F, False).to(tl.float32)
        grad_x = grad_phi * _features_slope(x, MAP)
        _store_tile(grad_query, grad_query_stride_n, tokens, rows, N, F, grad_x, False)


@triton.jit
def wide_write_backward_kernel(
    key_GHNF,
    value_GHNV,
    weight_G,
    normalizer_GHF,
    reciprocal_GHN,
    denominator_grad_GHN,
    grad_memory_GHFV,
    grad_normalizer_GHF,
    grad_removal_GHFF,
    more_GHNV,
    grad_key_GHNF,
    grad_value_GHNV,
    key_stride_g,
    key_stride_h,
    key_stride_n,
    value_stride_g,
    value_stride_h,
    value_stride_n,
    more_stride_g,
    more_stride_h,
    more_stride_n,
    grad_key_stride_g,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_value_stride_g,
    grad_value_stride_h,
    grad_value_stride_n,
    N,
    F,
    V,
    H,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DELTA: tl.constexpr,
    ADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    BLOCKS_V: tl.constexpr,
):
    """Gradients of one tile's keys and values from those of the run's sums B, z and, for delta, A."""
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < N
    run_head = (pid // tiles).to(tl.int64)
    g, h = run_head // H, run_head % H
    key = key_GHNF + g * key_stride_g + h * key_stride_h
    value = value_GHNV + g * value_stride_g + h * value_stride_h
    grad_key = grad_key_GHNF + g * grad_key_stride_g + h * grad_key_stride_h
    grad_value = grad_value_GHNV + g * grad_value_stride_g + h * grad_value_stride_h
    grad_memory = grad_memory_GHFV + run_head * F * V
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_G + g)

    for block_f in tl.static_range(BLOCKS_F):
        rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
        grad_phi = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for block_v in tl.static_range(BLOCKS_V):
            columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
            values = _tile(value, value_stride_n, tokens, columns, N, V, False).to(OPERAND)
            dB = _matrix(grad_memory, rows, columns, F, V).to(OPERAND)
            grad_phi = tl.dot(values, tl.trans(dB), grad_phi, input_precision=PRECISION)
        grad_z = tl.load(grad_normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
        grad_phi = weight * (grad_phi + grad_z[None, :])
        if DELTA:
            reciprocal = tl.load(reciprocal_GHN + run_head * N + tokens, mask=inside, other=0.0)
            denominator_grad = tl.load(denominator_grad_GHN + run_head * N + tokens, mask=inside, other=0.0)
            z = tl.load(normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
            product = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
            for inner in tl.static_range(BLOCKS_F):
                others = inner * BLOCK_F + tl.arange(0, BLOCK_F)
                x = _tile(key, key_stride_n, tokens, others, N, F, False)
                phi = _mapped(x, tokens, others, N, F, MAP, OPERAND, False)
                S = _matrix(grad_removal_GHFF + run_head * F * F, others, rows, F, F).to(OPERAND)
                product = tl.dot(phi, S, product, input_precision=PRECISION)
            grad_phi += reciprocal[:, None] * product + denominator_grad[:, None] * z[None, :]
        x = _tile(key, key_stride_n, tokens, rows, N, F, False).to(tl.float32)
        grad_x = grad_phi * _features_slope(x, MAP)
        _store_tile(grad_key, grad_key_stride_n, tokens, rows, N, F, grad_x, False)

    for block_v in tl.static_range(BLOCKS_V):
        columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        grad_values = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for block_f in tl.static_range(BLOCKS_F):
            rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
            x = _tile(key, key_stride_n, tokens, rows, N, F, False)
            phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, False)
            dB = _matrix(grad_memory, rows, columns, F, V).to(OPERAND)
            grad_values = tl.dot(phi, dB, grad_values, input_precision=PRECISION)
        grad_values *= weight
        if ADDED:
            more = more_GHNV + g * more_stride_g + h * more_stride_h
            grad_values += _tile(more, more_stride_n, tokens, columns, N, V, False).to(tl.float32)
        _store_tile(grad_value, grad_value_stride_n, tokens, columns, N, V, grad_values, False)
