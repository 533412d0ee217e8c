"""Matrix products in float32 by the C++ kernel of csrc/products."""

import torch
from torch import Tensor

from sabmn_ext import _native


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """``out = left @ right``, or ``out += left @ right``: [P, M, K] by [P, K, N] in float32, K at least 1.

    ``left`` and ``right`` may have any strides, ``out``'s rows are dense.
    """
    assert _native.module is not None
    (batch, rows, depth), columns = left.shape, right.shape[2]
    matrices = [(tensor.data_ptr(), *tensor.stride()) for tensor in (left, right, out)]
    _native.module.products((batch, rows, depth, columns), *matrices, add, torch.get_num_threads())
    return out
