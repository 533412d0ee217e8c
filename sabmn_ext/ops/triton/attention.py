"""Self-attention by Triton kernels: maps by their strides, dense weights, outputs preallocated.

A forward pass is three launches (the weights stacked, the projections, attention with output projection and residual),
four where the output projection is a product of its own; a backward pass eight, and sums for γ and the biases. The
configurations below are fixed. ``SABMN_TRITON_AUTOTUNE=1`` lets Triton time all of them at the first call for every
size, which cannot be captured in a CUDA graph; another choice may change the order of sums.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from sabmn_ext.ops.triton import attention_kernels as kernels
from sabmn_ext.ops.triton import attention_product_kernels as product_kernels

Parameters = Sequence[Tensor | None]  # w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out
Configuration = dict[str, int]
Grid = Callable[[dict[str, Any]], tuple[int, ...]]

# ---- configurations: the first of a list is the fixed one ----
#
# All fit 99 KB of shared memory, what a block can have on the smallest of the GPUs served; Hopper's, the only ones that
# were measured (on an H200), fit 227. Sums in exact fp32 are made without tensor cores, and their operands pass through
# registers: small tiles. On Hopper a tile of 64 rows must not have 8 warps: with Triton 3.6 gradients were wrong, and
# memory beyond the tensors was read.


def _hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _kind(dtype: torch.dtype) -> str:
    """``half``, ``tf32`` or ``ieee``: fp32 follows the precision switch of torch's matmul."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _options(warps: int, stages: int, **blocks: int) -> Configuration:
    return {**blocks, "num_warps": warps, "num_stages": stages}


