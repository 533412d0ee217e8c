"""Spectral normalisation by the CUDA kernels of csrc/spectral_norm: lists of dense tensors, outputs preallocated.

Both functions only enqueue work on the current stream of the tensors' device, so that a CUDA graph can capture them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

Tensors = Sequence[Tensor]


def _addresses(tensors: Tensors) -> list[int]:
    return [t.data_ptr() for t in tensors]


def forward(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    normalized: Tensors,
    u_new: Tensors,
    v_new: Tensors,
    inner: list[int],
    sigma: Tensor,
    n_power_iterations: int,
    eps: float,
) -> None:
    """Fill ``normalized``, ``u_new``, ``v_new``, ``sigma`` [len(weights)]; see csrc/spectral_norm/spectral_norm.h."""
    assert _native.module is not None
    rows, columns = [t.numel() for t in u], [t.numel() for t in v]
    dtype = dispatch.DTYPE_CODES[weights[0].dtype]
    bytes_needed, _ = _native.module.spectral_norm_cuda_workspace(rows, columns, dtype)
    with torch.cuda.device(sigma.device):
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=sigma.device)
        status = _native.module.spectral_norm_forward_cuda(
            *(_addresses(tensors) for tensors in (weights, u, v, normalized, u_new, v_new)),
            rows,
            columns,
            inner,
            sigma.data_ptr(),
            n_power_iterations,
            eps,
            dtype,
            dispatch.DTYPE_CODES[normalized[0].dtype],
            workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    dispatch.check_status(status, "spectral_norm_forward", *weights)


def backward(
    gradients: Tensors,
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    inner: list[int],
    sigma: Tensor,
    weight_gradients: Tensors,
) -> None:
    """Fill ``weight_gradients``; ``u`` and ``v`` are those that the forward pass ended with."""
    assert _native.module is not None
    rows, columns = [t.numel() for t in u], [t.numel() for t in v]
    dtype = dispatch.DTYPE_CODES[weights[0].dtype]
    _, bytes_needed = _native.module.spectral_norm_cuda_workspace(rows, columns, dtype)
    with torch.cuda.device(sigma.device):
        workspace = torch.empty(bytes_needed, dtype=torch.uint8, device=sigma.device)
        status = _native.module.spectral_norm_backward_cuda(
            *(_addresses(tensors) for tensors in (gradients, weights, u, v, weight_gradients)),
            rows,
            columns,
            inner,
            sigma.data_ptr(),
            dtype,
            dispatch.DTYPE_CODES[gradients[0].dtype],
            workspace.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
    dispatch.check_status(status, "spectral_norm_backward", *weights)
