"""Large output tensors on the CPU whose memory is used again once torch has released them.

Fresh memory costs a page fault every 4 KB: about as much time as filling it. A training step hands out the same sizes
again and again, and the last step's are released by then.
"""

import math
import sys
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MIN_BYTES = 1 << 16  # malloc keeps smaller ones by itself
KEPT_CALLS = 8  # a buffer that so many calls had no use for is given back
_ALIGNMENT = 64


class _Buffer:
    def __init__(self, nbytes: int) -> None:
        memory = np.empty(nbytes + _ALIGNMENT, dtype=np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        self.bytes = memory[start : start + nbytes]
        self.last_used = 0
        self._references_when_free = self._references()

    def _references(self) -> int:
        return sys.getrefcount(self.bytes)

    def is_free(self) -> bool:
        """Whether no tensor stands on the memory any more: each one holds a reference."""
        return self._references() == self._references_when_free


_pools: "weakref.WeakSet[Buffers]" = weakref.WeakSet()


def release() -> None:
    """Give back the memory that all operations keep for their next outputs (as ``torch.cuda.empty_cache`` does)."""
    for pool in list(_pools):
        pool.release()


class Buffers:
    """Hands out tensors; knows by their reference counts which ones torch has released.

    Args:
        kept_calls: a buffer that so many calls had no use for is given back.
    """

    def __init__(self, kept_calls: int = KEPT_CALLS) -> None:
        self._kept_calls = kept_calls
        self._buffers: dict[int, list[_Buffer]] = {}
        self._calls = 0
        self._lock = threading.Lock()
        _pools.add(self)

    def empty_like(self, tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Uninitialised tensors with the shapes and strides of the dense ``tensors``."""
        return self.empty_strided([(tensor.shape, tensor.stride(), dtype) for tensor in tensors])

    def empty_strided(self, layouts: Sequence[tuple[Sequence[int], Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Uninitialised tensors with these shapes, dense strides and dtypes."""
        with self._lock:
            self._calls += 1
            results = [self._empty_strided(*layout) for layout in layouts]
            self._give_back()
        return results

    def release(self) -> None:
        """Give back all memory that no tensor stands on."""
        with self._lock:
            for nbytes, buffers in self._buffers.items():
                self._buffers[nbytes] = [b for b in buffers if not b.is_free()]

    def __len__(self) -> int:
        return sum(len(buffers) for buffers in self._buffers.values())

    def _empty_strided(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes < MIN_BYTES:
            return torch.empty_strided(shape, stride, dtype=dtype, device="cpu")
        buffers = self._buffers.setdefault(nbytes, [])
        # The one that was used last is still in a cache.
        i = next((i for i in reversed(range(len(buffers))) if buffers[i].is_free()), None)
        buffer = _Buffer(nbytes) if i is None else buffers.pop(i)
        buffers.append(buffer)
        buffer.last_used = self._calls
        return torch.frombuffer(buffer.bytes, dtype=dtype).as_strided(shape, stride)

    def _give_back(self) -> None:
        for nbytes, buffers in self._buffers.items():
            oldest = self._calls - self._kept_calls
            self._buffers[nbytes] = [b for b in buffers if b.last_used > oldest or not b.is_free()]
