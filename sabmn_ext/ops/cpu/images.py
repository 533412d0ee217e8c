"""Memory for what convolutions on the CPU work with and return, used again once torch has released it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sabmn_ext.ops.cpu.buffers import Buffers

# Of all layers in turn, and what the last step's images and gradients stood on.
_buffers = Buffers(kept_calls=1024)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An uninitialised dense tensor."""
    strides = [1]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size)
    return _buffers.empty_strided([(shape, strides, dtype)])[0]


def empty_image(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised [B, C, H, W] in channels_last."""
    batch, channels, height, width = shape
    return empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)
