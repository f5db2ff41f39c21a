"""The kernels: segment sums, scans over segments, the mix with local attention, and their gradients.

Names end in what a tensor's axes are:
    G runs (segments), R rows, H key/value heads, Q query heads, N tokens of a segment,
    F features (= head_dim), V value_dim.
Tokens come as strided (G, heads, N, dim) views with a contiguous last axis; sums and states are
contiguous and fp32. A `tl.dot` takes its operands in the inputs' dtype if that is bf16, else in fp32 with
the precision named by PRECISION, and always accumulates in fp32. Features are rounded to the operands'
dtype once, so that numerator and denominator of a read are weighted alike.

Program axis 0 carries runs, heads and tiles together, tiles fastest, so neighbours share a memory in cache.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-30)  # ops.state.DENOMINATOR_FLOOR


@triton.jit
def _features(x, MAP: tl.constexpr):
    """sigma(x) in fp32."""
    if MAP == "elu1":
        phi = tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "exp":
        phi = tl.exp(tl.minimum(tl.maximum(x, -20.0), 10.0))
    elif MAP == "relu2":
        phi = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif MAP == "softplus":
        phi = tl.where(x > 20.0, x, tl.log(1 + tl.exp(tl.minimum(x, 20.0))))
    else:
        phi = x
    return phi


@triton.jit
def _features_slope(x, MAP: tl.constexpr):
    """The derivative of sigma at x, in fp32."""
    if MAP == "elu1":
        slope = tl.where(x > 0, 1.0, tl.exp(tl.minimum(x, 0.0)))
    elif MAP == "exp":
        slope = tl.where((x >= -20.0) & (x <= 10.0), tl.exp(tl.minimum(tl.maximum(x, -20.0), 10.0)), 0.0)
    elif MAP == "relu2":
        slope = 2 * tl.maximum(x, 0.0)
    elif MAP == "softplus":
        slope = tl.where(x > 20.0, 1.0, 1 / (1 + tl.exp(-x)))
    else:
        slope = tl.full(x.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _tile(pointer, stride_n, tokens, columns, N, WIDTH):
    """A (tokens, columns) tile in its own dtype, zero outside (N, WIDTH)."""
    mask = (tokens < N)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(pointer + tokens.to(tl.int64)[:, None] * stride_n + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _feature_tile(pointer, stride_n, tokens, columns, N, WIDTH, MAP: tl.constexpr, OPERAND: tl.constexpr):
    """sigma of a tile, rounded to the operands' dtype, zero outside (N, WIDTH)."""
    x = _tile(pointer, stride_n, tokens, columns, N, WIDTH).to(tl.float32)
    mask = (tokens < N)[:, None] & (columns < WIDTH)[None, :]
    return tl.where(mask, _features(x, MAP), 0.0).to(OPERAND)


