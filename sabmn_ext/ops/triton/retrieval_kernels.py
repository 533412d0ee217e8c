"""Ranking by counting: products in float32 count what is certain, float64 distances in a fixed order count the rest.

The plan is that of csrc/retrieval/count_cpu.cpp, and so are the error bound and its proof. A program of the filter owns
BLOCK_QUERIES × BLOCK_ITEMS pairs: it multiplies their features, encloses each distance in [x − e, x + e], counts the
pairs that lie on one side of every true match and in one bin of the histogram, and flags the others, which are computed
exactly. Counters are integers, so the order of the atomic additions changes nothing.
"""

import triton
import triton.language as tl

BLOCK_QUERIES: tl.constexpr = tl.constexpr(64)
BLOCK_ITEMS: tl.constexpr = tl.constexpr(64)
DEPTH: tl.constexpr = tl.constexpr(16)  # features that are loaded at once
CHUNK: tl.constexpr = tl.constexpr(64)  # features summed before the sum is added to the others: keeps the bound small
BLOCK_PAIRS: tl.constexpr = tl.constexpr(64)
LANES: tl.constexpr = tl.constexpr(16)  # csrc/retrieval/retrieval.h, as are the bins
BIN_BITS: tl.constexpr = tl.constexpr(10)

# With 8 warps a thread takes 254 registers, and the multiprocessor holds 8 warps instead of 16.
FILTER_OPTIONS = {"num_warps": 16, "num_stages": 2, "enable_fp_fusion": True}
# Every product and every sum of the exact distances is rounded on its own.
EXACT_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

OPEN_RANK: tl.constexpr = tl.constexpr(1)  # flags of a pair: its place among the matches is not certain,
OPEN_BIN: tl.constexpr = tl.constexpr(2)  # or its bin


@triton.jit
def _product(a, b, dim):
    """Σ a b over the features, for pointers to the first feature of rows [queries, 1] and [1, items]."""
    k = tl.arange(0, DEPTH)
    product = tl.zeros([BLOCK_QUERIES, BLOCK_ITEMS], tl.float32)
    for chunk in range(0, dim, CHUNK):
        part = tl.zeros([BLOCK_QUERIES, BLOCK_ITEMS], tl.float32)
        for start in range(chunk, chunk + CHUNK, DEPTH):
            rows, columns = tl.load(a + (start + k)[None, :]), tl.load(b + (start + k)[:, None])
            part = tl.dot(rows, columns, part, input_precision="ieee")
        product += part
    return product


@triton.jit
def _bin_of_float(x, lowest, last):
    bits = tl.maximum(x.to(tl.int32, bitcast=True), 0)  # what is negative, −0 too, goes to the first bin
    return tl.minimum(tl.maximum(((bits - 1) >> (23 - BIN_BITS)) - lowest, 0), last)


@triton.jit(do_not_specialize=["num_queries", "num_items", "lowest", "last", "steps"])
def retrieval_filter_kernel(
    a,  # [Q, dim] float32; dim is a multiple of CHUNK
    b,  # [G, dim] float32
    query_values,  # [3, Q] float32: A, the factor of ‖b‖ in e, and the query's own part of e
    gallery_values,  # [3, G] float32: B, ‖b‖, and the item's own part of e
    query_pids,  # [Q] int32
    gallery_pids,  # [G] int32, no −1
    query_camids,  # [Q] int32
    gallery_camids,  # [G] int32
    offsets,  # [Q + 1] int64
    below,  # [M] float32: with the next, encloses the true match's distance, scaled as x is
    above,  # [M] float32
    between,  # [M] int64: takes the items that come between a query's true match and the one before it
    histogram,  # [last + 1] int64
    flags,  # [Q, G] uint8, written
    num_queries,
    num_items,
    dim,
    lowest,  # key of the first bin, for x in float32
    last,
    steps,  # of a search among the true matches
):
    q = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)[:, None]
    g = tl.program_id(0) * BLOCK_ITEMS + tl.arange(0, BLOCK_ITEMS)[None, :]
    inside = (q < num_queries) & (g < num_items)
    q, g = tl.minimum(q, num_queries - 1), tl.minimum(g, num_items - 1)
    product = _product(a + q.to(tl.int64) * dim, b + g.to(tl.int64) * dim, dim)

    x = (tl.load(query_values + q) + tl.load(gallery_values + g)) - 2.0 * product
    query_values += num_queries
    gallery_values += num_items
    e = tl.load(query_values + q) * tl.load(gallery_values + g)
    e += tl.load(query_values + num_queries + q) + tl.load(gallery_values + num_items + g)
    low, high = x - e, x + e

    pid = tl.load(query_pids + q)
    valid = inside & (pid != -1) & (pid != tl.load(gallery_pids + g))
    counted = valid & (tl.load(query_camids + q) != tl.load(gallery_camids + g))
    bin = _bin_of_float(low, lowest, last)
    one_bin = bin == _bin_of_float(high, lowest, last)
    tl.atomic_add(histogram + bin, 1, mask=counted & one_bin, sem="relaxed")

    begin = tl.load(offsets + q)
    count = (tl.load(offsets + q + 1) - begin).to(tl.int32)
    farthest = tl.load(above + begin + count - 1, mask=count > 0, other=float("-inf"))
    reached = valid & (low <= farthest)
    first = tl.where(reached, 0, count)  # the first match that is not certainly before the item
    left = tl.where(reached, count, 0)
    for _ in range(steps):
        half = left // 2
        before = tl.load(above + begin + (first + half), mask=left > 0, other=float("inf")) < low
        first = tl.where(before, first + half + 1, first)
        left = tl.where(before, left - half - 1, half)
    nearer = reached & (first < count)
    certain = tl.load(below + begin + first, mask=nearer, other=float("inf")) > high
    tl.atomic_add(between + begin + first, 1, mask=nearer & certain, sem="relaxed")

    flag = tl.where(nearer & ~certain, OPEN_RANK, 0) + tl.where(counted & ~one_bin, OPEN_BIN, 0)
    tl.store(flags + q.to(tl.int64) * num_items + g, flag.to(tl.uint8), mask=inside)


