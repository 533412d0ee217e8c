"""Spectral normalisation of a group of weights: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, Ŵ = W/σ, and dW = (G − ⟨G, W⟩/σ·uvᵀ)/σ.

A program owns a block of BLOCK_ROWS rows of one weight, in every launch. An iteration is three launches: r_b = W_b v
and, while W_b is in the cache, s_b = W_bᵀ r_b; then u = r/‖r‖ and t = Wᵀu = Σ_b s_b / ‖r‖; then v = t/‖t‖ and W/σ. The
blocks' sums are added in the order of the blocks, in double: no atomics, always the same bits. Wᵀ(Wv) would leave the
range of fp32 where W is near 1e15 or 1e-15, so s_b is that of r_b / 2^e with a power of two of the block's own.

What is known of the weights (addresses, sizes) are arguments of the first launch, which leaves them in device memory
for the next ones. WEIGHT, NORMALIZED, VECTOR and SUM are the dtypes of W, Ŵ, v and the arithmetic; v stays in SUM from
one iteration to the next.
"""

import triton
import triton.language as tl

BLOCK_ROWS: tl.constexpr = tl.constexpr(8)  # what is written of s_b is 1/8 of what was read of W_b
GROUP: tl.constexpr = tl.constexpr(32)  # weights of a group: their records fill 3 of the 4 KB of kernel arguments
FLAT: tl.constexpr = tl.constexpr(2048)  # elements of a tile where a block is a run of memory
SUMS: tl.constexpr = tl.constexpr(256)  # blocks' sums that are loaded at once

LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}

# Triton makes a constant of an argument 1, marks multiples of 16 and takes small integers as 32-bit ones: a compilation
# for each pattern. Odd numbers above 2^62 are plain 64-bit integers to it.
CODE_OF_ZERO: tl.constexpr = tl.constexpr(2**62 + 1)


# ---- records: the fields of a group are tuples of GROUP codes; field 0 is the first program of each weight ----

# first, rows, columns, inner, workspace, weight, v, u, sigma, normalized, u_new, v_new
FORWARD_FIELDS: tl.constexpr = tl.constexpr(12)
# first, rows, columns, inner, workspace, weight, gradient, u, v, sigma, weight_gradient
BACKWARD_FIELDS: tl.constexpr = tl.constexpr(11)


@triton.jit
def _decode(code):
    return (code - CODE_OF_ZERO) >> 1


@triton.jit
def _replace_where(condition, record, fields, i: tl.constexpr):
    replaced = ()
    for k in tl.static_range(len(record)):
        replaced += (tl.where(condition, fields[k][i], record[k]),)
    return replaced


@triton.jit
def _take_record(fields, table, program, COUNT: tl.constexpr):
    """The first ``COUNT`` fields of the weight to which the program belongs, searched in branches of eight weights.

    A weight's first program writes the whole record into ``table`` [GROUP, fields].
    """
    code = program * 2 + CODE_OF_ZERO
    record = ()
    for k in tl.static_range(COUNT):
        record += (fields[k][0],)
    for start in tl.static_range(0, GROUP, 8):
        if code >= fields[0][start]:
            for i in tl.static_range(start, start + 8):
                record = _replace_where(code >= fields[0][i], record, fields, i)
                if code == fields[0][i]:
                    for k in tl.static_range(len(fields)):
                        tl.store(table + i * len(fields) + k, _decode(fields[k][i]))
    decoded = ()
    for k in tl.static_range(COUNT):
        decoded += (_decode(record[k]),)
    return decoded


@triton.jit
def _read_record(table, count, program, FIELDS: tl.constexpr):
    """The record of the weight to which the program belongs, out of ``count``."""
    i = tl.arange(0, GROUP)
    first = tl.load(table + i * FIELDS, mask=i < count, other=2**62)
    table += (tl.sum((first <= program).to(tl.int32)) - 1) * FIELDS
    record = ()
    for k in tl.static_range(FIELDS):
        record += (tl.load(table + k),)
    return record


# ---- addresses ----


