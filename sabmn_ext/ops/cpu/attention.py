"""Self-attention by the C++ kernels of csrc/attention: images by their strides, dense weights, outputs preallocated."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.cpu.buffers import Buffers

Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, stride, dtype
Parameters = Sequence[Tensor | None]  # w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out

# Of one training step of a network with several blocks: two calls for each pass of a block.
_buffers = Buffers(kept_calls=64)
empty_strided = _buffers.empty_strided


def _bytes(count: int) -> Layout:
    return (count,), (1,), torch.uint8


def _size(layout: Layout) -> int:
    """Its bytes, in whole cache lines."""
    return -(-math.prod(layout[0]) * layout[2].itemsize // 64) * 64


def _addresses(tensors: Parameters) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _inputs(
    x: Tensor, parameters: Parameters, widths: tuple[int, int], saved: Sequence[int], workspace: int
) -> dict[str, Any]:
    """What both passes take; ``widths``: of key and value, the others addresses."""
    return {
        "dtype": dispatch.DTYPE_CODES[x.dtype],
        "threads": torch.get_num_threads(),
        "sizes": (*x.shape, *widths),
        "x": x.data_ptr(),
        "x_strides": x.stride(),
        "weights": _addresses(parameters[:5]),
        "biases": _addresses(parameters[5:]),
        "saved": saved,
        "workspace": workspace,
    }


def _workspace_bytes(x: Tensor, widths: tuple[int, int], wide: torch.dtype) -> int:
    assert _native.module is not None
    elements: int = _native.module.attention_workspace((*x.shape, *widths), torch.get_num_threads())
    return elements * wide.itemsize


def _with_workspace(x: Tensor, parameters: Parameters, saved: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
    """``_inputs``, and the workspace, which must outlive the call."""
    widths = saved[0].shape[1], saved[2].shape[1]
    (workspace,) = empty_strided([_bytes(_workspace_bytes(x, widths, saved[4].dtype))])
    return _inputs(x, parameters, widths, _addresses(saved), workspace.data_ptr()), workspace


def forward(x: Tensor, parameters: Parameters, y: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill ``y`` [B, C, H, W] and ``saved``: query, key, value [B, width, N], out, lse (attention.h)."""
    assert _native.module is not None
    shared, _workspace = _with_workspace(x, parameters, saved)
    status = _native.module.attention_forward(**shared, y=y.data_ptr(), y_strides=y.stride())
    dispatch.check_status(status, "attention_forward", x)


def forward_alone(x: Tensor, parameters: Parameters, layouts: Sequence[Layout]) -> Tensor:
    """y, where no backward pass will ask for the rest; ``layouts``: of y and of what ``forward`` takes as ``saved``."""
    assert _native.module is not None
    y_layout, *saved = layouts
    widths = saved[0][0][1], saved[2][0][1]
    ends = list(accumulate((_size(layout) for layout in saved), initial=_workspace_bytes(x, widths, saved[4][2])))
    y, memory = empty_strided([y_layout, _bytes(ends.pop())])
    start = memory.data_ptr()
    shared = _inputs(x, parameters, widths, [start + end for end in ends], start)
    status = _native.module.attention_forward(**shared, y=y.data_ptr(), y_strides=y.stride())
    dispatch.check_status(status, "attention_forward", x)
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    parameters: Parameters,
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:
    """Fill those of ``gradients`` that ``needs`` names; both are in the order x, then ``parameters``."""
    assert _native.module is not None
    shared, _workspace = _with_workspace(x, parameters, saved)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    status = _native.module.attention_backward(
        **shared,
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride(),
        grad_x=_addresses(wanted[:1])[0],
        grad_x_strides=gradients[0].stride() if needs[0] else (0, 0, 0, 0),
        gradients=_addresses([*wanted[1:7], wanted[8]]),
    )
    dispatch.check_status(status, "attention_backward", x)
    gradients[7].zero_()  # a key bias cancels in the softmax
    if needs[9]:
        gamma: Any = parameters[4]
        gradients[9].copy_(gamma * torch.sum(grad_y, (0, 2, 3), dtype=gamma.dtype))
