"""A stand-in for the native module's CUDA functions: the memory they are given, and its place in the package."""

import contextlib
import ctypes
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

DTYPES = {code: dtype for dtype, code in dispatch.DTYPE_CODES.items()}


def at(address: int, shape: tuple[int, ...], dtype: torch.dtype, strides: tuple[int, ...] | None = None) -> Tensor:
    """The memory at an address as a tensor that shares it; dense without strides."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (extent * torch.empty(0, dtype=dtype).element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def install(monkeypatch: pytest.MonkeyPatch, native: object, operations: Sequence[str]) -> None:
    """``native`` takes the place of the compiled module, and the operations are served by ``cuda`` on any device."""
    monkeypatch.setattr(_native, "module", native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    for operation in operations:
        monkeypatch.setitem(dispatch._operations[operation], "cuda", lambda device, dtype: None)
