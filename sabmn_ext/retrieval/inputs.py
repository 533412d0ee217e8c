"""Checks what callers hand in: features, distances and labels, as torch tensors or numpy arrays."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BLOCK_ELEMENTS = 1 << 21


def as_matrix(name: str, value: Any, *, integers: bool = False) -> Tensor:
    """``value`` [rows, columns] as a tensor that shares its memory where it can.

    Raises:
        TypeError: not a tensor or array, or of a dtype that is not floating (nor integer where ``integers``).
        ValueError: not two-dimensional.
    """
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiu" or value.dtype.itemsize > 8:
            raise TypeError(f"{name} has dtype {value.dtype}; expected float16, float32 or float64")
        if not value.dtype.isnative or any(stride < 0 for stride in value.strides):
            value = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("="))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; expected a torch tensor or a numpy array")
    if integers and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool:
        value = value.double()
    if value.dtype not in _FLOATING:
        raise TypeError(f"{name} has dtype {value.dtype}; expected one of {', '.join(map(str, _FLOATING))}")
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {list(value.shape)}; expected two dimensions")
    return value.detach()


def as_labels(name: str, value: Any, length: int) -> np.ndarray:
    """``value`` as int64 [length]; a TypeError where it does not hold integers, a ValueError where the length is wrong."""
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, but has dtype {array.dtype}")
    if array.shape != (length,):
        raise ValueError(f"{name} has shape {list(array.shape)}; expected [{length}], one for each {name.split('_')[0]} item")
    return array.astype(np.int64)


def check_features(name: str, features: Tensor, metric: str, names: Sequence[str] | None) -> None:
    """Every row must be finite, small enough to be squared in float64, and not zero where the metric is cosine.

    Raises:
        ValueError: naming the first bad row, and its image where ``names`` is given.
    """
    rows = max(1, _BLOCK_ELEMENTS // features.shape[1])
    for first in range(0, len(features), rows):
        block = features[first : first + rows]
        squared = block.double().square().sum(dim=1)
        bad = ~(squared < 1e300) | ((squared == 0) if metric == "cosine" else False)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            where = f"{name} row {first + row}" + (f" ({names[first + row]})" if names is not None else "")
            if not bool(torch.isfinite(block[row]).all()):
                raise ValueError(f"{where} holds NaN or infinite values")
            if squared[row] == 0:
                raise ValueError(f"{where} is zero, so it has no direction: the cosine metric is undefined there")
            raise ValueError(f"{where} holds values too large to be squared in float64")


def check_distances(rows: Tensor, first_row: int) -> None:
    """No NaN; infinite distances are ranked like any other."""
    missing = rows.isnan()
    if bool(missing.any()):
        row, column = missing.nonzero()[0].tolist()
        raise ValueError(f"distances hold NaN at row {first_row + row}, column {column}")
