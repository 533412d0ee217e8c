"""Batch normalisation, residual and ReLU by the C++ kernels of csrc/batch_norm: dense images, outputs preallocated."""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def is_channels_last(x: Tensor) -> bool:
    """Whether the kernels take ``x`` [B, C, H, W] in rows of channels."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def _images(x: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """dtype, sizes and memory format of ``x`` [B, C, H, W], and the workspace, which must outlive the call."""
    assert _native.module is not None
    batch, channels, height, width = x.shape
    images = (dispatch.DTYPE_CODES[x.dtype], batch, channels, height * width, is_channels_last(x))
    return images, torch.empty(_native.module.batch_norm_workspace(images), dtype=torch.uint8)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    y: Tensor,
    statistics: Tensor,
) -> None:
    """Fill ``y`` and ``statistics`` [3, C], and move the running statistics; see csrc/batch_norm/batch_norm.h."""
    assert _native.module is not None
    images, workspace = _images(x)
    status = _native.module.batch_norm_forward(
        images,
        _addresses(x, residual, weight, bias, running_mean, running_var),
        _addresses(y, statistics),
        momentum,
        eps,
        relu,
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    dispatch.check_status(status, "batch_norm_act_forward", x)


def backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    relu: bool,
    grad_x: Tensor | None,
    grad_residual: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """Fill the gradients; those of images have x's layout, as ``grad_y`` has, and may stand on its memory."""
    assert _native.module is not None
    images, workspace = _images(x)
    status = _native.module.batch_norm_backward(
        images,
        _addresses(grad_y, x, y, weight, bias, statistics),
        _addresses(grad_x, grad_residual, grad_weight, grad_bias),
        relu,
        workspace.data_ptr(),
        torch.get_num_threads(),
    )
    dispatch.check_status(status, "batch_norm_act_backward", x)