def _products(kind: str, rows: int, columns: int, of_weights: bool = False) -> list[Configuration]:
    narrow_rows, narrow_columns = (64 if side <= 64 or kind == "ieee" else 128 for side in (rows, columns))
    if kind == "half" and _hopper():
        wide = 64 if of_weights else narrow_columns
        return [_options(4, 4 if wide == 64 else 3, BLOCK_ROWS=64, BLOCK_COLUMNS=wide, BLOCK_DEPTH=64)]
    warps = 8 if narrow_rows + narrow_columns == 256 else 4
    depth = {"half": 32, "tf32": 16, "ieee": 16}[kind]
    most_stages = 3 if kind == "tf32" and warps == 4 else 4  # with a fourth, sm_80 keeps some of it in local memory
    return [
        _options(warps, stages, BLOCK_ROWS=narrow_rows // cut, BLOCK_COLUMNS=narrow_columns, BLOCK_DEPTH=depth * deeper)
        for stages, deeper, cut in ((most_stages, 1, 1), (3, 2, 2), (2, 2, 1))
    ]


def _padded(width: int, most: int) -> int:
    """Channels taken at once: a power of two from 16 on."""
    return min(max(16, triton.next_power_of_2(width)), most)


def _forward_widths(kind: str, width: int, value_width: int) -> tuple[int, int]:
    most_keys, most_values = {"half": (128, 256), "tf32": (64, 128), "ieee": (32, 64)}[kind]
    return _padded(width, most_keys), _padded(value_width, most_values)


def _forward(kind: str, values: int) -> list[Configuration]:
    if kind == "ieee":
        table = [(64, 32, 4, 1), (32, 32, 4, 1)]
    elif kind == "tf32" and _hopper():
        table = [(64, 32, 4, 2), (128, 32, 8, 2)]
    elif kind == "tf32":
        table = [(64, 32, 8 if values > 64 else 4, 2), (64, 64, 8, 2)]
    elif values == 64 and _hopper():
        table = [(128, 64, 8, 3), (128, 64, 8, 2)]
    elif values >= 128 and _hopper():
        table = [(64, 64, 4, 3), (64, 64, 4, 2)]
    elif values <= 32:
        table = [(128, 64, 4, 3), (64, 64, 4, 3), (128, 128, 8, 2)]
    elif values == 64:
        table = [(128, 64, 8, 2), (64, 64, 4, 3)]
    elif values == 128:
        table = [(64, 32, 4, 2), (128, 64, 8, 2)]
    else:
        table = [(64, 32, 8, 2), (64, 64, 8, 2)]
    return [
        _options(
            warps, stages, BLOCK_QUERIES=queries, BLOCK_KEYS=keys,
            BLOCK_CHANNELS=32 if queries == 128 or (values == 256 and not _hopper()) else 64,
        )
        for queries, keys, warps, stages in table
    ]  # fmt: skip


def _backward_widths(kind: str, width: int, value_width: int) -> tuple[int, int]:
    most = {"half": 128, "tf32": 64, "ieee": 32}[kind]
    if kind == "tf32" and max(width, value_width) > most:
        most = 32  # what is not kept takes more registers
    return _padded(width, most), _padded(value_width, most)


def _backward(kind: str, widest: int, of_queries: bool) -> list[Configuration]:
    if kind == "ieee":
        table = [(64, 32, 4, 1), (32, 32, 4, 1)]
    elif kind == "tf32" and _hopper():
        table = [(64, 32, 4, 2), (128, 32, 8, 2)]
    elif kind == "tf32":
        table = [(64, 32, 8, 2), (32, 32, 4, 2)]
    elif _hopper():
        wide = (64, 64, 4, 2) if of_queries else (64, 32, 4, 1)
        table = [(64, 64, 4, 3) if widest <= 64 else wide, (64, 32, 4, 2)]
    elif widest <= (64 if of_queries else 32):
        table = [(64, 64, 4, 2), (128, 64, 8, 2)]
    elif widest == 64:
        table = [(64, 32, 4, 2), (64, 64, 8, 2)]
    else:
        table = [(64, 32, 8, 2), (32, 64, 4, 1)]
    own, other = ("BLOCK_QUERIES", "BLOCK_KEYS") if of_queries else ("BLOCK_KEYS", "BLOCK_QUERIES")
    return [_options(warps, stages, **{own: a, other: b}) for a, b, warps, stages in table]


_PROGRAMS = 512  # of 64 × 64 elements of the weights' gradients, about: groups of images are cut so on every GPU


def _groups(batch: int, tiles: int) -> tuple[int, int]:
    """How many groups of images, and the images of a group."""
    images = -(-batch // min(max(_PROGRAMS // tiles, 1), batch))
    return -(-batch // images), images


# ---- launches ----


def _launch(
    kernel: Any, grid: Grid, arguments: Sequence[Any], configurations: list[Configuration], **constants: Any
) -> None:
    if os.environ.get("SABMN_TRITON_AUTOTUNE") == "1":
        frozen = tuple(tuple(configuration.items()) for configuration in configurations)
        _tuned(kernel, frozen)[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants, **configurations[0])


@functools.cache
def _tuned(kernel: Any, configurations: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    options = [dict(configuration) for configuration in configurations]
    sizes = {"rows", "columns", "depth", "channels", "positions", "width", "value_width"}
    return triton.autotune(
        [triton.Config(o, num_warps=o.pop("num_warps"), num_stages=o.pop("num_stages")) for o in options],
        key=[name for name in kernel.arg_names if name in sizes],
    )(kernel)


def _tiles(batch: int, rows: int, columns: int) -> Grid:
    def grid(meta: dict[str, Any]) -> tuple[int, ...]:
        return (triton.cdiv(rows, meta["BLOCK_ROWS"]) * triton.cdiv(columns, meta["BLOCK_COLUMNS"]) * batch,)

    return grid


def _attention_grid(batch: int, positions: int, slices: int, block: str) -> Grid:
    return lambda meta: (batch * triton.cdiv(positions, meta[block]), slices)


def _product(
    a: Tensor,  # [rows, depth]
    b: Tensor,  # [B, depth, columns]
    result: Tensor,  # [B, rows, columns]
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """result = scale (a b + bias) + residual, for every image."""
    batch, rows, columns = result.shape
    residual_strides = (0, 0, 0) if residual is None else residual.stride()
    arguments = (a, b, bias, scale, residual, result, rows, columns, a.shape[1])
    strides = (*a.stride(), *b.stride(), *residual_strides, *result.stride())
    kind = _kind(a.dtype)
    _launch(
        product_kernels.attention_product_kernel, _tiles(batch, rows, columns), (*arguments, *strides),
        _products(kind, rows, columns), PRECISION=_precision(kind),
    )  # fmt: skip


def _precision(kind: str) -> str:
    return "tf32" if kind == "tf32" else "ieee"


def _check_extents(*maps: Tensor) -> None:
    for tensor in maps:
        extent = sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        if extent >= 2**31:
            raise RuntimeError(
                f"the Triton kernels cannot serve a map {list(tensor.shape)} with strides {tensor.stride()}: an image "
                "spans 2³¹ elements or more; ask for backend 'torch'"
            )


def forward(x: Tensor, parameters: Parameters, y: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill ``y`` [B, C, H, W] and ``saved``: query, key, value [B, width, N], out, lse (attention_cuda.h)."""
    if x.numel() == 0:
        return
    w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out = parameters
    query, key, value, out, lse = saved
    flat, y_flat = x.flatten(2), y.flatten(2)  # [B, C, N]; y is dense: a view
    batch, channels, positions = flat.shape
    width, value_width = query.shape[1], value.shape[1]
    _check_extents(flat, y_flat, query, value)
    kind = _kind(x.dtype)
    precision = _precision(kind)
    with torch.cuda.device_of(x):
        sizes = (channels, positions, width, value_width)
        stacked = torch.cat((w_query, w_key, w_value))  # type: ignore[arg-type]
        _launch(
            product_kernels.attention_project_kernel, _tiles(batch, len(stacked), positions),
            (flat, stacked, b_query, b_key, b_value, query, key, value, *sizes, *flat.stride()),
            _products(kind, len(stacked), positions), PRECISION=precision,
        )  # fmt: skip

        keys, values = _forward_widths(kind, width, value_width)
        slices = triton.cdiv(value_width, values)
        # Exact fp32 would multiply out and w_out, as wide as they are, in registers.
        fused = w_out is None or (slices == 1 and kind != "ieee")
        _launch(
            kernels.attention_forward_kernel, _attention_grid(batch, positions, slices, "BLOCK_QUERIES"),
            (
                query, key, value, out, lse, flat, y_flat if fused else None, w_out, b_out, gamma,
                *sizes, *flat.stride(), *y_flat.stride(), out.stride(0),
            ),
            _forward(kind, values), PRECISION=precision, KEPT=width <= keys, KEYS=keys, VALUES=values,
        )  # fmt: skip
        if not fused and w_out is not None:
            _product(w_out, out[0], y_flat, b_out, gamma, flat)


def backward(
    grad_y: Tensor,
    x: Tensor,
    parameters: Parameters,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:
    """Fill those of ``gradients`` that ``needs`` names; both are in the order x, then ``parameters``."""
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    w_query, w_key, w_value, w_out, gamma, _, _, _, b_out = parameters
    query, key, value, out, lse = saved
    flat, grad = x.flatten(2), grad_y.flatten(2)  # [B, C, N]
    batch, positions, width, value_width = len(flat), flat.shape[2], query.shape[1], value.shape[1]
    _check_extents(flat, grad, query, value)
    kind = _kind(x.dtype)
    with torch.cuda.device_of(x):
        context = grad
        if w_out is not None:
            context = torch.empty_like(value)
            _product(w_out.mT, grad, context)
        row_term = torch.empty_like(lse[:, 0])  # [B, N]
        inner = value.new_empty(batch, 2 * width + value_width, positions)  # of query, key and value
        _map_gradients(kind, query, key, value, context, out, lse, gamma, row_term, inner)  # type: ignore[arg-type]
        if needs[0]:
            stacked = torch.cat((w_query, w_key, w_value))  # type: ignore[arg-type]
            _product(stacked.mT, inner, gradients[0].flatten(2), residual=grad)
        _weight_gradients(kind, flat, grad, inner, out[0], gamma, needs, gradients)  # type: ignore[arg-type]
        _sums(grad_y, row_term, inner, gamma, b_out, needs, gradients)  # type: ignore[arg-type]


def _map_gradients(
    kind: str, query: Tensor, key: Tensor, value: Tensor, context: Tensor, out: Tensor, lse: Tensor, gamma: Tensor,
    row_term: Tensor, inner: Tensor,
) -> None:  # fmt: skip
    (batch, width, positions), value_width = query.shape, value.shape[1]
    grad_query, grad_key, grad_value = inner.split([width, width, value_width], 1)
    keys, values = _backward_widths(kind, width, value_width)
    key_slices, value_slices = triton.cdiv(width, keys), triton.cdiv(value_width, values)
    constants = {
        "PRECISION": _precision(kind), "KEYS": keys, "VALUES": values,
        "KEPT": key_slices == 1, "VALUES_KEPT": value_slices == 1,
    }  # fmt: skip
    sizes = (positions, width, value_width, *context.stride(), inner.stride(0))
    _launch(
        kernels.attention_query_gradient_kernel, _attention_grid(batch, positions, key_slices, "BLOCK_QUERIES"),
        (query, key, value, context, out, lse, gamma, row_term, grad_query, *sizes, out.stride(0)),
        _backward(kind, max(keys, values), of_queries=True), **constants,
    )  # fmt: skip
    _launch(
        kernels.attention_key_value_gradient_kernel,
        _attention_grid(batch, positions, max(key_slices, value_slices), "BLOCK_KEYS"),
        (query, key, value, context, lse, gamma, row_term, grad_key, grad_value, *sizes),
        _backward(kind, max(keys, values), of_queries=False), **constants,
    )  # fmt: skip


def _weight_gradients(
    kind: str, x: Tensor, grad: Tensor, inner: Tensor, out: Tensor, gamma: Tensor, needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:  # fmt: skip
    if not any(needs[1:5]):
        return
    (batch, channels, positions), rows, value_width = x.shape, inner.shape[1], out.shape[1]
    groups, images = _groups(batch, triton.cdiv(rows, 64) * triton.cdiv(channels, 64))
    size = (rows + value_width * needs[4]) * channels
    partial = torch.empty(groups, size, dtype=torch.float32, device=x.device)
    for needed, a, b, start in (
        (any(needs[1:4]), inner, x, 0),
        (needs[4], grad, out, rows * channels),
    ):
        if needed:
            _launch(
                product_kernels.attention_weight_gradient_kernel, _tiles(groups, a.shape[1], b.shape[1]),
                (
                    a, b, partial[:, start:], a.shape[1], b.shape[1], positions, batch, images,
                    *a.stride(), *b.stride(), partial.stride(0),
                ),
                _products(kind, a.shape[1], b.shape[1], of_weights=True), PRECISION=_precision(kind),
            )  # fmt: skip
    wanted = [gradient if need else None for gradient, need in zip(gradients[1:5], needs[1:5], strict=True)]
    key_size, value_size = (rows - value_width) // 2 * channels, value_width * channels
    _launch(
        product_kernels.attention_reduce_kernel, lambda meta: (triton.cdiv(size, meta["BLOCK"]),),
        (partial, gamma, *wanted, key_size, value_size, size, groups), [_options(4, 1, BLOCK=1024)],
    )  # fmt: skip


def _sums(
    grad_y: Tensor, row_term: Tensor, inner: Tensor, gamma: Tensor, b_out: Tensor | None, needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:  # fmt: skip
    """The gradients of γ and the biases."""
    gradients[7].zero_()  # a key bias cancels in the softmax
    if needs[6] or needs[8]:
        of_inner = inner.sum((0, 2), dtype=gamma.dtype)
        for i, part in ((6, of_inner[: len(gradients[6])]), (8, of_inner[inner.shape[1] - len(gradients[8]) :])):
            if needs[i]:
                gradients[i].copy_(part)
    of_grad = grad_y.sum((0, 2, 3), dtype=gamma.dtype) if needs[9] or (needs[5] and b_out is not None) else None
    if needs[9] and of_grad is not None:
        gradients[9].copy_(gamma * of_grad)
    if needs[5]:
        total = row_term.sum(dtype=torch.float64)
        if b_out is not None and of_grad is not None:
            total += (of_grad.double() * b_out).sum()
        gradients[5].copy_(total)
