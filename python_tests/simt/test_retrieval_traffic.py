"""The traffic that benchmarks/retrieval_traffic.py computes: near its floor, linear, and of the compiled plan."""

import math
import random

import pytest
import retrieval_traffic
import torch

from sabmn_ext import _native
from sabmn_ext.ops import gpu_ranking, reference

SIZES = [(3368, 19732, 1024, 49510), (11659, 82161, 2048, 408065)]  # Market-1501 and MSMT17


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_launch_is_near_its_floor(sizes: tuple[int, int, int, int]) -> None:
    for name, launch in retrieval_traffic.traffic(*sizes).items():
        assert launch.floor <= launch.distinct <= 1.25 * launch.floor, name
        assert launch.least <= launch.mma <= 1.1 * launch.least, name


def test_traffic_is_linear_in_the_tiles() -> None:
    tile = gpu_ranking._TILE_PAIRS // 8192
    one, two, three = (retrieval_traffic.traffic(8192, n * tile, 512, 1000) for n in (1, 2, 3))
    for name in one:
        assert two[name].mma == 2 * one[name].mma, name
        more = [two[name].distinct - one[name].distinct, three[name].distinct - two[name].distinct]
        assert more[0] == pytest.approx(more[1]), name


def test_open_share_is_that_of_drawn_distances(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 2.0 ** torch.rand(400_000, dtype=torch.float64, generator=generator)  # mantissas as Benford has them
    for dim in (256, 2048):
        share = retrieval_traffic.open_share(dim)
        error = share / (2 * 2**reference.BIN_BITS / math.log(2))
        bins = [reference.bin_of(x * (1 + sign * error), 0, 0, 1 << 62) for sign in (-1, 1)]
        assert (bins[0] != bins[1]).double().mean().item() == pytest.approx(share, rel=0.1)


@pytest.mark.skipif(
    not hasattr(_native.module, "tensor_product_error"), reason="the native module was built without CUDA"
)
def test_the_plan_is_the_compiled_one(seed: int) -> None:
    native = _native.module
    assert native is not None
    assert (native.PACKED_ROWS, native.PACKED_DEPTH) == (retrieval_traffic.SIDE, retrieval_traffic.DEPTH)
    for dim in [1, 64, 65, *random.Random(seed).sample(range(1, 5000), 20)]:
        assert native.tensor_product_error(dim) == pytest.approx(retrieval_traffic.product_error(dim), rel=1e-12)
