"""Batch normalisation in training, a residual and a ReLU as one operation: checks, dispatch and autograd.

The formulas stand in ``reference.batch_norm_act``; the C++ kernels are called in ``ops/cpu/``. Where these do not
serve, and inside of torch.func, torch.compile and export, the operation is torch's own ones in a row: so none of these
ever meets the kernels, and they need no schema.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cpu import batch_norm as kernels
from sabmn_ext.ops.cpu.plain import why_not_plain
from sabmn_ext.ops.cpu.unshared import unshared

for _operation in ("batch_norm_act_forward", "batch_norm_act_backward"):
    dispatch.register(_operation, cpu=dispatch.native_cpu(torch.float32, torch.bfloat16, torch.float16))


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """``act(batch_norm(x) + residual)`` with the statistics of the batch, as in training.

    ``batch_norm(x) = (x − mean)/√(var + eps) · weight + bias`` with each channel's mean and biased variance over batch
    and positions (Ioffe and Szegedy, 2015); act is max(·, 0) or nothing.

    Args:
        x: ``[B, C, H, W]``, any float dtype. A C++ kernel serves float32, bfloat16 and float16 on the CPU, contiguous
            or channels_last; torch's own operations all else.
        weight, bias: ``[C]`` or None, for 1 and 0. The kernel takes them in float32.
        residual: of x's shape, added before the ReLU; None for none. The kernel takes it in x's dtype.
        relu: whether the ReLU comes last.
        running_mean, running_var: ``[C]``, both or neither: moved in place by ``momentum`` towards the mean and the
            unbiased variance of the batch. The kernel takes them in float32.
        eps: added to the variance.
        backend: ``cpu``, ``torch``, or None / ``auto`` for the first of them that can.

    Returns:
        ``[B, C, H, W]`` in x's memory format and dtype. Second derivatives are right, through torch's operations.

    Raises:
        ValueError: shapes that do not fit, or a single value for each channel.
        RuntimeError: the backend that was asked for cannot serve the call; says why.

    >>> x = torch.randn(8, 64, 16, 8)
    >>> batch_norm_act(x, residual=torch.randn_like(x)).shape
    torch.Size([8, 64, 16, 8])
    """
    _check(x, weight, bias, residual, running_mean, running_var)
    tensors = (x, residual, weight, bias, running_mean, running_var)
    if torch.compiler.is_compiling() or _takes_torch(tensors, backend):
        return reference.batch_norm_act(
            x, weight, bias, residual=residual, relu=relu, running_mean=running_mean, running_var=running_var,
            momentum=momentum, eps=eps,
        )  # fmt: skip
    if torch.is_grad_enabled():
        return _BatchNormAct.apply(*tensors, momentum, eps, relu)  # type: ignore[no-any-return]
    return _forward(*tensors, momentum, eps, relu)[0]


def _takes_torch(tensors: tuple[Any, ...], backend: str | None) -> bool:
    reason = _why_not(*tensors)
    if reason is not None and backend == "cpu":
        raise RuntimeError(f"backend 'cpu' cannot serve batch_norm_act: {reason}. Ask for another one, or for 'auto'")
    asked = backend if reason is None else "torch"
    return dispatch.choose("batch_norm_act_forward", asked, tensors[0].device, tensors[0].dtype) == "torch"


def _why_not(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> str | None:
    """Why the kernel cannot serve these tensors here, device and dtype of x aside; None where it can."""
    reason = why_not_plain(x, residual, weight, bias, running_mean, running_var)
    if reason is not None:
        return reason
    if x.numel() == 0 or not _is_dense(x):
        return f"it serves contiguous or channels_last images that are not empty, not {list(x.shape)} by {x.stride()}"
    if residual is not None and residual.dtype != x.dtype:
        return f"it adds a residual of x's dtype, {x.dtype}, not {residual.dtype}"
    for tensor in (weight, bias, running_mean, running_var):
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            return "it takes contiguous float32 weights, biases and running statistics"
    return None


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def _check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has shape {list(x.shape)}; expected images [B, C, H, W]")
    F._verify_batch_size(x.shape)  # type: ignore[attr-defined]
    names = ("weight", "bias", "running_mean", "running_var")
    for name, tensor in zip(names, (weight, bias, running_mean, running_var), strict=True):
        if tensor is not None and tensor.shape != (x.shape[1],):
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{x.shape[1]}], x's channels")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual has shape {list(residual.shape)}; expected x's, {list(x.shape)}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("one of running_mean and running_var is None; expected both or neither")


# ---- autograd ----


class _BatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, residual: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any,
        momentum: float, eps: float, relu: bool,
    ) -> Tensor:  # fmt: skip
        y, statistics = _forward(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu)
        ctx.has_residual, ctx.relu, ctx.eps = residual is not None, relu, eps
        ctx.save_for_backward(x, y if relu and residual is not None else None, weight, bias, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        may_change = unshared(gradients)[0]
        grad_y, needs = gradients[0], ctx.needs_input_grad
        x, y, weight, bias, statistics = ctx.saved_tensors
        grads: tuple[Tensor | None, ...]
        if torch.is_grad_enabled() or not torch._C._has_storage(grad_y):
            # This pass is differentiated itself, or many gradients come as one (is_grads_batched).
            kept = None
            if ctx.relu:
                before = F.batch_norm(x, None, None, weight, bias, True, 0.0, ctx.eps) if y is None else y
                kept = ~(before <= 0)
            grads = reference.batch_norm_act_backward(grad_y, x, weight, kept, ctx.eps)
        else:
            may_change = may_change and (y is not None or not needs[1])  # else it is the residual's gradient itself
            grads = _backward(grad_y, x, y, weight, bias, statistics, ctx.relu, needs[0], may_change)
        grad_x, grad_residual, grad_weight, grad_bias = grads
        if ctx.has_residual and not ctx.relu:
            grad_residual = grad_y
        found = (grad_x, grad_residual, grad_weight, grad_bias)
        return (*(grad if need else None for grad, need in zip(found, needs[:4], strict=True)), *[None] * 5)


# ---- the kernels' outputs ----


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """y and the statistics [3, C] that the backward pass needs."""
    residual = None if residual is None else _laid_out_as(x, residual)
    y, statistics = torch.empty_like(x), x.new_empty((3, x.shape[1]), dtype=torch.float32)
    kernels.forward(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu, y, statistics)
    return y, statistics


def _backward(
    grad_y: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    relu: bool,
    needs_x: bool,
    may_change: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The gradients of x, residual (only where there is y), weight and bias.

    ``may_change``: whether ``grad_y`` may be written over, by the residual's gradient if there is y, else by that of x.
    """
    dispatch.choose("batch_norm_act_backward", "cpu", x.device, x.dtype)
    laid_out = _laid_out_as(x, grad_y)
    mine = laid_out if may_change or laid_out is not grad_y else torch.empty_like(x)
    grad_x, grad_residual = (mine, None) if y is None else (torch.empty_like(x) if needs_x else None, mine)
    grad_x = grad_x if needs_x else None
    grad_weight, grad_bias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    gradients = (grad_x, grad_residual, grad_weight, grad_bias)
    kernels.backward(laid_out, x, y, weight, bias, statistics, relu, *gradients)
    return gradients


def _laid_out_as(x: Tensor, other: Tensor) -> Tensor:
    """``other`` itself where it lies in memory as ``x`` does, else a copy that does."""
    last = kernels.is_channels_last(x)
    return other.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
