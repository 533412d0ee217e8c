"""Self-attention by the CUDA kernels of csrc/attention: maps by their strides, dense weights, outputs preallocated.

Both functions only enqueue work on the current stream of the tensors' device, so that a CUDA graph can capture them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

Parameters = Sequence[Tensor | None]  # w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out
Map = tuple[int, int, int, int]  # address, strides of batch, channel and position


def _addresses(tensors: Parameters) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _with_positions(image: Tensor) -> Tensor:
    """The image, or a copy where its rows do not follow one another as its pixels do: both formats, most views do."""
    _, _, height, width = image.shape
    even = height == 1 or width == 1 or image.stride(2) == width * image.stride(3)
    return image if even else image.contiguous()


def _map(image: Tensor) -> Map:
    batch, channels, height, width = image.shape
    position_stride = image.stride(3) if width > 1 else image.stride(2) if height > 1 else 1
    # The stride of a dimension of one element can be anything.
    batch_stride = image.stride(0) if batch > 1 else channels * height * width
    return image.data_ptr(), batch_stride, image.stride(1), position_stride


def _inputs(x: Tensor, parameters: Parameters, saved: Sequence[Tensor]) -> dict[str, Any]:
    batch, channels, height, width = x.shape
    return {
        "dtype": dispatch.DTYPE_CODES[x.dtype],
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "sizes": (batch, channels, height * width, saved[0].shape[1], saved[2].shape[1]),
        "x": _map(x),
        "parameters": _addresses(parameters),
        "saved": _addresses(saved),
    }


def forward(x: Tensor, parameters: Parameters, y: Tensor, saved: Sequence[Tensor]) -> None:
    """Fill ``y`` [B, C, H, W] and ``saved``: query, key, value [B, width, N], out, lse (attention_cuda.h)."""
    assert _native.module is not None
    x = _with_positions(x)
    with torch.cuda.device(x.device):
        status = _native.module.attention_forward_cuda(
            **_inputs(x, parameters, saved), y=_map(y), stream=torch.cuda.current_stream().cuda_stream
        )
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
    if x.numel() == 0:
        for gradient in gradients:
            gradient.zero_()
        return
    x, grad_y = _with_positions(x), _with_positions(grad_y)
    query, key, value, *_ = saved
    # Without an output projection the context is grad_y itself, as [B, C, N].
    context = torch.empty_like(value) if parameters[3] is not None else grad_y.flatten(2).contiguous()
    inner: list[Tensor | None] = [None, None, None]
    if any(needs[:4]) or any(needs[6:9]):
        inner = [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)]
    wanted = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    inputs = _inputs(x, parameters, saved)
    with torch.cuda.device(x.device):
        size = _native.module.attention_backward_cuda_workspace(*inputs["sizes"], parameters[3] is not None)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.device)
        status = _native.module.attention_backward_cuda(
            **inputs,
            grad_y=_map(grad_y),
            grad_x=_map(gradients[0]) if needs[0] else (0, 0, 0, 0),
            gradients=_addresses(wanted[1:6]),
            inner=_addresses([context, *inner]),
            workspace=workspace.data_ptr(),
            stream=torch.cuda.current_stream().cuda_stream,
        )
    dispatch.check_status(status, "attention_backward", x)
    gamma: Any = parameters[4]  # of the dtype that sums are kept in
    gradients[7].zero_()  # a key bias cancels in the softmax
    for i, grad in ((6, inner[0]), (8, inner[2])):
        if needs[i] and grad is not None:
            gradients[i].copy_(torch.sum(grad, (0, 2), dtype=gamma.dtype))
    if needs[9]:
        gradients[9].copy_(gamma * torch.sum(grad_y, (0, 2, 3), dtype=gamma.dtype))
