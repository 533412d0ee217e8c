"""Checks what callers hand in: features, distances and labels, as torch tensors or numpy arrays."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK_ELEMENTS = 1 << 22  # 16 MB of float32


def as_matrix(name: str, value: Any, *, integers: bool = False) -> Tensor:
    """``value`` [rows, columns] as a tensor that shares its memory; integers become float64 where they are allowed."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.dtype.itemsize <= 8:
        if not value.dtype.isnative or any(stride < 0 for stride in value.strides):
            value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            value = torch.from_numpy(value)
    if integers and isinstance(value, Tensor) and value.dtype in (torch.uint8, torch.int16, torch.int32, torch.int64):
        value = value.double()
    if not isinstance(value, Tensor) or value.dtype not in _FLOATING:
        given = f"dtype {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise TypeError(f"{name}: expected a tensor or array of float16, bfloat16, float32 or float64, not {given}")
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected two dimensions")
    return value.detach()


def as_labels(name: str, value: Any, length: int) -> np.ndarray:
    """``value`` as int64 [length]."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, but has dtype {array.dtype}")
    if array.shape != (length,):
        side = name.split("_")[0]
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [{length}], one for each {side} item")
    return array.astype(np.int64, copy=False)


def check_features(
    name: str, features: Tensor, metric: str, names: Sequence[str] | None, backend: str | None = None
) -> float:
    """The largest squared norm of a row [rows, D]; reads the features once, in blocks.

    Raises:
        ValueError: names the first row that is not finite, overflows float64 when it is squared, or is zero under the
            cosine metric; and its image where ``names`` are given.
    """
    largest = 0.0
    rows = max(1, _BLOCK_ELEMENTS // features.shape[1])
    for first in range(0, len(features), rows):
        squared = torch.ops.sabmn_ext.squared_norms(features[first : first + rows], backend)
        bad = ~(squared < 1e300)
        if metric == "cosine":
            bad |= squared == 0
        if bool(bad.any()):
            row = first + int(bad.nonzero()[0])
            problem = "holds NaN or infinite values"
            if bool(torch.isfinite(features[row]).all()):
                zero = "is zero, and the cosine distance needs a direction"
                problem = zero if squared[row - first] == 0 else "holds values too large to be squared in float64"
            raise ValueError(f"{name} row {row}{'' if names is None else f' ({names[row]})'} {problem}")
        largest = max(largest, float(squared.max()))
    return largest
