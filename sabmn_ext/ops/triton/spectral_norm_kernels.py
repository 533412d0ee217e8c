"""Spectral normalisation of a group of weights: u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, Ŵ = W/σ, and dW = (G − ⟨G, W⟩/σ·uvᵀ)/σ.

A program owns a block of ``BLOCK_ROWS`` rows of one weight in every launch. The weights' records (addresses and sizes) are
arguments of the first launch, which leaves them in the workspace for the next ones.

One iteration: the first launch gives r_b = W_b v and, while W_b is in the cache, s_b = W_bᵀ r_b, so that
Wᵀu = Σ_b s_b / ‖r‖. The block sums are added in the order of the blocks, in double: no atomics, the same bits always.
In fp32 Wᵀ(Wv) overflows where W is near 1e15, so s_b is taken from r_b / 2^e with a power of two of the block's own.
"""

import triton
import triton.language as tl

BLOCK_ROWS: tl.constexpr = tl.constexpr(8)  # rows of a block: s_b, of one row's length, is 1/8 of what was read
GROUP: tl.constexpr = tl.constexpr(32)  # weights of a group: their records fill 3 of the 4 KB of kernel arguments
FLAT: tl.constexpr = tl.constexpr(2048)  # elements of a tile of the launches that do not see rows and columns
SUMS: tl.constexpr = tl.constexpr(256)  # block sums that are loaded at once

# Triton makes a constant of an argument 1, marks multiples of 16 and takes small integers as 32-bit ones: one
# compilation for each pattern. Odd numbers above 2^62 are plain 64-bit integers to it.
CODE_OF_ZERO: tl.constexpr = tl.constexpr(2**62 + 1)


# ---- records: a field is a tuple of GROUP codes; field 0 is each weight's first program ----


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
    for eighth in tl.static_range(0, GROUP, 8):
        if code >= fields[0][eighth]:
            for i in tl.static_range(eighth, eighth + 8):
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


# ---- blocks and addresses ----


