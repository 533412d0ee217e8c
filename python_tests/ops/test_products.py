"""Matrix products of the C++ kernel, against float64."""

import pytest
import torch
from float64_rule import assert_close_to_float64
from instruction_sets import ISAS, instruction_set, needs_native
from torch import Tensor

from sabmn_ext.ops.cpu.products import multiply

# batch, rows, depth, columns: around vectors of 16, blocks of 6 rows, tiles of 64 columns and 128 terms, 512 rows
SIZES = [
    (1, 1, 1, 1), (3, 5, 2, 17), (2, 7, 129, 64), (16, 13, 64, 48), (1, 70, 300, 131), (2, 513, 33, 65),
    (1, 600, 128, 8),
]  # fmt: skip

pytestmark = needs_native


def draw(*shape: int, layout: str, generator: torch.Generator) -> Tensor:
    """[batch, rows, columns]: dense, its transpose, or every second number of something larger."""
    batch, rows, columns = shape
    if layout == "transposed":
        return torch.randn(batch, columns, rows, generator=generator).mT
    if layout == "sliced":
        return torch.randn(batch, rows + 1, 2 * columns, generator=generator)[:, 1:, ::2]
    return torch.randn(shape, generator=generator)


def check(size: tuple[int, ...], left_layout: str, right_layout: str, seed: int) -> None:
    batch, rows, depth, columns = size
    generator = torch.Generator().manual_seed(seed)
    left = draw(batch, rows, depth, layout=left_layout, generator=generator)
    right = draw(batch, depth, columns, layout=right_layout, generator=generator)
    exact = left.double() @ right.double()
    found = multiply(left, right, torch.full((batch, rows, columns), torch.nan))
    assert_close_to_float64(found, left @ right, exact)
    before = torch.randn(batch, rows, columns + 5, generator=generator)[:, :, :columns]
    added = multiply(left, right, before.clone(), add=True)
    assert_close_to_float64(added, before + left @ right, before.double() + exact)
    # Only the columns that are the result's own are written.
    wide = torch.zeros(batch, rows, columns + 70)
    multiply(left, right, wide[:, :, :columns])
    assert torch.equal(wide[:, :, :columns], found)
    assert not wide[:, :, columns:].any()


@pytest.mark.parametrize("right", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize("left", ["dense", "transposed", "sliced"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_products(size: tuple[int, ...], left: str, right: str, seed: int) -> None:
    check(size, left, right, seed)


@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_instruction_set(isa: str, seed: int) -> None:
    with instruction_set(isa):
        for size in SIZES:
            check(size, "transposed", "transposed", seed)
            check(size, "dense", "dense", seed)


def test_threads_do_not_change_a_bit(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(3, 700, 200, generator=generator), torch.randn(3, 200, 100, generator=generator)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 40):
            torch.set_num_threads(threads)
            results.append(multiply(left, right, torch.empty(3, 700, 100)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("size", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0)])
def test_nothing_to_do(size: tuple[int, ...]) -> None:
    batch, rows, depth, columns = size
    multiply(torch.ones(batch, rows, depth), torch.ones(batch, depth, columns), torch.empty(batch, rows, columns))
