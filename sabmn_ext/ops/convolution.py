"""1×1 convolutions as matrix products, 3×3 ones by Winograd's minimal filtering: checks, dispatch and autograd.

F(2×2, 3×3) takes 16 products for a tile of 2×2 outputs where the definition takes 36 (Winograd, 1980; Lavin and Gray,
"Fast Algorithms for Convolutional Neural Networks", CVPR 2016). Where the kernels do not serve, and inside of
torch.func, torch.compile and export, the operation is ``torch.conv2d``: so none of these ever meets the kernels, and
they need no schema.
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.cpu import pointwise, winograd
from sabmn_ext.ops.cpu.plain import why_not_plain


class _Operation(NamedTuple):
    name: str
    size: int  # of the weight's filters
    kernels: ModuleType  # forward(x, weight) → y and what backward(grad_y, x, weight, that, needs x, weight) takes

    @property
    def padding(self) -> int:
        return self.size // 2


_CONV1X1 = _Operation("conv1x1", 1, pointwise)
_CONV3X3 = _Operation("conv3x3", 3, winograd)


def _torch_in_bfloat16(device: torch.device, dtype: torch.dtype) -> str | None:
    """torch, where it multiplies bfloat16 much faster than float32, in which the kernels' products are taken.

    AMX does so 16 times as fast, instructions for pairs twice as fast where attention multiplies by them too.
    """
    if dtype != torch.bfloat16:
        return None
    pairs = _native.module is not None and _native.module.isa() == "avx512_bf16"
    return "torch" if pairs or torch.cpu._is_amx_tile_supported() else None


for _pass in ("forward", "backward"):
    dispatch.register(f"conv1x1_{_pass}", cpu=dispatch.native_cpu(torch.float32))
    dispatch.register(f"conv3x3_{_pass}", cpu=dispatch.native_cpu(torch.float32, torch.bfloat16))
    dispatch.prefer(f"conv3x3_{_pass}", _torch_in_bfloat16)


def conv1x1(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """``torch.conv2d(x, weight)`` for a weight of 1×1 filters.

    Args:
        x: ``[B, C, H, W]``. C++ products serve float32 on the CPU, in channels_last memory (another layout is copied);
            torch's convolution serves all else. Under autocast x and weight are taken in its dtype.
        weight: ``[O, C, 1, 1]`` of x's dtype.
        backend: ``cpu``, ``torch``, or None / ``auto`` for the first of them that can.

    Returns:
        ``[B, O, H, W]``, channels_last from the kernels. Second derivatives are right, through torch's operations.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: the backend that was asked for cannot serve the call; says why.

    >>> x = torch.randn(8, 256, 16, 8).contiguous(memory_format=torch.channels_last)
    >>> conv1x1(x, torch.randn(64, 256, 1, 1)).shape
    torch.Size([8, 64, 16, 8])
    """
    return _convolve(_CONV1X1, x, weight, backend)


def conv3x3(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """``torch.conv2d(x, weight, padding=1)``.

    Args:
        x: ``[B, C, H, W]``. C++ transforms and products, both in float32, serve float32 and bfloat16 on the CPU, in
            channels_last memory (another layout is copied); torch's convolution serves all else, and bfloat16 where
            the processor has AMX or is AMD's with AVX512-BF16. Under autocast x and weight are taken in its dtype.
        weight: ``[O, C, 3, 3]`` of x's dtype, best in channels_last memory too.
        backend: ``cpu``, ``torch``, or None / ``auto`` for the first of them that can.

    Returns:
        ``[B, O, H, W]``, channels_last from the kernels. Second derivatives are right, through torch's operations. The
        rounding error of y and of x's gradient is about half of torch's convolution's in float32, that of the weight's
        gradient up to two and a half times it (``benchmarks/convolution_bench.py``). What is not finite makes all of
        the tiles around it so.

    Raises:
        ValueError: shapes that do not fit.
        RuntimeError: the backend that was asked for cannot serve the call; says why.

    >>> x = torch.randn(8, 256, 16, 8).contiguous(memory_format=torch.channels_last)
    >>> conv3x3(x, torch.randn(512, 256, 3, 3)).shape
    torch.Size([8, 512, 16, 8])
    """
    return _convolve(_CONV3X3, x, weight, backend)


def _convolve(operation: _Operation, x: Tensor, weight: Tensor, backend: str | None) -> Tensor:
    name, size, kernels = operation
    if x.dim() != 4 or weight.dim() != 4 or weight.shape[1:] != (x.shape[1], size, size):
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; "
            f"expected [B, C, H, W] and [O, C, {size}, {size}]"
        )
    if torch.compiler.is_compiling():
        return F.conv2d(x, weight, padding=operation.padding)
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        x, weight = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight))
    if _takes_torch(name, x, weight, backend):
        return F.conv2d(x, weight, padding=operation.padding)
    x, weight = _channels_last(x), _channels_last(weight)
    if torch.is_grad_enabled():
        return _Convolution.apply(x, weight, operation)  # type: ignore[no-any-return]
    return kernels.forward(x, weight)[0]  # type: ignore[no-any-return]


def _takes_torch(name: str, x: Tensor, weight: Tensor, backend: str | None) -> bool:
    reason = why_not_plain(x, weight)
    if reason is None and (x.numel() == 0 or weight.numel() == 0):
        reason = f"it serves images and weights that are not empty, not {list(x.shape)} and {list(weight.shape)}"
    if reason is None and weight.dtype != x.dtype:
        reason = f"it takes a weight of x's dtype, {x.dtype}, not {weight.dtype}"
    if reason is not None and backend == "cpu":
        raise RuntimeError(f"backend 'cpu' cannot serve {name}: {reason}. Ask for another one, or for 'auto'")
    asked = backend if reason is None else "torch"
    return dispatch.choose(f"{name}_forward", asked, x.device, x.dtype) == "torch"


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, operation: _Operation) -> Tensor:  # type: ignore[override]
        y, kept = operation.kernels.forward(x, weight)
        ctx.save_for_backward(x, weight, kept if ctx.needs_input_grad[0] else None)
        ctx.operation = operation
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, kept = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or not torch._C._has_storage(grad_y):
            # This pass is differentiated itself, or many gradients come as one (is_grads_batched).
            padding, needs = [ctx.operation.padding] * 2, [needs_x, needs_weight, False]
            found = torch.ops.aten.convolution_backward(
                grad_y, x, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, needs
            )
            return found[0], found[1], None
        dispatch.choose(f"{ctx.operation.name}_backward", "cpu", x.device, x.dtype)
        return *ctx.operation.kernels.backward(_channels_last(grad_y), x, weight, kept, needs_x, needs_weight), None
