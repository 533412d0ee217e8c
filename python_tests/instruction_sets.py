"""The instruction sets of the C++ kernels, and a test under one of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from sabmn_ext import _native

# The last one has a form of its own for attention in bfloat16 alone; all else runs there as for avx512.
ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]

needs_native = pytest.mark.skipif(_native.module is None, reason=_native.missing_reason)


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The kernels for this instruction set; skips the test where the processor has it not."""
    before = _native.module.isa()
    try:
        _native.module.set_isa(name)
    except ValueError as error:
        pytest.skip(str(error))
    try:
        yield
    finally:
        _native.module.set_isa(before)
