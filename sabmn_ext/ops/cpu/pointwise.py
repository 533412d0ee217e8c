"""A 1×1 convolution as matrix products over the positions of images [B, C, H, W] in channels_last, float32."""

import math

import torch
from torch import Tensor

from sabmn_ext.ops.cpu.images import empty_image
from sabmn_ext.ops.cpu.products import multiply

_KEPT_BY_MALLOC = 1 << 25  # bytes; glibc takes larger ones from the system each time, with a page fault for each 4 KB


def _empty_image(x: Tensor, channels: int) -> Tensor:
    """Of x's kind, not of torch's default dtype and device."""
    shape = (x.shape[0], channels, *x.shape[2:])
    if math.prod(shape) * x.itemsize >= _KEPT_BY_MALLOC:
        return empty_image(shape, x.dtype)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(1, -1, image.shape[1])


def _matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)[None]


def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, None]:
    """y [B, O, H, W] for the weight [O, C, 1, 1]; the backward pass needs nothing else."""
    y = _empty_image(x, weight.shape[0])
    multiply(_rows(x), _matrix(weight).mT, _rows(y))
    return y, None


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, _: None, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and weight that are wanted."""
    grad_x = _empty_image(x, x.shape[1]) if needs_x else None
    grad_weight = torch.empty_like(weight) if needs_weight else None  # of its strides, which DDP wants
    if grad_x is not None:
        multiply(_rows(grad_y), _matrix(weight), _rows(grad_x))
    if grad_weight is not None:
        multiply(_rows(grad_y).mT, _rows(x), _matrix(grad_weight))
    return grad_x, grad_weight