@triton.jit
def _number_of_blocks(rows):
    return tl.maximum((rows + BLOCK_ROWS - 1) // BLOCK_ROWS, 1)


@triton.jit
def _workspace(address, blocks, columns, SUM: tl.constexpr):
    norms = address.to(tl.pointer_type(tl.float64))  # [blocks] ‖r_b‖²
    squares = norms + blocks  # [blocks] parts of ‖t‖², or of uᵀr
    t = squares + blocks  # [columns]
    r = (t + columns).to(tl.pointer_type(SUM))  # [blocks · BLOCK_ROWS]
    sums = r + blocks * BLOCK_ROWS  # [blocks, columns] s_b / 2^e
    scales = sums + blocks * columns  # [blocks] 2^e
    return norms, squares, t, r, sums, scales


@triton.jit
def _is_aligned(addresses, columns, SUM: tl.constexpr):
    return (addresses % 16 == 0) & (columns % (128 // SUM.primitive_bitwidth) == 0)


@triton.jit
def _pointer(address, TYPE: tl.constexpr, SUM: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:  # so that the compiler takes several elements at once: those of 16 bytes of SUM
        pointer = tl.multiple_of(pointer, 16 * TYPE.primitive_bitwidth // SUM.primitive_bitwidth)
    return pointer


@triton.jit
def _row_length(columns, SUM: tl.constexpr, ALIGNED: tl.constexpr):
    VECTOR: tl.constexpr = 128 // SUM.primitive_bitwidth
    return columns // VECTOR * VECTOR if ALIGNED else columns


@triton.jit
def _element(column, columns, inner):
    """The element of v that belongs to a column in memory."""
    return (column % inner) * (columns // inner) + column // inner


@triton.jit
def _load_v(v, column, columns, inner, VECTOR: tl.constexpr, SUM: tl.constexpr):
    """The elements of v that belong to columns in memory, several at once where that can be."""
    mask = column < columns
    if inner == columns:
        if v % 16 == 0:
            element = tl.load(_pointer(v, VECTOR, SUM, True) + column, mask=mask, other=0.0)
        else:
            element = tl.load(_pointer(v, VECTOR, SUM, False) + column, mask=mask, other=0.0)
    else:
        element = tl.load(_pointer(v, VECTOR, SUM, False) + _element(column, columns, inner), mask=mask, other=0.0)
    return element.to(SUM)


@triton.jit
def _sum(pointer, count):
    total = tl.zeros([SUMS], tl.float64)
    for start in range(0, count, SUMS):
        i = start + tl.arange(0, SUMS)
        total += tl.load(pointer + i, mask=i < count, other=0.0)
    return tl.sum(total)


# ---- forward ----


@triton.jit
def _multiply(
    weight,
    v,
    rows,
    columns,
    inner,
    workspace,
    block,
    power,
    WEIGHT: tl.constexpr,
    VECTOR: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    # 128 threads with 16 bytes of every row: each has all rows of its columns, and s_b needs no exchange.
    COLUMNS: tl.constexpr = 16384 // SUM.primitive_bitwidth
    norms, _, _, r_pointer, sums, scales = _workspace(workspace, _number_of_blocks(rows), columns, SUM)
    columns = _row_length(columns, SUM, ALIGNED)
    sums += block * columns
    if ALIGNED:
        sums = tl.multiple_of(sums, 16)
    row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    # Beyond the last row the last one is read again: a mask for every column, not for every element.
    weight = _pointer(weight, WEIGHT, SUM, ALIGNED) + tl.minimum(row, rows - 1) * columns

    products = tl.zeros([BLOCK_ROWS, COLUMNS], SUM)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _load_v(v, column, columns, inner, VECTOR, SUM)
        w = tl.load(weight + column[None, :], mask=(column < columns)[None, :], other=0.0)
        products += w.to(SUM) * x[None, :]
    r = tl.where(row < rows, tl.sum(products, 1, keep_dims=True), 0.0)
    tl.store(r_pointer + row, r)

    if power:
        r64 = r.to(tl.float64)
        tl.store(norms + block, tl.sum(r64 * r64))
        if SUM.is_fp32():
            exponent = (tl.max(tl.abs(r)).to(tl.int32, bitcast=True) >> 23) & 255
            exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # so that 2^e and 2^-e are normal numbers
            tl.store(scales + block, (exponent << 23).to(tl.float32, bitcast=True))
            r *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        else:
            tl.store(scales + block, 1.0)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            w = tl.load(weight + column[None, :], mask=(column < columns)[None, :], other=0.0)
            tl.store(sums + column, tl.sum(w.to(SUM) * r, 0), mask=column < columns)


@triton.jit(do_not_specialize=["power"])
def spectral_norm_forward_products_kernel(
    fields, table, power, WEIGHT: tl.constexpr, VECTOR: tl.constexpr, SUM: tl.constexpr
):
    """r = Wv and, with ``power``, ‖r_b‖² and s_b = W_bᵀ r_b."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, weight, v = _take_record(fields, table, program, 7)
    block = program - first
    if _is_aligned(weight, columns, SUM):
        _multiply(weight, v, rows, columns, inner, workspace, block, power, WEIGHT, VECTOR, SUM, True)
    else:
        _multiply(weight, v, rows, columns, inner, workspace, block, power, WEIGHT, VECTOR, SUM, False)


@triton.jit(do_not_specialize=["count", "power"])
def spectral_norm_forward_sums_kernel(table, count, power, eps: tl.float64, WEIGHT: tl.constexpr, SUM: tl.constexpr):
    """u = r/‖r‖, t = Σ_b s_b/‖r‖ and parts of ‖t‖²; without ``power`` copies of u and v, and parts of uᵀr."""
    BLOCKS: tl.constexpr = 32
    COLUMNS: tl.constexpr = 32
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, _, workspace, _, v, u, _, _, u_new, v_new = _read_record(
        table, count, program, FORWARD_FIELDS
    )
    block = program - first
    blocks = _number_of_blocks(rows)
    norms, squares, t_pointer, r_pointer, sums, scales = _workspace(workspace, blocks, columns, SUM)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.load(r_pointer + row).to(tl.float64)
    u_new = u_new.to(tl.pointer_type(WEIGHT)) + row

    if power:
        norm = tl.sqrt(_sum(norms, blocks))
        length = tl.where(norm < eps, eps, norm)  # a NaN stays one
        tl.store(u_new, (r / length).to(SUM).to(WEIGHT), mask=row < rows)
        square = tl.zeros([COLUMNS], tl.float64)
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            t = tl.zeros([BLOCKS, COLUMNS], tl.float64)
            for start_block in range(0, blocks, BLOCKS):
                b = start_block + tl.arange(0, BLOCKS)
                scale = tl.load(scales + b, mask=b < blocks, other=0.0).to(tl.float64)
                mask = (b < blocks)[:, None] & (column < columns)[None, :]
                s = tl.load(sums + b[:, None] * columns + column[None, :], mask=mask, other=0.0)
                t += s.to(tl.float64) * scale[:, None]
            t = tl.sum(t, 0) / length
            tl.store(t_pointer + column, t, mask=column < columns)
            square += t * t
        tl.store(squares + block, tl.sum(square))
    else:
        left = tl.load(u.to(tl.pointer_type(WEIGHT)) + row, mask=row < rows, other=0.0)
        tl.store(u_new, left, mask=row < rows)
        tl.store(squares + block, tl.sum(left.to(SUM).to(tl.float64) * r))
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            right = tl.load(v.to(tl.pointer_type(WEIGHT)) + column, mask=column < columns)
            tl.store(v_new.to(tl.pointer_type(WEIGHT)) + column, right, mask=column < columns)


@triton.jit
def _divide(
    weight,
    normalized,
    sigma,
    rows,
    columns,
    block,
    WEIGHT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    weight, normalized = _pointer(weight, WEIGHT, SUM, ALIGNED), _pointer(normalized, NORMALIZED, SUM, ALIGNED)
    columns = _row_length(columns, SUM, ALIGNED)
    end = tl.minimum((block + 1) * BLOCK_ROWS, rows) * columns
    for start in range(block * BLOCK_ROWS * columns, end, FLAT):
        i = start + tl.arange(0, FLAT)
        w = tl.load(weight + i, mask=i < end, other=0.0)
        tl.store(normalized + i, (w.to(SUM) / sigma).to(NORMALIZED), mask=i < end)


@triton.jit(do_not_specialize=["count", "power", "divide"])
def spectral_norm_forward_scale_kernel(
    table,
    count,
    power,
    divide,
    eps: tl.float64,
    WEIGHT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    VECTOR: tl.constexpr,
    SUM: tl.constexpr,
):
    """σ = ‖t‖²/max(‖t‖, eps), v = t/max(‖t‖, eps) and, with ``divide``, Ŵ = W/σ; without ``power`` σ = uᵀr."""
    COLUMNS: tl.constexpr = 256
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, weight, _, _, sigma_new, normalized, _, v_new = _read_record(
        table, count, program, FORWARD_FIELDS
    )
    block = program - first
    blocks = _number_of_blocks(rows)
    _, squares, t, _, _, _ = _workspace(workspace, blocks, columns, SUM)
    sigma = _sum(squares, blocks)
    if power:
        norm = tl.sqrt(sigma)
        length = tl.where(norm < eps, eps, norm)
        sigma /= length
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            v = (tl.load(t + column, mask=column < columns) / length).to(SUM).to(VECTOR)
            tl.store(v_new.to(tl.pointer_type(VECTOR)) + _element(column, columns, inner), v, mask=column < columns)
    sigma = sigma.to(SUM)
    if block == 0:
        tl.store(sigma_new.to(tl.pointer_type(SUM)), sigma)
    if divide:
        if _is_aligned(weight | normalized, columns, SUM):
            _divide(weight, normalized, sigma, rows, columns, block, WEIGHT, NORMALIZED, SUM, True)
        else:
            _divide(weight, normalized, sigma, rows, columns, block, WEIGHT, NORMALIZED, SUM, False)


# ---- backward ----


@triton.jit
def _dot(
    weight,
    gradient,
    rows,
    columns,
    block,
    WEIGHT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    weight, gradient = _pointer(weight, WEIGHT, SUM, ALIGNED), _pointer(gradient, NORMALIZED, SUM, ALIGNED)
    columns = _row_length(columns, SUM, ALIGNED)
    end = tl.minimum((block + 1) * BLOCK_ROWS, rows) * columns
    products = tl.zeros([FLAT], SUM)
    for start in range(block * BLOCK_ROWS * columns, end, FLAT):
        i = start + tl.arange(0, FLAT)
        g = tl.load(gradient + i, mask=i < end, other=0.0)
        w = tl.load(weight + i, mask=i < end, other=0.0)
        products += g.to(SUM) * w.to(SUM)
    return tl.sum(products).to(tl.float64)


@triton.jit
def spectral_norm_backward_dots_kernel(
    fields, table, WEIGHT: tl.constexpr, NORMALIZED: tl.constexpr, SUM: tl.constexpr
):
    """⟨G_b, W_b⟩."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, _, workspace, weight, gradient = _take_record(fields, table, program, 7)
    block = program - first
    if _is_aligned(weight | gradient, columns, SUM):
        dot = _dot(weight, gradient, rows, columns, block, WEIGHT, NORMALIZED, SUM, True)
    else:
        dot = _dot(weight, gradient, rows, columns, block, WEIGHT, NORMALIZED, SUM, False)
    tl.store(workspace.to(tl.pointer_type(tl.float64)) + block, dot)


@triton.jit
def _subtract(
    gradient,
    weight_gradient,
    factor,
    sigma,
    u,
    v,
    rows,
    columns,
    inner,
    block,
    WEIGHT: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SUM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    COLUMNS: tl.constexpr = 16384 // SUM.primitive_bitwidth
    columns = _row_length(columns, SUM, ALIGNED)
    row = (block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS))[:, None]
    gradient = _pointer(gradient, NORMALIZED, SUM, ALIGNED) + row * columns
    weight_gradient = _pointer(weight_gradient, WEIGHT, SUM, ALIGNED) + row * columns
    left = tl.load(u.to(tl.pointer_type(WEIGHT)) + row, mask=row < rows, other=0.0).to(SUM) * factor
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < rows) & (column < columns)[None, :]
        right = _load_v(v, column, columns, inner, WEIGHT, SUM)[None, :]
        g = tl.load(gradient + column[None, :], mask=mask, other=0.0).to(SUM)
        tl.store(weight_gradient + column[None, :], ((g - left * right) / sigma).to(WEIGHT), mask=mask)


@triton.jit(do_not_specialize=["count"])
def spectral_norm_backward_gradient_kernel(
    table, count, WEIGHT: tl.constexpr, NORMALIZED: tl.constexpr, SUM: tl.constexpr
):
    """dW = (G − ⟨G, W⟩/σ·uvᵀ)/σ."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, _, gradient, u, v, sigma, weight_gradient = _read_record(
        table, count, program, BACKWARD_FIELDS
    )
    block = program - first
    sigma = tl.load(sigma.to(tl.pointer_type(SUM)))
    dot = _sum(workspace.to(tl.pointer_type(tl.float64)), _number_of_blocks(rows))
    factor = (dot / sigma.to(tl.float64)).to(SUM)
    if _is_aligned(gradient | weight_gradient, columns, SUM):
        _subtract(
            gradient, weight_gradient, factor, sigma, u, v, rows, columns, inner, block, WEIGHT, NORMALIZED, SUM, True
        )
    else:
        _subtract(
            gradient, weight_gradient, factor, sigma, u, v, rows, columns, inner, block, WEIGHT, NORMALIZED, SUM, False
        )
