"""Products of the self-attention: projections, gradients of x and of the weights; of an image or summed over images.

A program owns a tile [BLOCK_ROWS, BLOCK_COLUMNS] of the result and walks over the sum's index. Operands come by their
strides, so that both memory formats are read without copies. Sums over images are cut into groups of a fixed size whose
partial sums ``attention_reduce_kernel`` adds in order: no atomics, always the same bits. PRECISION is that of fp32
products: ``ieee`` or ``tf32``. Tensors that are None are compiled away.
"""

import os

import triton
import triton.language as tl

# Triton's interpreter multiplies the bits of bfloat16, not the values.
_INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def multiply(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in fp32."""
    if _INTERPRETED and a.dtype.is_bf16():
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_tile(pointer, row, column, rows, columns, row_stride, column_stride):
    """[rows, columns] at ``row`` and ``column``, 0 beyond the edges."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * row_stride + column[None, :] * column_stride, mask=mask, other=0.0)


@triton.jit
def store_tile(value, pointer, row, column, rows, columns, row_stride, column_stride):
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    pointers = pointer + row[:, None] * row_stride + column[None, :] * column_stride
    tl.store(pointers, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _tile_of_program(rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The rows, the columns, and the image or the group of images. Neighbours share columns: those of an image."""
    row_tiles, column_tiles = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(columns, BLOCK_COLUMNS)
    program = tl.program_id(0)
    row = program % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = program // row_tiles % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return row, column, program // (row_tiles * column_tiles)


@triton.jit
def _sum_of_products(
    a,
    b,
    row,
    column,
    rows,
    columns,
    depth,
    a_image,
    a_row,
    a_depth,
    b_image,
    b_depth,
    b_column,
    first_image,
    images,
    PRECISION: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Σ over images and ``depth`` of a[row, ·] b[·, column], fp32."""
    total = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    steps = tl.cdiv(depth, BLOCK_DEPTH)
    for step in range(0, images * steps):
        image = (first_image + step // steps).to(tl.int64)
        k = step % steps * BLOCK_DEPTH + tl.arange(0, BLOCK_DEPTH)
        left = load_tile(a + image * a_image, row, k, rows, depth, a_row, a_depth)
        right = load_tile(b + image * b_image, k, column, depth, columns, b_depth, b_column)
        total = multiply(left, right, total, PRECISION)
    return total


@triton.jit
def attention_project_kernel(
    x,  # [B, C, N]
    weight,  # [2d + dv, C]: of queries, keys and values, one below the other
    b_query,
    b_key,
    b_value,  # [d], [d], [dv] or None
    query,
    key,
    value,  # [B, d, N], [B, d, N], [B, dv, N]
    channels,
    positions,
    width,
    value_width,
    x_image,
    x_channel,
    x_position,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """query = w_query x + b_query, and key and value likewise: x is read once for all three."""
    rows = 2 * width + value_width
    row, column, image = _tile_of_program(rows, positions, BLOCK_ROWS, BLOCK_COLUMNS)
    total = _sum_of_products(
        weight, x, row, column, rows, positions, channels, 0, channels, 1, x_image, x_channel, x_position,
        image, 1, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    _store_projection(total, b_query, query, image, row, column, width, positions)
    _store_projection(total, b_key, key, image, row - width, column, width, positions)
    _store_projection(total, b_value, value, image, row - 2 * width, column, value_width, positions)


@triton.jit
def _store_projection(total, bias, result, image, row, column, rows, columns):
    if bias is not None:
        total += tl.load(bias + row, mask=(row >= 0) & (row < rows), other=0.0).to(tl.float32)[:, None]
    mask = ((row >= 0) & (row < rows))[:, None] & (column < columns)[None, :]
    pointers = result + image.to(tl.int64) * rows * columns + row[:, None] * columns + column[None, :]
    tl.store(pointers, total.to(result.dtype.element_ty), mask=mask)


@triton.jit
def attention_product_kernel(
    a,  # [rows, depth]
    b,  # [B, depth, columns]
    bias,  # [rows] or None
    scale,  # [] or None: 1
    residual,  # [B, rows, columns] or None
    result,  # [B, rows, columns]
    rows,
    columns,
    depth,
    a_row,
    a_depth,
    b_image,
    b_depth,
    b_column,
    residual_image,
    residual_row,
    residual_column,
    result_image,
    result_row,
    result_column,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """scale (a b + bias) + residual, for every image."""
    row, column, image = _tile_of_program(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    total = _sum_of_products(
        a, b, row, column, rows, columns, depth, 0, a_row, a_depth, b_image, b_depth, b_column,
        image, 1, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    image = image.to(tl.int64)
    if bias is not None:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    if scale is not None:
        total *= tl.load(scale)
    if residual is not None:
        pointer = residual + image * residual_image
        total += load_tile(pointer, row, column, rows, columns, residual_row, residual_column).to(tl.float32)
    store_tile(total, result + image * result_image, row, column, rows, columns, result_row, result_column)


@triton.jit(do_not_specialize=["images", "images_per_group"])
def attention_weight_gradient_kernel(
    a,  # [B, rows, N]
    b,  # [B, columns, N]
    partial,  # of every group [rows, columns]
    rows,
    columns,
    positions,
    images,
    images_per_group,
    a_image,
    a_row,
    a_position,
    b_image,
    b_column,
    b_position,
    partial_group,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    """Σ a bᵀ over the images of a group."""
    row, column, group = _tile_of_program(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    first = group * images_per_group
    total = _sum_of_products(
        a, b, row, column, rows, columns, positions, a_image, a_row, a_position, b_image, b_position, b_column,
        first, tl.minimum(images_per_group, images - first), PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    store_tile(total, partial + group.to(tl.int64) * partial_group, row, column, rows, columns, columns, 1)


@triton.jit(do_not_specialize=["groups"])
def attention_reduce_kernel(
    partial,  # [groups, (2d + dv)·C + C·dv]
    gamma,  # []
    w_query,
    w_key,
    w_value,
    w_out,  # the gradients, or None
    key_size,
    value_size,
    partial_group,
    groups,
    BLOCK: tl.constexpr,
):
    """The weights' gradients from those of the groups."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(groups):
        total += tl.load(partial + i, mask=i < partial_group, other=0.0)
        partial += partial_group
    _store_part(total, w_query, i, key_size)
    _store_part(total, w_key, i - key_size, key_size)
    _store_part(total, w_value, i - 2 * key_size, value_size)
    _store_part(total * tl.load(gamma), w_out, i - 2 * key_size - value_size, value_size)


@triton.jit
def _store_part(total, gradient, i, size):
    if gradient is not None:
        tl.store(gradient + i, total.to(gradient.dtype.element_ty), mask=(i >= 0) & (i < size))
