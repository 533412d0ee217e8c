"""Self-attention in one pass over the keys (Milakov and Gimelshein, 2018; FlashAttention), and its gradients.

Logits are products of BLOCK_QUERIES × BLOCK_KEYS positions, in fp32; the N×N map is stored nowhere. ``out`` and the
gradients are accumulated for VALUES or KEYS channels at once. Where that is all there are (``width <= KEYS``), a
program keeps its own queries or keys; wider ones are read again for every tile, KEYS or VALUES channels at a time, and
programs of axis 1 own a slice of the channels each. With context = w_outᵀ grad_y and, of every query j,
r_j = Σ_c context_cj out_cj:

    p_ji = exp(query_j · key_i − lse_j)     e_ji = p_ji (context_j · value_i − r_j)
    grad_query_j = γ Σ_i e_ji key_i         grad_key_i = γ Σ_j e_ji query_j        grad_value_i = γ Σ_j p_ji context_j

γ's own gradient is Σ_j r_j; nothing is ever divided by γ. Every sum has one owner and a fixed order: no atomics.
"""

import triton
import triton.language as tl

from sabmn_ext.ops.triton.attention_product_kernels import load_tile, multiply, store_tile

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _own_positions(positions, BLOCK: tl.constexpr):
    tiles = tl.cdiv(positions, BLOCK)
    program = tl.program_id(0)
    return program % tiles * BLOCK + tl.arange(0, BLOCK), (program // tiles).to(tl.int64)


@triton.jit
def _products(
    a,
    b,
    a_tile,
    b_tile,
    a_position,
    b_position,
    width,
    positions,
    a_channel_stride,
    a_position_stride,
    b_channel_stride,
    b_position_stride,
    KEPT: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Σ_c a[c, i] b[c, j] of two [width, N] maps: of the tiles [CHANNELS, block] where they are KEPT."""
    total = tl.zeros([a_position.shape[0], b_position.shape[0]], tl.float32)
    if KEPT:
        total = multiply(tl.trans(a_tile), b_tile, total, PRECISION)
    else:
        for first in range(0, width, CHANNELS):
            c = first + tl.arange(0, CHANNELS)
            left = load_tile(a, c, a_position, width, positions, a_channel_stride, a_position_stride)
            right = load_tile(b, c, b_position, width, positions, b_channel_stride, b_position_stride)
            total = multiply(tl.trans(left), right, total, PRECISION)
    return total


@triton.jit
def attention_forward_kernel(
    query,
    key,  # [B, d, N]
    value,  # [B, dv, N]
    out,  # [parts, B, dv, N]: their sum; of 16 bits what rounding left is the second
    lse,  # [B, 2, N]: of the logits of a query the maximum m, and log Σ exp(logit − m)
    x,
    y,  # [B, C, N]; y None: a product of its own makes it
    w_out,  # [C, dv], or None: then y = γ out + x
    b_out,  # [C] or None
    gamma,  # []
    channels,
    positions,
    width,
    value_width,
    x_image,
    x_channel,
    x_position,
    y_image,
    y_channel,
    y_position,
    out_part,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out and lse, and y = γ (w_out out + b_out) + x while out is at hand."""
    q, image = _own_positions(positions, BLOCK_QUERIES)
    query, key = query + image * width * positions, key + image * width * positions
    value, out = value + image * value_width * positions, out + image * value_width * positions
    c, v = tl.arange(0, KEYS), tl.program_id(1) * VALUES + tl.arange(0, VALUES)
    own = load_tile(query, c, q, width, positions, positions, 1) if KEPT else None

    total = tl.zeros([BLOCK_QUERIES, VALUES], tl.float32)
    maximum = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    powers_sum = tl.zeros([BLOCK_QUERIES], tl.float32)
    for start in range(0, positions, BLOCK_KEYS):
        k = start + tl.arange(0, BLOCK_KEYS)
        other = load_tile(key, c, k, width, positions, positions, 1) if KEPT else None
        logits = _products(
            query, key, own, other, q, k, width, positions, positions, 1, positions, 1, KEPT, KEYS, PRECISION
        )
        logits = tl.where((k < positions)[None, :], logits, float("-inf"))
        largest = tl.maximum(maximum, tl.max(logits, 1))
        # The difference first: logits may be large, and it is exact to their last bit.
        correction = tl.exp2((maximum - largest) * _LOG2_E)
        powers = tl.exp2((logits - largest[:, None]) * _LOG2_E)
        powers_sum = powers_sum * correction + tl.sum(powers, 1)
        maximum = largest
        values = load_tile(value, v, k, value_width, positions, positions, 1)
        total = multiply(powers.to(values.dtype), tl.trans(values), total * correction[:, None], PRECISION)

    lse += image * 2 * positions + q
    if tl.program_id(1) == 0:
        tl.store(lse, maximum, mask=q < positions)
        tl.store(lse + positions, tl.log(powers_sum), mask=q < positions)
    total /= powers_sum[:, None]
    rounded = total.to(out.dtype.element_ty)
    store_tile(rounded, out, q, v, positions, value_width, 1, positions)
    if out.dtype.element_ty.primitive_bitwidth == 16:
        store_tile(total - rounded.to(tl.float32), out + out_part, q, v, positions, value_width, 1, positions)

    if y is not None:
        x, y = x + image * x_image, y + image * y_image
        scale = tl.load(gamma)
        if w_out is None:
            residual = load_tile(x, q, v, positions, channels, x_position, x_channel)
            result = scale * rounded.to(tl.float32) + residual.to(tl.float32)
            store_tile(result, y, q, v, positions, channels, y_position, y_channel)
        else:
            for first in range(0, channels, BLOCK_CHANNELS):
                channel = first + tl.arange(0, BLOCK_CHANNELS)
                weight = load_tile(w_out, channel, v, channels, value_width, value_width, 1)
                residual = load_tile(x, q, channel, positions, channels, x_position, x_channel)
                a = tl.zeros([BLOCK_QUERIES, BLOCK_CHANNELS], tl.float32)
                a = multiply(rounded, tl.trans(weight), a, PRECISION)
                if b_out is not None:
                    a += tl.load(b_out + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
                result = scale * a + residual.to(tl.float32)
                store_tile(result, y, q, channel, positions, channels, y_position, y_channel)


@triton.jit
def attention_query_gradient_kernel(
    query,
    key,  # [B, d, N]
    value,
    context,  # [B, dv, N]
    out,  # [parts, B, dv, N]
    lse,  # [B, 2, N]
    gamma,  # []
    row_term,  # [B, N]
    grad_query,  # [B, d, N]
    positions,
    width,
    value_width,
    context_image,
    context_channel,
    context_position,
    grad_image,
    out_part,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    VALUES_KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The row terms r; grad_query, a slice of KEYS channels."""
    q, image = _own_positions(positions, BLOCK_QUERIES)
    query, key = query + image * width * positions, key + image * width * positions
    value, out = value + image * value_width * positions, out + image * value_width * positions
    context += image * context_image
    c, v = tl.arange(0, KEYS), tl.arange(0, VALUES)
    of_slice = tl.program_id(1) * KEYS + c

    r = tl.zeros([BLOCK_QUERIES], tl.float32)
    for first in range(0, value_width, VALUES):
        given = load_tile(context, first + v, q, value_width, positions, context_channel, context_position)
        result = load_tile(out, first + v, q, value_width, positions, positions, 1).to(tl.float32)
        if out.dtype.element_ty.primitive_bitwidth == 16:
            result += load_tile(out + out_part, first + v, q, value_width, positions, positions, 1)
        r += tl.sum(given.to(tl.float32) * result, 0)
    if tl.program_id(1) == 0:
        tl.store(row_term + image * positions + q, r, mask=q < positions)
    lse += image * 2 * positions + q
    maximum = tl.load(lse, mask=q < positions, other=float("inf"))
    log_sum = tl.load(lse + positions, mask=q < positions, other=0.0)

    own = load_tile(query, c, q, width, positions, positions, 1) if KEPT else None
    own_context = None
    if VALUES_KEPT:
        own_context = load_tile(context, v, q, value_width, positions, context_channel, context_position)
    total = tl.zeros([BLOCK_QUERIES, KEYS], tl.float32)
    for start in range(0, positions, BLOCK_KEYS):
        k = start + tl.arange(0, BLOCK_KEYS)
        keys = load_tile(key, of_slice, k, width, positions, positions, 1)  # KEPT: all of them
        logits = _products(
            query, key, own, keys, q, k, width, positions, positions, 1, positions, 1, KEPT, KEYS, PRECISION
        )
        values = load_tile(value, v, k, value_width, positions, positions, 1) if VALUES_KEPT else None
        e = _products(
            context, value, own_context, values, q, k, value_width, positions, context_channel, context_position,
            positions, 1, VALUES_KEPT, VALUES, PRECISION,
        )  # fmt: skip
        p = tl.exp2(((logits - maximum[:, None]) - log_sum[:, None]) * _LOG2_E)
        # Beyond the last key the logits are 0, and p could be infinite.
        e = tl.where((k < positions)[None, :], p * (e - r[:, None]), 0.0)
        total = multiply(e.to(keys.dtype), tl.trans(keys), total, PRECISION)
    pointer = grad_query + image * grad_image
    store_tile(total * tl.load(gamma), pointer, q, of_slice, positions, width, 1, positions)


@triton.jit
def attention_key_value_gradient_kernel(
    query,
    key,  # [B, d, N]
    value,
    context,  # [B, dv, N]
    lse,  # [B, 2, N]
    gamma,  # []
    row_term,  # [B, N]
    grad_key,  # [B, d, N]
    grad_value,  # [B, dv, N]
    positions,
    width,
    value_width,
    context_image,
    context_channel,
    context_position,
    grad_image,
    PRECISION: tl.constexpr,
    KEPT: tl.constexpr,
    VALUES_KEPT: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """grad_key and grad_value, a slice of KEYS and one of VALUES channels."""
    k, image = _own_positions(positions, BLOCK_KEYS)
    query, key = query + image * width * positions, key + image * width * positions
    value, context = value + image * value_width * positions, context + image * context_image
    lse, row_term = lse + image * 2 * positions, row_term + image * positions
    c, v = tl.arange(0, KEYS), tl.arange(0, VALUES)
    of_keys, of_values = tl.program_id(1) * KEYS + c, tl.program_id(1) * VALUES + v

    own = load_tile(key, c, k, width, positions, positions, 1) if KEPT else None
    own_values = load_tile(value, v, k, value_width, positions, positions, 1) if VALUES_KEPT else None
    keys_total = tl.zeros([BLOCK_KEYS, KEYS], tl.float32)
    values_total = tl.zeros([BLOCK_KEYS, VALUES], tl.float32)
    for start in range(0, positions, BLOCK_QUERIES):
        q = start + tl.arange(0, BLOCK_QUERIES)
        queries = load_tile(query, c if KEPT else of_keys, q, width, positions, positions, 1)
        v_loaded = v if VALUES_KEPT else of_values
        contexts = load_tile(context, v_loaded, q, value_width, positions, context_channel, context_position)
        logits = _products(
            key, query, own, queries, k, q, width, positions, positions, 1, positions, 1, KEPT, KEYS, PRECISION
        )
        e = _products(
            value, context, own_values, contexts, k, q, value_width, positions, positions, 1,
            context_channel, context_position, VALUES_KEPT, VALUES, PRECISION,
        )  # fmt: skip
        maximum = tl.load(lse + q, mask=q < positions, other=float("inf"))  # so that p is 0 there
        log_sum = tl.load(lse + positions + q, mask=q < positions, other=0.0)
        r = tl.load(row_term + q, mask=q < positions, other=0.0)
        p = tl.exp2(((logits - maximum[None, :]) - log_sum[None, :]) * _LOG2_E)
        e = p * (e - r[None, :])
        values_total = multiply(p.to(contexts.dtype), tl.trans(contexts), values_total, PRECISION)
        keys_total = multiply(e.to(queries.dtype), tl.trans(queries), keys_total, PRECISION)
    scale = tl.load(gamma)
    pointer = grad_key + image * grad_image
    store_tile(keys_total * scale, pointer, k, of_keys, positions, width, 1, positions)
    pointer = grad_value + image * grad_image
    store_tile(values_total * scale, pointer, k, of_values, positions, value_width, 1, positions)