@triton.jit
def _number_of_blocks(rows):
    return tl.maximum((rows + BLOCK_ROWS - 1) // BLOCK_ROWS, 1)


@triton.jit
def _pointer(address, T: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(T))
    if ALIGNED:  # so that the compiler loads several elements at once: 16 bytes of S
        pointer = tl.multiple_of(pointer, 16 * T.primitive_bitwidth // S.primitive_bitwidth)
    return pointer


@triton.jit
def _row_length(columns, S: tl.constexpr, ALIGNED: tl.constexpr):
    VECTOR: tl.constexpr = 128 // S.primitive_bitwidth
    return columns // VECTOR * VECTOR if ALIGNED else columns


@triton.jit
def _is_aligned(addresses, columns, S: tl.constexpr):
    return (addresses % 16 == 0) & (columns % (128 // S.primitive_bitwidth) == 0)


@triton.jit
def _element(column, columns, inner):
    """The element of v to which a column in memory belongs."""
    return (column % inner) * (columns // inner) + column // inner


@triton.jit
def _load_v(v, column, columns, inner):
    if inner == columns:  # no division, and neighbours at once
        element = tl.load(v + column, mask=column < columns, other=0.0)
    else:
        element = tl.load(v + _element(column, columns, inner), mask=column < columns, other=0.0)
    return element


# ---- the workspace of a weight: five vectors, then the block sums ----


@triton.jit
def _workspace(address, blocks, columns, S: tl.constexpr):
    norms = address.to(tl.pointer_type(tl.float64))  # [blocks] ‖r_b‖²
    squares = norms + blocks  # [blocks] parts of ‖t‖², or of uᵀWv
    t = squares + blocks  # [columns] Wᵀu
    r = (t + columns).to(tl.pointer_type(S))  # [blocks · BLOCK_ROWS] Wv
    sums = r + blocks * BLOCK_ROWS  # [blocks, columns] s_b / 2^e
    return norms, squares, t, r, sums, sums + blocks * columns  # the last: [blocks] 2^e


@triton.jit
def _sum(pointer, count):
    total = tl.zeros([SUMS], tl.float64)
    for start in range(0, count, SUMS):
        i = start + tl.arange(0, SUMS)
        total += tl.load(pointer + i, mask=i < count, other=0.0)
    return tl.sum(total)


@triton.jit
def _at_least(value, eps):
    return tl.where(value < eps, eps, value)  # a NaN stays one


# ---- forward ----


@triton.jit
def _multiply(weight, v, rows, columns, inner, workspace, block, power, T: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    COLUMNS: tl.constexpr = 16384 // S.primitive_bitwidth  # a thread holds all rows of its columns
    blocks = _number_of_blocks(rows)
    norms, _, _, r_pointer, sums, scales = _workspace(workspace, blocks, columns, S)
    if ALIGNED:
        sums = tl.multiple_of(sums, 16)
    columns = _row_length(columns, S, ALIGNED)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    # Beyond the last row the last one is read again: a mask for every column, not for every element.
    weight = _pointer(weight, T, S, ALIGNED) + tl.minimum(row, rows - 1)[:, None] * columns
    v = _pointer(v, T, S, ALIGNED)

    products = tl.zeros([BLOCK_ROWS, COLUMNS], S)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = _load_v(v, column, columns, inner)
        w = tl.load(weight + column[None, :], mask=(column < columns)[None, :], other=0.0)
        products += w.to(S) * x.to(S)[None, :]
    row = row[:, None]
    r = tl.where(row < rows, tl.sum(products, 1, keep_dims=True), 0.0)
    tl.store(r_pointer + row, r)

    if power:
        r64 = r.to(tl.float64)
        tl.store(norms + block, tl.sum(r64 * r64))
        if S == tl.float32:
            exponent = (tl.max(tl.abs(r)).to(tl.int32, bitcast=True) >> 23) & 255
            exponent = tl.minimum(tl.maximum(exponent, 1), 253)  # 2^e and 2^-e are normal numbers
            tl.store(scales + block, (exponent << 23).to(tl.float32, bitcast=True))
            r *= ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        else:
            tl.store(scales + block, 1.0)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            w = tl.load(weight + column[None, :], mask=(column < columns)[None, :], other=0.0)
            s = tl.sum(w.to(S) * r, 0)
            tl.store(sums + block * columns + column, s, mask=column < columns)


@triton.jit(do_not_specialize=["power"])
def spectral_norm_forward_products_kernel(fields, table, power, T: tl.constexpr, S: tl.constexpr):
    """r = Wv, and with ``power`` ‖r_b‖² and s_b = W_bᵀ r_b, for every block of rows."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, weight, v = _take_record(fields, table, program, 7)
    if _is_aligned(weight | v, columns, S):
        _multiply(weight, v, rows, columns, inner, workspace, program - first, power, T, S, True)
    else:
        _multiply(weight, v, rows, columns, inner, workspace, program - first, power, T, S, False)


@triton.jit(do_not_specialize=["count", "power"])
def spectral_norm_forward_sums_kernel(table, count, power, eps: tl.float64, T: tl.constexpr, S: tl.constexpr):
    """u = r/‖r‖, t = Σ_b s_b/‖r‖ and the parts of ‖t‖²; without ``power`` u and v as they were, and the parts of uᵀr."""
    COLUMNS: tl.constexpr = 32
    BLOCKS: tl.constexpr = 32
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, _, workspace, _, v, u, _, _, u_new, v_new = _read_record(table, count, program, 12)
    block = program - first
    blocks = _number_of_blocks(rows)
    norms, squares, t_pointer, r_pointer, sums, scales = _workspace(workspace, blocks, columns, S)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r = tl.load(r_pointer + row).to(tl.float64)
    u_new = u_new.to(tl.pointer_type(T)) + row

    if power:
        length = _at_least(tl.sqrt(_sum(norms, blocks)), eps)
        tl.store(u_new, (r / length).to(S).to(T), mask=row < rows)
        square = tl.zeros([COLUMNS], tl.float64)
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            t = tl.zeros([BLOCKS, COLUMNS], tl.float64)
            for other in range(0, blocks, BLOCKS):
                b = other + tl.arange(0, BLOCKS)
                scale = tl.load(scales + b, mask=b < blocks, other=0.0).to(tl.float64)
                mask = (b < blocks)[:, None] & (column < columns)[None, :]
                s = tl.load(sums + b[:, None] * columns + column[None, :], mask=mask, other=0.0)
                t += s.to(tl.float64) * scale[:, None]
            t = tl.sum(t, 0) / length
            tl.store(t_pointer + column, t, mask=column < columns)
            square += t * t
        tl.store(squares + block, tl.sum(square))
    else:
        left = tl.load(u.to(tl.pointer_type(T)) + row, mask=row < rows, other=0.0)
        tl.store(u_new, left, mask=row < rows)
        tl.store(squares + block, tl.sum(left.to(S).to(tl.float64) * r))
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            right = tl.load(v.to(tl.pointer_type(T)) + column, mask=column < columns)
            tl.store(v_new.to(tl.pointer_type(T)) + column, right, mask=column < columns)


@triton.jit
def _divide(weight, normalized, sigma, rows, columns, block, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    weight, normalized = _pointer(weight, T, S, ALIGNED), _pointer(normalized, O, S, ALIGNED)
    columns = _row_length(columns, S, ALIGNED)
    end = tl.minimum((block + 1) * BLOCK_ROWS, rows) * columns
    for start in range(block * BLOCK_ROWS * columns, end, FLAT):
        i = start + tl.arange(0, FLAT)
        w = tl.load(weight + i, mask=i < end)
        tl.store(normalized + i, (w.to(S) / sigma).to(O), mask=i < end)


@triton.jit(do_not_specialize=["count", "power", "divide"])
def spectral_norm_forward_scale_kernel(
    table, count, power, divide, eps: tl.float64, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr
):
    """σ = ‖t‖²/max(‖t‖, eps), v = t/max(‖t‖, eps) and, with ``divide``, Ŵ = W/σ; without ``power`` σ = uᵀr."""
    COLUMNS: tl.constexpr = 256
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, weight, _, _, sigma_new, normalized, _, v_new = _read_record(
        table, count, program, 12
    )
    block = program - first
    blocks = _number_of_blocks(rows)
    _, squares, t, _, _, _ = _workspace(workspace, blocks, columns, S)
    sigma = _sum(squares, blocks)
    if power:
        length = _at_least(tl.sqrt(sigma), eps)
        sigma /= length
        for start in range(block * COLUMNS, columns, blocks * COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            v = (tl.load(t + column, mask=column < columns) / length).to(S).to(T)
            tl.store(v_new.to(tl.pointer_type(T)) + _element(column, columns, inner), v, mask=column < columns)
    sigma = sigma.to(S)
    if block == 0:
        tl.store(sigma_new.to(tl.pointer_type(S)), sigma)
    if divide:
        if _is_aligned(weight | normalized, columns, S):
            _divide(weight, normalized, sigma, rows, columns, block, T, O, S, True)
        else:
            _divide(weight, normalized, sigma, rows, columns, block, T, O, S, False)


# ---- backward ----


@triton.jit
def _dot(weight, gradient, rows, columns, block, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr):
    weight, gradient = _pointer(weight, T, S, ALIGNED), _pointer(gradient, O, S, ALIGNED)
    columns = _row_length(columns, S, ALIGNED)
    end = tl.minimum((block + 1) * BLOCK_ROWS, rows) * columns
    products = tl.zeros([FLAT], S)
    for start in range(block * BLOCK_ROWS * columns, end, FLAT):
        i = start + tl.arange(0, FLAT)
        w = tl.load(weight + i, mask=i < end, other=0.0)
        products += tl.load(gradient + i, mask=i < end, other=0.0).to(S) * w.to(S)
    return tl.sum(products).to(tl.float64)


@triton.jit
def spectral_norm_backward_dots_kernel(fields, table, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr):
    """⟨G_b, W_b⟩ for every block of rows."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, _, workspace, weight, gradient = _take_record(fields, table, program, 7)
    if _is_aligned(weight | gradient, columns, S):
        dot = _dot(weight, gradient, rows, columns, program - first, T, O, S, True)
    else:
        dot = _dot(weight, gradient, rows, columns, program - first, T, O, S, False)
    tl.store(workspace.to(tl.pointer_type(tl.float64)) + program - first, dot)


@triton.jit
def _subtract(
    gradient, result, factor, sigma, u, v, rows, columns, inner, block, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr, ALIGNED: tl.constexpr
):
    COLUMNS: tl.constexpr = 16384 // S.primitive_bitwidth
    columns = _row_length(columns, S, ALIGNED)
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    gradient = _pointer(gradient, O, S, ALIGNED) + row[:, None] * columns
    result = _pointer(result, T, S, ALIGNED) + row[:, None] * columns
    u = tl.load(u.to(tl.pointer_type(T)) + row, mask=row < rows, other=0.0).to(S) * factor
    v = _pointer(v, T, S, ALIGNED)
    for start in range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        x = _load_v(v, column, columns, inner).to(S)
        g = tl.load(gradient + column[None, :], mask=mask).to(S)
        tl.store(result + column[None, :], ((g - u[:, None] * x[None, :]) / sigma).to(T), mask=mask)


@triton.jit(do_not_specialize=["count"])
def spectral_norm_backward_gradient_kernel(table, count, T: tl.constexpr, O: tl.constexpr, S: tl.constexpr):
    """dW = (G − ⟨G, W⟩/σ·uvᵀ)/σ."""
    program = tl.program_id(0).to(tl.int64)
    first, rows, columns, inner, workspace, _, gradient, u, v, sigma, result = _read_record(table, count, program, 11)
    block = program - first
    sigma = tl.load(sigma.to(tl.pointer_type(S)))
    dots = workspace.to(tl.pointer_type(tl.float64))
    factor = (_sum(dots, _number_of_blocks(rows)) / sigma.to(tl.float64)).to(S)
    if _is_aligned(gradient | result | v, columns, S):
        _subtract(gradient, result, factor, sigma, u, v, rows, columns, inner, block, T, O, S, True)
    else:
        _subtract(gradient, result, factor, sigma, u, v, rows, columns, inner, block, T, O, S, False)
