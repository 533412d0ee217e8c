"""The traffic that benchmarks/spectral_norm_traffic.py computes: near its floor, and of the plan that is compiled."""

import random

import pytest
import spectral_norm_traffic
import torch

from sabmn_ext import _native
from sabmn_ext.ops import dispatch


@pytest.mark.parametrize("normalized", ["float32", "bfloat16"])
def test_every_launch_is_near_its_floor(normalized: str) -> None:
    shapes = spectral_norm_traffic.network_shapes()
    assert len(shapes) == 58
    for name, launch in spectral_norm_traffic.traffic(shapes, normalized=normalized).items():
        assert launch.floor <= launch.distinct <= 1.25 * launch.floor, name


@pytest.mark.skipif(
    not hasattr(_native.module, "spectral_norm_cuda_workspace"), reason="the native module was built without CUDA"
)
@pytest.mark.parametrize("dtype", dispatch.DTYPE_CODES, ids=str)
def test_the_workspace_is_that_of_the_compiled_plan(dtype: torch.dtype, seed: int) -> None:
    generator = random.Random(seed)
    sizes = [(1, 1), (512, 4608), *((generator.randint(1, 3000), generator.randint(1, 9000)) for _ in range(50))]
    rows, columns = zip(*sizes, strict=True)
    compiled = _native.module.spectral_norm_cuda_workspace(list(rows), list(columns), dispatch.DTYPE_CODES[dtype])
    computed = spectral_norm_traffic.workspace([(r, c, c) for r, c in sizes], str(dtype).removeprefix("torch."))
    assert compiled == computed
