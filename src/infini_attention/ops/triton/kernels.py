"""The kernels: segment sums, scans over segments, the mix with local attention, and their gradients.

Names end in what a tensor's axes are:
    G runs (segments), R rows, H key/value heads, Q query heads, N tokens of a segment,
    F features (= head_dim), V value_dim.
Tokens come as strided (G, heads, N, dim) views with a contiguous last axis; sums and states are contiguous
and fp32. A `tl.dot` takes its operands in the inputs' dtype if that is bf16, else in fp32 with the precision
named by PRECISION, and always accumulates in fp32. Features are rounded to the operands' dtype once, so that
numerator and denominator of a read are weighted alike.

A program takes one of SPLITS parts of a run's tokens, for one key/value head: it keeps the head's d x d
matrix and streams the tokens past it. Sums over tokens are partial, one a split. FULL says that tiles cover
the tokens and head dimensions exactly, so nothing needs to be masked. Heads wider than a block are cut into
blocks.
"""

import triton
import triton.language as tl

FLOOR = tl.constexpr(1e-30)  # ops.normalization.DENOMINATOR_FLOOR


@triton.jit
def _most(x, bound):
    """The larger of each; NaN stays NaN, which the default of `tl.maximum` leaves out."""
    return tl.maximum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _least(x, bound):
    """The smaller of each; NaN stays NaN."""
    return tl.minimum(x, bound, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _features(x, MAP: tl.constexpr):
    """sigma(x) in fp32."""
    if MAP == "elu1":
        phi = _most(x, 0.0) + tl.exp(_least(x, 0.0))
    elif MAP == "exp":
        phi = tl.exp(_least(_most(x, -20.0), 10.0))
    elif MAP == "relu2":
        phi = _most(x, 0.0) * _most(x, 0.0)
    elif MAP == "softplus":
        phi = tl.where(x > 20.0, x, tl.log(1 + tl.exp(_least(x, 20.0))))
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
def _tile(pointer, stride_n, tokens, columns, N, WIDTH, FULL: tl.constexpr):
    """A (tokens, columns) tile in its own dtype, zero outside (N, WIDTH)."""
    places = pointer + tokens[:, None] * stride_n + columns[None, :]
    if FULL:
        tile = tl.load(places)
    else:
        tile = tl.load(places, mask=(tokens < N)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(pointer, stride_n, tokens, columns, N, WIDTH, values, FULL: tl.constexpr):
    """The inverse of `_tile`, converted to the pointer's dtype."""
    places = pointer + tokens[:, None] * stride_n + columns[None, :]
    values = values.to(pointer.dtype.element_ty)
    if FULL:
        tl.store(places, values)
    else:
        tl.store(places, values, mask=(tokens < N)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _mapped(x, tokens, columns, N, WIDTH, MAP: tl.constexpr, OPERAND: tl.constexpr, FULL: tl.constexpr):
    """sigma of a loaded tile, rounded to the operands' dtype, zero outside (N, WIDTH)."""
    phi = _features(x.to(tl.float32), MAP)
    if not FULL:
        phi = tl.where((tokens < N)[:, None] & (columns < WIDTH)[None, :], phi, 0.0)
    return phi.to(OPERAND)


@triton.jit
def _matrix(pointer, rows, columns, ROWS, COLUMNS):
    """A tile of a contiguous fp32 (ROWS, COLUMNS) matrix, zero outside."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(pointer + rows[:, None] * COLUMNS + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _reciprocal(product):
    """1 / (sigma(X) z), or 0 where nothing like X is stored; `ops.state.denominator` is its inverse."""
    nothing = tl.abs(product) < FLOOR
    return tl.where(nothing, 0.0, 1 / tl.where(nothing, 1.0, product))


@triton.jit
def sums_kernel(
    x_GHNF,
    y_GHNV,
    scale_GHN,
    total_scale_GHN,
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
    MAP: tl.constexpr,
    OUTER: tl.constexpr,
    SCALED: tl.constexpr,
    TOTAL_SCALED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """sum_n (a_n sigma(x_n))^T y_n if OUTER, and sum_n b_n sigma(x_n), of each run.

    x and y have H * GROUP heads, whose sums are added up by group. a is `scale`, b is `total_scale`, or 1;
    `weight` multiplies both. Outputs are (G, H, SPLITS, ...). The outer sum is formed as its transpose, so
    that y goes to the tensor cores as it was loaded.
    """
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    g, h = run_head // H, run_head % H
    rows = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    memory = tl.zeros((BLOCK_V, BLOCK_F), tl.float32)
    totals = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for step in tl.range(0, GROUP * tiles, num_stages=STAGES):
        head = h * GROUP + step // tiles
        tokens = (split * tiles + step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        scales = (g * H * GROUP + head) * N + tokens
        x = _tile(x_GHNF + g * x_stride_g + head * x_stride_h, x_stride_n, tokens, rows, N, F, FULL)
        phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, FULL)
        if TOTAL_SCALED:
            total_scale = tl.load(total_scale_GHN + scales, mask=tokens < N, other=0.0)
            totals += phi.to(tl.float32) * total_scale[:, None]
        else:
            totals += phi.to(tl.float32)
        if OUTER:
            y = y_GHNV + g * y_stride_g + head * y_stride_h
            values = _tile(y, y_stride_n, tokens, columns, N, V, FULL).to(OPERAND)
            if SCALED:
                scale = tl.load(scale_GHN + scales, mask=tokens < N, other=0.0)
                phi = (phi.to(tl.float32) * scale[:, None]).to(OPERAND)
            memory = tl.dot(tl.trans(values), phi, memory, input_precision=PRECISION)
    normalizer = tl.sum(totals, axis=0)
    if WEIGHTED:
        weight = tl.load(weight_G + g)
        memory *= weight
        normalizer *= weight
    out = run_head * SPLITS + split
    if OUTER:
        inside = (rows < F)[None, :] & (columns < V)[:, None]
        tl.store(memory_GHFV + out * F * V + rows[None, :] * V + columns[:, None], memory, mask=inside)
    if tl.program_id(2) == 0:
        tl.store(normalizer_GHF + out * F + rows, normalizer, mask=rows < F)


@triton.jit
def removal_kernel(
    key_GHNF,
    normalizer_GHF,
    reciprocal_GHN,
    removal_GHFF,
    stride_g,
    stride_h,
    stride_n,
    N,
    F,
    H,
    SPLITS,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A = sum_n psi_n^T psi_n with psi = sigma(k) sqrt(r), r = 1 / (sigma(k) z) or 0 where memory is empty.

    Formed from its square root A is symmetric to the last bit. Also stores r. Program axes 1 and 2 are the
    block of A.
    """
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    g, h = run_head // H, run_head % H
    key = key_GHNF + g * stride_g + h * stride_h
    normalizer = normalizer_GHF + run_head * F
    rows = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    columns = tl.program_id(2) * BLOCK_F + tl.arange(0, BLOCK_F)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
    removal = tl.zeros((BLOCK_F, BLOCK_F), tl.float32)
    for step in tl.range(0, tiles, num_stages=STAGES):
        tokens = (split * tiles + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = _tile(key, stride_n, tokens, rows, N, F, FULL)
        phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, FULL)
        product = tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
        for block in tl.static_range(1, BLOCKS_F):
            others = (rows + block * BLOCK_F) % (BLOCKS_F * BLOCK_F)
            other_z = tl.load(normalizer + others, mask=others < F, other=0.0)
            x = _tile(key, stride_n, tokens, others, N, F, FULL)
            other_phi = _mapped(x, tokens, others, N, F, MAP, OPERAND, FULL)
            product += tl.sum(other_phi.to(tl.float32) * other_z[None, :], axis=1)
        reciprocal = _reciprocal(product)
        if (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
            tl.store(reciprocal_GHN + run_head * N + tokens, reciprocal, mask=tokens < N)
        root = tl.sqrt(reciprocal)[:, None]
        psi = (phi.to(tl.float32) * root).to(OPERAND)
        other_psi = psi
        if BLOCKS_F > 1:
            x = _tile(key, stride_n, tokens, columns, N, F, FULL)
            other_phi = _mapped(x, tokens, columns, N, F, MAP, OPERAND, FULL)
            other_psi = (other_phi.to(tl.float32) * root).to(OPERAND)
        removal = tl.dot(tl.trans(psi), other_psi, removal, input_precision=PRECISION)
    place = removal_GHFF + (run_head * SPLITS + split) * F * F
    inside = (rows < F)[:, None] & (columns < F)[None, :]
    tl.store(place + rows[:, None] * F + columns[None, :], removal, mask=inside)


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

    Row r's runs are offsets[r] to offsets[r + 1].
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
    STAGES: tl.constexpr,
):
    """M <- M - A M + B in order; in reverse, the same map's transpose, which is itself since A is symmetric.

    Columns of M never mix, so each program takes BLOCK_V of them; rows are HALVES blocks of BLOCK_F.
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
    for step in tl.range(0, end - first, num_stages=STAGES):
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
    H,
    SPLITS,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    GATED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Equations (7) and (10): read, normalise, gate, add; program axis 1 is the block of values."""
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    first_rows = tl.arange(0, BLOCK_F)
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    g, h = run_head // H, run_head % H
    memory = memory_GHFV + run_head * F * V
    normalizer = normalizer_GHF + run_head * F
    first_M = _matrix(memory, first_rows, columns, F, V).to(OPERAND)
    first_z = tl.load(normalizer + first_rows, mask=first_rows < F, other=0.0)
    largest = tl.max(tl.abs(first_z), axis=0)
    for block in tl.static_range(1, BLOCKS_F):
        rows = block * BLOCK_F + first_rows
        z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=0))
    empty = largest == 0
    for step in tl.range(0, GROUP * tiles, num_stages=STAGES):
        head = h * GROUP + step // tiles
        tokens = (split * tiles + step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        query = query_GQNF + g * query_stride_g + head * query_stride_h
        x = _tile(query, query_stride_n, tokens, first_rows, N, F, FULL)
        local = local_GQNV + g * local_stride_g + head * local_stride_h
        from_local = _tile(local, local_stride_n, tokens, columns, N, V, FULL)
        phi = _mapped(x, tokens, first_rows, N, F, MAP, OPERAND, FULL)
        product = tl.sum(phi.to(tl.float32) * first_z[None, :], axis=1)
        numerator = tl.dot(phi, first_M, input_precision=PRECISION)
        for block in tl.static_range(1, BLOCKS_F):
            rows = block * BLOCK_F + first_rows
            x = _tile(query, query_stride_n, tokens, rows, N, F, FULL)
            phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, FULL)
            z = tl.load(normalizer + rows, mask=rows < F, other=0.0)
            product += tl.sum(phi.to(tl.float32) * z[None, :], axis=1)
            M = _matrix(memory, rows, columns, F, V).to(OPERAND)
            numerator = tl.dot(phi, M, numerator, input_precision=PRECISION)
        share = tl.sigmoid(tl.load(gate_Q + head))
        if not GATED:
            share = tl.where(empty, 0.0, share)
        scale = share * _reciprocal(product)
        mixed = numerator * scale[:, None] + (1 - share) * from_local.to(tl.float32)
        output = output_GQNV + g * output_stride_g + head * output_stride_h
        _store_tile(output, output_stride_n, tokens, columns, N, V, mixed, FULL)


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
    grad_share_GQN,
    scale_GQN,
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
    H,
    SPLITS,
    GROUP: tl.constexpr,
    MAP: tl.constexpr,
    GATED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of queries, local outputs and shares, and the scales from which the memory's are summed.

    With P = d_output M^T the numerator need not be formed again: d_output . y is r (sigma(q) . P), r the
    reciprocal of the denominator, and d sigma(q) is share r P + dd z, where dd = -share r (d_output . y) is
    the denominator's gradient. One block a head; `wide` has the others.
    """
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    g, h = run_head // H, run_head % H
    rows = tl.arange(0, BLOCK_F)
    columns = tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    M = _matrix(memory_GHFV + run_head * F * V, rows, columns, F, V).to(OPERAND)
    z = tl.load(normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
    empty = tl.max(tl.abs(z), axis=0) == 0
    kept = 1.0
    if not GATED:
        kept = tl.where(empty, 0.0, 1.0)
    for step in tl.range(0, GROUP * tiles, num_stages=STAGES):
        head = h * GROUP + step // tiles
        tokens = (split * tiles + step % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        query = query_GQNF + g * query_stride_g + head * query_stride_h
        local = local_GQNV + g * local_stride_g + head * local_stride_h
        grad_output = grad_output_GQNV + g * output_stride_g + head * output_stride_h
        x = _tile(query, query_stride_n, tokens, rows, N, F, FULL)
        gradient = _tile(grad_output, output_stride_n, tokens, columns, N, V, FULL)
        from_local = _tile(local, local_stride_n, tokens, columns, N, V, FULL)
        share = kept * tl.sigmoid(tl.load(gate_Q + head))

        grad_local = grad_local_GQNV + g * grad_local_stride_g + head * grad_local_stride_h
        scaled = (1 - share) * gradient.to(tl.float32)
        _store_tile(grad_local, grad_local_stride_n, tokens, columns, N, V, scaled, FULL)
        local_products = tl.sum(gradient.to(tl.float32) * from_local.to(tl.float32), axis=1)

        P = tl.dot(gradient.to(OPERAND), tl.trans(M), input_precision=PRECISION)
        phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, FULL).to(tl.float32)
        reciprocal = _reciprocal(tl.sum(phi * z[None, :], axis=1))
        read_products = reciprocal * tl.sum(phi * P, axis=1)
        scale = share * reciprocal
        denominator_grad = -scale * read_products
        grad_x = scale[:, None] * P + denominator_grad[:, None] * z[None, :]
        grad_x *= _features_slope(x.to(tl.float32), MAP)
        grad_query = grad_query_GQNF + g * grad_query_stride_g + head * grad_query_stride_h
        _store_tile(grad_query, grad_query_stride_n, tokens, rows, N, F, grad_x, FULL)

        place = (g * H * GROUP + head) * N + tokens
        tl.store(grad_share_GQN + place, kept * (read_products - local_products), mask=tokens < N)
        tl.store(scale_GQN + place, scale, mask=tokens < N)
        tl.store(denominator_grad_GQN + place, denominator_grad, mask=tokens < N)


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
    SPLITS,
    MAP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """-r^2 (sigma(K) S sigma(K)^T) / 2 per token, S = dA + dA^T: the gradient of sigma(K) z in A_s."""
    first_rows = tl.arange(0, BLOCK_F)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    key = key_GHNF + run_head // H * stride_g + run_head % H * stride_h
    grad_removal = grad_removal_GHFF + run_head * F * F
    first_S = _matrix(grad_removal, first_rows, first_rows, F, F).to(OPERAND)
    for step in tl.range(0, tiles, num_stages=STAGES):
        tokens = (split * tiles + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        x = _tile(key, stride_n, tokens, first_rows, N, F, FULL)
        first_phi = _mapped(x, tokens, first_rows, N, F, MAP, OPERAND, FULL)
        total = tl.zeros((BLOCK_N,), tl.float32)
        for block in tl.static_range(BLOCKS_F):
            columns = block * BLOCK_F + first_rows
            phi = first_phi
            S = first_S
            if block > 0:
                y = _tile(key, stride_n, tokens, columns, N, F, FULL)
                phi = _mapped(y, tokens, columns, N, F, MAP, OPERAND, FULL)
                S = _matrix(grad_removal, first_rows, columns, F, F).to(OPERAND)
            product = tl.dot(first_phi, S, input_precision=PRECISION)
            for inner in tl.static_range(1, BLOCKS_F):
                others = inner * BLOCK_F + first_rows
                y = _tile(key, stride_n, tokens, others, N, F, FULL)
                psi = _mapped(y, tokens, others, N, F, MAP, OPERAND, FULL)
                S = _matrix(grad_removal, others, columns, F, F).to(OPERAND)
                product = tl.dot(psi, S, product, input_precision=PRECISION)
            total += tl.sum(product * phi.to(tl.float32), axis=1)
        place = run_head * N + tokens
        reciprocal = tl.load(reciprocal_GHN + place, mask=tokens < N, other=0.0)
        gradient = -0.5 * total * reciprocal * reciprocal
        tl.store(denominator_grad_GHN + place, gradient, mask=tokens < N)


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
    SPLITS,
    MAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DELTA: tl.constexpr,
    ADDED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of keys and values from those of the run's sums B, z and, for delta, A; one block a head.

    `more` is a gradient of the values from elsewhere, to be added if ADDED.
    """
    rows = tl.arange(0, BLOCK_F)
    columns = tl.arange(0, BLOCK_V)
    tiles = tl.cdiv(tl.cdiv(N, BLOCK_N), SPLITS)
    split, run_head = tl.program_id(0) % SPLITS, (tl.program_id(0) // SPLITS).to(tl.int64)
    g, h = run_head // H, run_head % H
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weight_G + g)
    dB = (weight * _matrix(grad_memory_GHFV + run_head * F * V, rows, columns, F, V)).to(OPERAND)
    grad_z = weight * tl.load(grad_normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
    if DELTA:
        S = _matrix(grad_removal_GHFF + run_head * F * F, rows, rows, F, F).to(OPERAND)
        z = tl.load(normalizer_GHF + run_head * F + rows, mask=rows < F, other=0.0)
    for step in tl.range(0, tiles, num_stages=STAGES):
        tokens = (split * tiles + step) * BLOCK_N + tl.arange(0, BLOCK_N)
        key = key_GHNF + g * key_stride_g + h * key_stride_h
        value = value_GHNV + g * value_stride_g + h * value_stride_h
        x = _tile(key, key_stride_n, tokens, rows, N, F, FULL)
        values = _tile(value, value_stride_n, tokens, columns, N, V, FULL).to(OPERAND)
        phi = _mapped(x, tokens, rows, N, F, MAP, OPERAND, FULL)

        grad_values = tl.dot(phi, dB, input_precision=PRECISION)
        if ADDED:
            more = more_GHNV + g * more_stride_g + h * more_stride_h
            grad_values += _tile(more, more_stride_n, tokens, columns, N, V, FULL).to(tl.float32)
        grad_value = grad_value_GHNV + g * grad_value_stride_g + h * grad_value_stride_h
        _store_tile(grad_value, grad_value_stride_n, tokens, columns, N, V, grad_values, FULL)

        grad_phi = tl.dot(values, tl.trans(dB), input_precision=PRECISION) + grad_z[None, :]
        if DELTA:
            place = run_head * N + tokens
            reciprocal = tl.load(reciprocal_GHN + place, mask=tokens < N, other=0.0)
            denominator_grad = tl.load(denominator_grad_GHN + place, mask=tokens < N, other=0.0)
            product = tl.dot(phi, S, input_precision=PRECISION)
            grad_phi += reciprocal[:, None] * product + denominator_grad[:, None] * z[None, :]
        grad_x = grad_phi * _features_slope(x.to(tl.float32), MAP)
        grad_key = grad_key_GHNF + g * grad_key_stride_g + h * grad_key_stride_h
        _store_tile(grad_key, grad_key_stride_n, tokens, rows, N, F, grad_x, FULL)