@triton.jit
def _matrix(pointer, rows, columns, ROWS, COLUMNS):
    """A tile of a contiguous fp32 (ROWS, COLUMNS) matrix, zero outside."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _denominator(phi, z, empty):
    """sigma(X) z per token, kept off zero; infinite where the memory is empty."""
    product = tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
    floored = tl.where(tl.abs(product) < FLOOR, FLOOR, product)
    return tl.where(empty, float("inf"), floored)


@triton.jit
def sums_kernel(
    x_GHNF,
    y_GHNV,
    y_scale_GHN,
    x_scale_GHN,
    weight_G,
    memory_GHFV,
    normalizer_GHF,
    x_stride_g,
    x_stride_h,
    x_stride_n,
    y_stride_g,
    y_stride_h,
    y_stride_n,
    N,
    F,
    V,
    H,
    SPLITS,
    GROUP: tl.constexpr,
    MAP_X: tl.constexpr,
    MAP_Y: tl.constexpr,
    SCALED_Y: tl.constexpr,
    SCALED_X: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OUTER: tl.constexpr,
    TOTAL: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """sum_n sigma(x_n)^T (a_n sigma'(y_n)) if OUTER, and sum_n b_n sigma(x_n) if TOTAL, of each run.

    x and y have H * GROUP heads, whose sums are added up by group. a is `y_scale`, b is `x_scale`, or 1;
    `weight` multiplies both. The tokens of a run may be split over SPLITS programs, whose partial sums
    stand side by side: outputs are (G, H, SPLITS, ...).
    """
    pid = tl.program_id(0)
    split = pid % SPLITS
    h = (pid // SPLITS) % H
    g = (pid // SPLITS // H).to(tl.int64)
    rows = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    memory = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    normalizer = tl.zeros((BLOCK_F,), tl.float32)
    for j in range(GROUP):
        head = h * GROUP + j
        x = x_GHNF + g * x_stride_g + head * x_stride_h
        y = y_GHNV + g * y_stride_g + head * y_stride_h
        scales = (g * H * GROUP + head) * N
        for tile in range(split * tiles, (split + 1) * tiles):
            tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            phi = _feature_tile(x, x_stride_n, tokens, rows, N, F, MAP_X, OPERAND)
            if OUTER:
                if SCALED_Y:
                    values = _feature_tile(y, y_stride_n, tokens, columns, N, V, MAP_Y, tl.float32)
                    scale = tl.load(y_scale_GHN + scales + tokens, mask=tokens < N, other=0.0)
                    values = (values * scale[:, None]).to(OPERAND)
                else:
                    values = _feature_tile(y, y_stride_n, tokens, columns, N, V, MAP_Y, OPERAND)
                memory = tl.dot(tl.trans(phi), values, memory, input_precision=PRECISION)
            if TOTAL:
                if SCALED_X:
                    scale = tl.load(x_scale_GHN + scales + tokens, mask=tokens < N, other=0.0)
                    normalizer += tl.sum(phi.to(tl.float32) * scale[:, None], axis=0)
                else:
                    normalizer += tl.sum(phi.to(tl.float32), axis=0)
    if WEIGHTED:
        weight = tl.load(weight_G + g)
        memory *= weight
        normalizer *= weight
    out = (g * H + h) * SPLITS + split
    if OUTER:
        inside = (rows < F)[:, None] & (columns < V)[None, :]
        tl.store(memory_GHFV + out * F * V + rows[:, None] * V + columns[None, :], memory, mask=inside)
    if TOTAL:
        if tl.program_id(2) == 0:
            tl.store(normalizer_GHF + out * F + rows, normalizer, mask=rows < F)


@triton.jit
def reciprocal_kernel(
    key_GHNF,
    normalizer_GHF,
    reciprocal_GHN,
    stride_g,
    stride_h,
    stride_n,
    N,
    F,
    H,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """1 / (sigma(K) z) of each token, 0 where the memory is empty. BLOCK_F covers all features."""
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    run_head = (pid // tiles).to(tl.int64)
    g, h = run_head // H, run_head % H
    rows = tl.arange(0, BLOCK_F)
    z = tl.load(normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
    empty = tl.max(tl.abs(z), axis=0) == 0
    phi = _feature_tile(key_GHNF + g * stride_g + h * stride_h, stride_n, tokens, rows, N, F, MAP, OPERAND)
    reciprocal = 1 / _denominator(phi, z, empty)
    tl.store(reciprocal_GHN + run_head * N + tokens, reciprocal, mask=tokens < N)


@triton.jit
def scan_kernel(
    sums_GHE,
    start_RHE,
    before_GHE,
    last_RHE,
    offsets_R,
    H,
    E,
    REVERSED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state before each run, and each row's last one, by adding `sums` in order (or in reverse).

    Row r's runs are offsets[r] to offsets[r + 1]. `before` may be `sums` itself.
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    elements = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < E
    first = tl.load(offsets_R + row).to(tl.int64)
    end = tl.load(offsets_R + row + 1).to(tl.int64)
    state = tl.load(start_RHE + (row * H + h) * E + elements, mask=mask, other=0.0)
    for step in range(0, end - first):
        run = first + step
        if REVERSED:
            run = end - 1 - step
        place = (run * H + h) * E + elements
        addition = tl.load(sums_GHE + place, mask=mask, other=0.0)
        tl.store(before_GHE + place, state, mask=mask)
        state += addition
    tl.store(last_RHE + (row * H + h) * E + elements, state, mask=mask)


@triton.jit
def _less_removed(
    state_top, state_bottom, removal, rows_top, rows_bottom, F, HALVES: tl.constexpr, PRECISION: tl.constexpr
):
    """state - A state, for a state held in one or two blocks of rows."""
    part = tl.dot(_matrix(removal, rows_top, rows_top, F, F), state_top, input_precision=PRECISION)
    lower = state_bottom
    if HALVES == 2:
        part = tl.dot(
            _matrix(removal, rows_top, rows_bottom, F, F), state_bottom, part, input_precision=PRECISION
        )
        low = tl.dot(_matrix(removal, rows_bottom, rows_top, F, F), state_top, input_precision=PRECISION)
        low = tl.dot(
            _matrix(removal, rows_bottom, rows_bottom, F, F), state_bottom, low, input_precision=PRECISION
        )
        lower = state_bottom - low
    return state_top - part, lower


@triton.jit
def delta_scan_kernel(
    sums_GHFV,
    removal_GHFF,
    start_RHFV,
    before_GHFV,
    last_RHFV,
    offsets_R,
    H,
    F,
    V,
    REVERSED: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """M <- M - A M + B in order; in reverse, the same map's transpose, which is itself since A is symmetric.

    Columns of M never mix, so each program takes BLOCK_V of them; rows are HALVES blocks of BLOCK_F.
    `before` may be `sums` itself.
    """
    row = (tl.program_id(0) // H).to(tl.int64)
    h = tl.program_id(0) % H
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    top = tl.arange(0, BLOCK_F)
    bottom = BLOCK_F + tl.arange(0, BLOCK_F)
    place_top = top[:, None] * V + columns[None, :]
    place_bottom = bottom[:, None] * V + columns[None, :]
    mask_top = (top < F)[:, None] & (columns < V)[None, :]
    mask_bottom = (bottom < F)[:, None] & (columns < V)[None, :]
    first = tl.load(offsets_R + row).to(tl.int64)
    end = tl.load(offsets_R + row + 1).to(tl.int64)
    start = start_RHFV + (row * H + h) * F * V
    state_top = tl.load(start + place_top, mask=mask_top, other=0.0)
    state_bottom = state_top
    if HALVES == 2:
        state_bottom = tl.load(start + place_bottom, mask=mask_bottom, other=0.0)
    for step in range(0, end - first):
        run = first + step
        if REVERSED:
            run = end - 1 - step
        sums = sums_GHFV + (run * H + h) * F * V
        before = before_GHFV + (run * H + h) * F * V
        removal = removal_GHFF + (run * H + h) * F * F
        addition_top = tl.load(sums + place_top, mask=mask_top, other=0.0)
        addition_bottom = addition_top
        if HALVES == 2:
            addition_bottom = tl.load(sums + place_bottom, mask=mask_bottom, other=0.0)
            tl.store(before + place_bottom, state_bottom, mask=mask_bottom)
        tl.store(before + place_top, state_top, mask=mask_top)
        state_top, state_bottom = _less_removed(
            state_top, state_bottom, removal, top, bottom, F, HALVES, PRECISION
        )
        state_top += addition_top
        state_bottom += addition_bottom
    last = last_RHFV + (row * H + h) * F * V
    tl.store(last + place_top, state_top, mask=mask_top)
    if HALVES == 2:
        tl.store(last + place_bottom, state_bottom, mask=mask_bottom)


@triton.jit
def mix_kernel(
    query_GQNF,
    local_GQNV,
    gate_Q,
    memory_GHFV,
    normalizer_GHF,
    output_GQNV,
    query_stride_g,
    query_stride_h,
    query_stride_n,
    local_stride_g,
    local_stride_h,
    local_stride_n,
    output_stride_g,
    output_stride_h,
    output_stride_n,
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
):
    """Equations (7) and (10) for one tile of tokens: read, normalise, gate, add. `output` may be `local`."""
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = (pid // tiles) % HEADS
    g = (pid // tiles // HEADS).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = g * (HEADS // GROUP) + head // GROUP
    query = query_GQNF + g * query_stride_g + head * query_stride_h
    local = local_GQNV + g * local_stride_g + head * local_stride_h
    output = output_GQNV + g * output_stride_g + head * output_stride_h

    numerator = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    product = tl.zeros((BLOCK_N,), tl.float32)
    largest = 0.0
    for block in tl.static_range(BLOCKS_F):
        rows = block * BLOCK_F + tl.arange(0, BLOCK_F)
        phi = _feature_tile(query, query_stride_n, tokens, rows, N, F, MAP, OPERAND)
        M = _matrix(memory_GHFV + state * F * V, rows, columns, F, V).to(OPERAND)
        z = tl.load(normalizer_GHF + state * F + rows, mask=rows < F, other=0.0)
        numerator = tl.dot(phi, M, numerator, input_precision=PRECISION)
        product += tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=0))
    empty = largest == 0
    floored = tl.where(tl.abs(product) < FLOOR, FLOOR, product)
    reciprocal = tl.where(empty, 0.0, 1 / floored)
    share = tl.sigmoid(tl.load(gate_Q + head))
    if not GATED:
        share = tl.where(empty, 0.0, share)
    from_local = _tile(local, local_stride_n, tokens, columns, N, V).to(tl.float32)
    mixed = numerator * (share * reciprocal)[:, None] + (1 - share) * from_local
    mask = (tokens < N)[:, None] & (columns < V)[None, :]
    place = tokens.to(tl.int64)[:, None] * output_stride_n + columns[None, :]
    tl.store(output + place, mixed.to(output_GQNV.dtype.element_ty), mask=mask)


@triton.jit
def mix_backward_kernel(
    query_GQNF,
    local_GQNV,
    gate_Q,
    memory_GHFV,
    normalizer_GHF,
    grad_output_GQNV,
    grad_query_GQNF,
    grad_local_GQNV,
    grad_share_GQT,
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
        phi = _feature_tile(query, query_stride_n, tokens, rows, N, F, MAP, OPERAND)
        z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
        product += tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=0))
    empty = largest == 0
    floored = tl.where(tl.abs(product) < FLOOR, FLOOR, product)
    reciprocal = tl.where(empty, 0.0, 1 / floored)
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
            phi = _feature_tile(query, query_stride_n, tokens, rows, N, F, MAP, OPERAND)
            M = _matrix(memory, rows, columns, F, V).to(OPERAND)
            numerator = tl.dot(phi, M, numerator, input_precision=PRECISION)
        gradient = _tile(grad_output, output_stride_n, tokens, columns, N, V).to(tl.float32)
        from_local = _tile(local, local_stride_n, tokens, columns, N, V).to(tl.float32)
        read_products += tl.sum(gradient * numerator, axis=1)
        local_products += tl.sum(gradient * from_local, axis=1)
        mask = (tokens < N)[:, None] & (columns < V)[None, :]
        place = tokens.to(tl.int64)[:, None] * grad_local_stride_n + columns[None, :]
        scaled = ((1 - share) * gradient).to(grad_local_GQNV.dtype.element_ty)
        tl.store(grad_local + place, scaled, mask=mask)
    read_products *= reciprocal

    inside = tokens < N
    scale = share * reciprocal
    denominator_grad = -scale * read_products
    tl.store(numerator_scale_GQN + run_head * N + tokens, scale, mask=inside)
    tl.store(denominator_grad_GQN + run_head * N + tokens, denominator_grad, mask=inside)
    kept = 1.0
    if not GATED:
        kept = tl.where(empty, 0.0, 1.0)
    share_grad = kept * tl.sum(read_products - local_products, axis=0)
    tl.store(grad_share_GQT + run_head * tiles + pid % tiles, share_grad)

    for block_f in tl.static_range(BLOCKS_F):
        rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
        z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
        grad_phi = denominator_grad[:, None] * z[None, :]
        for block_v in tl.static_range(BLOCKS_V):
            columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
            gradient = _tile(grad_output, output_stride_n, tokens, columns, N, V).to(tl.float32)
            scaled = (gradient * scale[:, None]).to(OPERAND)
            M = _matrix(memory, rows, columns, F, V).to(OPERAND)
            grad_phi = tl.dot(scaled, tl.trans(M), grad_phi, input_precision=PRECISION)
        x = _tile(query, query_stride_n, tokens, rows, N, F).to(tl.float32)
        mask = (tokens < N)[:, None] & (rows < F)[None, :]
        place = tokens.to(tl.int64)[:, None] * grad_query_stride_n + rows[None, :]
        grad_x = (grad_phi * _features_slope(x, MAP)).to(grad_query_GQNF.dtype.element_ty)
        tl.store(grad_query + place, grad_x, mask=mask)


@triton.jit
def removal_backward_kernel(
    key_GHNF,
    reciprocal_GHN,
    grad_removal_GHFF,
    denominator_grad_GHN,
    stride_g,
    stride_h,
    stride_n,
    N,
    F,
    H,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
):
    """-r^2 (sigma(K) S sigma(K)^T) / 2 per token, S = dA + dA^T: the gradient of sigma(K) z in A_s."""
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    tokens = (pid % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    run_head = (pid // tiles).to(tl.int64)
    g, h = run_head // H, run_head % H
    key = key_GHNF + g * stride_g + h * stride_h
    total = tl.zeros((BLOCK_N,), tl.float32)
    for block in tl.static_range(BLOCKS_F):
        columns = block * BLOCK_F + tl.arange(0, BLOCK_F)
        product = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
        for inner in tl.static_range(BLOCKS_F):
            rows = inner * BLOCK_F + tl.arange(0, BLOCK_F)
            phi = _feature_tile(key, stride_n, tokens, rows, N, F, MAP, OPERAND)
            S = _matrix(grad_removal_GHFF + run_head * F * F, rows, columns, F, F).to(OPERAND)
            product = tl.dot(phi, S, product, input_precision=PRECISION)
        phi = _feature_tile(key, stride_n, tokens, columns, N, F, MAP, OPERAND)
        total += tl.sum(product * phi.to(tl.float32), axis=1)
    reciprocal = tl.load(reciprocal_GHN + run_head * N + tokens, mask=tokens < N, other=0.0)
    gradient = -0.5 * total * reciprocal * reciprocal
    tl.store(denominator_grad_GHN + run_head * N + tokens, gradient, mask=tokens < N)


@triton.jit
def write_backward_kernel(
    key_GHNF,
    value_GHNV,
    weight_G,
    normalizer_GHF,
    reciprocal_GHN,
    denominator_grad_GHN,
    grad_memory_GHFV,
    grad_normalizer_GHF,
    grad_removal_GHFF,
    grad_key_GHNF,
    grad_value_GHNV,
    key_stride_g,
    key_stride_h,
    key_stride_n,
    value_stride_g,
    value_stride_h,
    value_stride_n,
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
            values = _tile(value, value_stride_n, tokens, columns, N, V).to(OPERAND)
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
                phi = _feature_tile(key, key_stride_n, tokens, others, N, F, MAP, OPERAND)
                S = _matrix(grad_removal_GHFF + run_head * F * F, others, rows, F, F).to(OPERAND)
                product = tl.dot(phi, S, product, input_precision=PRECISION)
            grad_phi += reciprocal[:, None] * product + denominator_grad[:, None] * z[None, :]
        x = _tile(key, key_stride_n, tokens, rows, N, F).to(tl.float32)
        mask = inside[:, None] & (rows < F)[None, :]
        place = tokens.to(tl.int64)[:, None] * grad_key_stride_n + rows[None, :]
        grad_x = (grad_phi * _features_slope(x, MAP)).to(grad_key_GHNF.dtype.element_ty)
        tl.store(grad_key + place, grad_x, mask=mask)

    for block_v in tl.static_range(BLOCKS_V):
        columns = block_v * BLOCK_V + tl.arange(0, BLOCK_V)
        grad_values = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
        for block_f in tl.static_range(BLOCKS_F):
            rows = block_f * BLOCK_F + tl.arange(0, BLOCK_F)
            phi = _feature_tile(key, key_stride_n, tokens, rows, N, F, MAP, OPERAND)
            dB = _matrix(grad_memory, rows, columns, F, V).to(OPERAND)
            grad_values = tl.dot(phi, dB, grad_values, input_precision=PRECISION)
        mask = inside[:, None] & (columns < V)[None, :]
        place = tokens.to(tl.int64)[:, None] * grad_value_stride_n + columns[None, :]
        grad_v = (weight * grad_values).to(grad_value_GHNV.dtype.element_ty)
        tl.store(grad_value + place, grad_v, mask=mask)