@triton.jit
def _add_halves(lanes):
    """[pairs, n] → [pairs, n / 2]"""
    PAIRS: tl.constexpr = lanes.shape[0]
    HALF: tl.constexpr = lanes.shape[1] // 2
    first, second = tl.split(tl.permute(tl.reshape(lanes, [PAIRS, 2, HALF]), [0, 2, 1]))
    return first + second


@triton.jit(do_not_specialize=["num_pairs"])
def retrieval_pair_sums_kernel(
    query,  # [Q, dim] by strides
    gallery,  # [G, dim] by strides
    query_indices,  # [M] int64
    gallery_indices,  # [M] int64
    sums,  # [M] float64, written: Σ q·g (DOT) or Σ (q − g)²
    num_pairs,
    dim,
    query_row_stride,
    query_column_stride,
    gallery_row_stride,
    gallery_column_stride,
    DOT: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)[:, None]
    inside = pair < num_pairs
    query += tl.load(query_indices + pair, mask=inside, other=0) * query_row_stride
    gallery += tl.load(gallery_indices + pair, mask=inside, other=0) * gallery_row_stride
    lanes = tl.zeros([BLOCK_PAIRS, LANES], tl.float64)
    for start in range(0, dim, LANES):
        k = (start + tl.arange(0, LANES)[None, :]).to(tl.int64)
        mask = inside & (k < dim)
        left = tl.load(query + k * query_column_stride, mask=mask, other=0.0).to(tl.float64)
        right = tl.load(gallery + k * gallery_column_stride, mask=mask, other=0.0).to(tl.float64)
        if DOT:
            lanes += left * right
        else:
            difference = left - right
            lanes += difference * difference
    total = _add_halves(_add_halves(_add_halves(_add_halves(lanes))))  # [pairs, 1]
    tl.store(sums + pair, total, mask=inside)


@triton.jit
def _bin_of_double(distance, lowest, negative, last):
    order = distance.to(tl.int64, bitcast=True)
    order = tl.where(order < 0, -(order & 0x7FFFFFFFFFFFFFFF), order)
    key = (order - 1) >> (52 - BIN_BITS)
    below_zero = tl.where(key < -lowest, key + lowest - 1, -1)
    bin = tl.where(key >= 0, tl.maximum(key - lowest, 0), below_zero) + negative
    return tl.minimum(tl.maximum(bin, 0), last)


@triton.jit(do_not_specialize=["num_pairs", "lowest", "negative", "last", "steps"])
def retrieval_count_kernel(
    flags,  # [pairs] uint8
    query_indices,  # [pairs] int64
    items,  # [pairs] int64, in the whole gallery
    distances,  # [pairs] float64
    offsets,  # [Q + 1] int64
    thresholds,  # [M] float64, the true matches' distances
    indices,  # [M] int64, their items
    between,  # [M] int64
    histogram,  # [last + 1] int64
    num_pairs,
    lowest,
    negative,
    last,
    steps,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < num_pairs
    flag = tl.load(flags + pair, mask=inside, other=0)
    distance = tl.load(distances + pair, mask=inside, other=0.0)
    item = tl.load(items + pair, mask=inside, other=0)
    bin = _bin_of_double(distance, lowest, negative, last)
    tl.atomic_add(histogram + bin, 1, mask=(flag & OPEN_BIN) != 0, sem="relaxed")

    query = tl.load(query_indices + pair, mask=inside, other=0)
    first = tl.load(offsets + query)
    end = tl.load(offsets + query + 1)
    left = end - first
    for _ in range(steps):
        half = left // 2
        threshold = tl.load(thresholds + first + half, mask=left > 0, other=float("inf"))
        index = tl.load(indices + first + half, mask=left > 0, other=0)
        before = (left > 0) & ((threshold < distance) | ((threshold == distance) & (index < item)))
        first = tl.where(before, first + half + 1, first)
        left = tl.where(before, left - half - 1, half)
    tl.atomic_add(between + first, 1, mask=((flag & OPEN_RANK) != 0) & (first < end), sem="relaxed")
