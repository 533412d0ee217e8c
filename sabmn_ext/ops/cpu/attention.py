"""Self-attention by the C++ kernels of csrc/attention: images by their strides, dense weights, outputs preallocated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

Parameters = Sequence[Tensor | None]  # w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out


def _addresses(tensors: Parameters) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _inputs(x: Tensor, parameters: Parameters, saved: Sequence[Tensor]) -> tuple[dict[str, Any], Tensor]:
    """What both passes take, and the scratch memory, which must outlive the call."""
    assert _native.module is not None
    threads, key_width, value_width = torch.get_num_threads(), saved[0].shape[1], saved[2].shape[1]
    scratch = x.new_empty(threads * _native.module.attention_scratch(key_width, value_width))
    arguments = {
        "dtype": dispatch.DTYPE_CODES[x.dtype],
        "threads": threads,
        "sizes": (*x.shape, key_width, value_width),
        "x": x.data_ptr(),
        "x_strides": x.stride(),
        "weights": _addresses(parameters[:5]),
        "biases": _addresses(parameters[5:]),
        "saved": _addresses(saved),
        "scratch": scratch.data_ptr(),
    }
    return arguments, scratch


def forward(x: Tensor, parameters: Parameters, y: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill ``y`` [B, C, H, W] and ``saved``: query, key, value, out [B, width, N], lse [B, 2, N] (attention.h)."""
    assert _native.module is not None
    shared, _scratch = _inputs(x, parameters, saved)
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
    query, key, value, _, lse = saved
    grad_query = torch.empty_like(query) if needs[0] or needs[1] or needs[6] else None
    through_key = needs[0] or needs[2] or needs[3] or needs[8]
    grad_key, grad_value = (torch.empty_like(key), torch.empty_like(value)) if through_key else (None, None)
    context, row_term = torch.empty_like(value), torch.empty_like(lse)
    shared, _scratch = _inputs(x, parameters, saved)
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    status = _native.module.attention_backward(
        **shared,
        grad_y=grad_y.data_ptr(),
        grad_y_strides=grad_y.stride(),
        grad_x=_addresses(wanted[:1])[0],
        grad_x_strides=gradients[0].stride() if needs[0] else (0, 0, 0, 0),
        gradients=_addresses(wanted[1:6]),
        workspaces=_addresses([grad_query, grad_key, grad_value, context, row_term]),
    )
    dispatch.check_status(status, "attention_backward", x)
    gradients[7].zero_()  # a key bias cancels in the softmax
    for i, grad in ((6, grad_query), (8, grad_value)):
        if needs[i] and grad is not None:
            torch.sum(grad, (0, 2), out=gradients[i])
    if needs[9]:
        torch.sum(grad_y, (0, 2, 3), out=gradients[9]).mul_(parameters[4])  # type: ignore[arg-type]
