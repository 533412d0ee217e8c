"""Self-attention by the C++ kernels of csrc/attention: images by their strides, dense weights, outputs preallocated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.cpu.buffers import Buffers

Parameters = Sequence[Tensor | None]  # w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out

# Of one training step of a network with several blocks: two calls for each pass of a block.
_buffers = Buffers(kept_calls=64)
empty_strided = _buffers.empty_strided


def _addresses(tensors: Parameters) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _inputs(x: Tensor, parameters: Parameters, saved: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
    """What both passes take, and the workspace, which must outlive the call."""
    assert _native.module is not None
    threads, sizes = torch.get_num_threads(), (*x.shape, saved[0].shape[1], saved[2].shape[1])
    elements = _native.module.attention_workspace(sizes, threads)
    (workspace,) = empty_strided([((elements,), (1,), saved[4].dtype)])
    arguments = {
        "dtype": dispatch.DTYPE_CODES[x.dtype],
        "threads": threads,
        "sizes": sizes,
        "x": x.data_ptr(),
        "x_strides": x.stride(),
        "weights": _addresses(parameters[:5]),
        "biases": _addresses(parameters[5:]),
        "saved": _addresses(saved),
        "workspace": workspace.data_ptr(),
    }
    return arguments, workspace


def forward(x: Tensor, parameters: Parameters, y: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill ``y`` [B, C, H, W] and ``saved``: query, key, value [B, width, N], out, lse (attention.h)."""
    assert _native.module is not None
    shared, _workspace = _inputs(x, parameters, saved)
    status = _native.module.attention_forward(**shared, y=y.data_ptr(), y_strides=y.stride())
    dispatch.check_status(status, "attention_forward", x)


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
    shared, _workspace = _inputs(x, parameters, saved)
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
