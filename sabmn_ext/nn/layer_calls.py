"""Calls of convolutions and batch norms: on the CPU by faster operations, where the modules are plain ones."""

import os
from collections.abc import Callable
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sabmn_ext.ops.batch_norm import batch_norm_act
from sabmn_ext.ops.convolution import conv1x1, conv3x3


def norm_act(norm: nn.Module, x: Tensor, relu: nn.Module | None = None, residual: Tensor | None = None) -> Tensor:
    """``relu(norm(x) + residual)``: in training on the CPU one operation, where the modules are plain ones."""
    plain = norm.training and _is_plain(norm, nn.BatchNorm2d) and (relu is None or _is_plain(relu, nn.ReLU))
    if plain and _is_image_here(x) and (residual is None or residual.shape == x.shape):
        return _fused(norm, x, relu is not None, residual)  # type: ignore[arg-type]
    y = norm(x)
    if residual is not None:
        y = y + residual
    return y if relu is None else relu(y)  # type: ignore[no-any-return]


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of ``module`` does what ``kind`` says and nothing else: no subclass, hook, or other forward."""
    return type(module) is kind and "forward" not in module.__dict__ and not _has_hooks(module)


def _has_hooks(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or torch.nn.modules.module._has_any_global_hook()


def _is_image_here(x: Tensor) -> bool:
    """Whether ``x`` is a plain [B, C, H, W] on the CPU, and nobody traces what happens to it."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dim() != 4:
        return False
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None


def _fused(norm: nn.BatchNorm2d, x: Tensor, relu: bool, residual: Tensor | None) -> Tensor:
    """The forward of ``nn.BatchNorm2d`` in training, with what follows it."""
    momentum = norm.momentum or 0.0
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:  # the mean of all batches
            momentum = 1.0 / float(norm.num_batches_tracked)
    return batch_norm_act(
        x,
        norm.weight,
        norm.bias,
        residual=residual,
        relu=relu,
        running_mean=norm.running_mean if norm.track_running_stats else None,
        running_var=norm.running_var if norm.track_running_stats else None,
        momentum=momentum,
        eps=norm.eps,
        backend=_backend(),
    )


# So many channels on either side, and the products were faster than torch's convolution.
_MANY_CHANNELS = 64
# For Winograd's so many positions in an image as well: the batch does not decide, since its parts may go to several
# processes.
_MANY_POSITIONS = 16


def convolve(convolution: nn.Module, x: Tensor) -> Tensor:
    """``convolution(x)``; on the CPU, of images in channels_last, by faster products.

    A 1×1 convolution in float32 is a matrix product (``conv1x1``), a 3×3 one goes by Winograd's (``conv3x3``), both of
    stride 1. The weight may be parametrized.
    """
    if not (_is_image_here(x) and _forwards_as_conv2d(convolution)):
        return convolution(x)  # type: ignore[no-any-return]
    operation = _operation(convolution, x)
    if operation is None or not x.is_contiguous(memory_format=torch.channels_last):
        return convolution(x)  # type: ignore[no-any-return]
    weight = convolution.weight  # read once: reading may be an iteration of its spectral norm
    bias = convolution.bias
    if weight.is_contiguous(memory_format=torch.channels_last):
        y = operation(x, weight, backend=_backend())
        return y if bias is None else y + bias[:, None, None]
    return F.conv2d(x, weight, bias, padding=convolution.padding)  # type: ignore[arg-type]


def _operation(convolution: nn.Conv2d, x: Tensor) -> Callable[..., Tensor] | None:
    """What may take the place of a convolution of these channels and this size."""
    if min(convolution.in_channels, convolution.out_channels) < _MANY_CHANNELS:
        return None
    sizes = (convolution.kernel_size, convolution.stride, convolution.padding)
    if sizes == ((1, 1), (1, 1), (0, 0)) and x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        return conv1x1
    many = x.shape[2] * x.shape[3] >= _MANY_POSITIONS
    if sizes == ((3, 3), (1, 1), (1, 1)) and many and convolution.bias is None:
        return conv3x3
    return None


def _forwards_as_conv2d(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether ``module`` does what a ``nn.Conv2d`` of one group does: a parametrized one too."""
    if not isinstance(module, nn.Conv2d) or _has_hooks(module):
        return False
    own = "forward" in module.__dict__ or type(module).forward is not nn.Conv2d.forward
    return not own and module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"


def _backend() -> str:
    """For what is asked for in the environment there may be no kernel: there is none for GPUs."""
    return "torch" if os.environ.get("SABMN_BACKEND") == "torch" else "auto"
