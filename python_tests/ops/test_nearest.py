"""The smallest entries of every row, kept tile by tile: C++ under every instruction set, and plain torch."""

from collections.abc import Iterator

import pytest
import torch
from instruction_sets import ISAS, instruction_set, needs_native
from torch import Tensor

from sabmn_ext.ops import dispatch, nearest, reference


@pytest.fixture(params=["torch", *(pytest.param(isa, marks=needs_native) for isa in ISAS[:-1])])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "torch":
        monkeypatch.setenv("SABMN_BACKEND", "torch")
        yield "torch"
        return
    with instruction_set(request.param):
        yield "cpu"


DRAWS = {
    "normal": lambda rows, columns: torch.randn(rows, columns),
    "ties": lambda rows, columns: torch.randint(0, 5, (rows, columns)).float(),
    "each smaller than the one before": lambda rows, columns: -torch.arange(float(rows * columns)).view(rows, columns),
    "beside a large offset": lambda rows, columns: 1e-30 * torch.randn(rows, columns),
}


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 2, 37, 300])
def test_all_tiles_together(backend: str, name: str, sign: float, count: int) -> None:
    """Tiles smaller than ``count`` and larger, strided ones, offsets that change; fewer columns than ``count``, too."""
    rows, widths = 23, (3, 129, 64, 1)
    smallest = nearest.Smallest(rows, count, sign, torch.device("cpu"))
    tiles = [DRAWS[name](rows, 2 * width)[:, ::2] for width in widths]
    offsets = [torch.randn(rows, dtype=torch.float64) for _ in widths]
    with dispatch.record() as calls:
        for i, (tile, offset) in enumerate(zip(tiles, offsets, strict=True)):
            smallest.add(tile, offset, 1000 + sum(widths[:i]))
    assert calls == [("keep_smallest", backend)] * len(widths)
    bounds = torch.cat([sign * t.double() + o[:, None] for t, o in zip(tiles, offsets, strict=True)], 1)
    items = smallest.items - 1000
    assert items.shape == (rows, min(count, sum(widths)))
    assert all(len(set(row)) == len(row) for row in items.tolist())
    assert torch.equal(bounds.gather(1, items), smallest.values)
    assert torch.equal(smallest.values.sort().values, bounds.sort().values[:, : items.shape[1]])


@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 2, 37, 300])
def test_tiles_of_both_sides(backend: str, name: str, sign: float, count: int) -> None:
    """Tiles whose rows are these rows, and whose columns are, in turn; more columns than a thread takes at once."""
    rows, widths = 283, (3, 130, 65, 1, 40)
    smallest = nearest.Smallest(rows, count, sign, torch.device("cpu"))
    parts, done = [], 0
    with dispatch.record() as calls:
        for i, width in enumerate(widths):
            transposed = i % 2 == 1
            shape = (width, rows) if transposed else (rows, width)
            tile, offsets = DRAWS[name](*shape), torch.randn(shape[0], dtype=torch.float64)
            smallest.add(tile, offsets, done, transposed=transposed)
            bounds = sign * tile.double() + offsets[:, None]
            parts.append(bounds.T if transposed else bounds)
            done += width
    assert calls == [("keep_smallest", backend)] * len(widths)
    bounds, items = torch.cat(parts, 1), smallest.items
    assert items.shape == (rows, min(count, done))
    assert all(len(set(row)) == len(row) for row in items.tolist())
    assert torch.equal(bounds.gather(1, items), smallest.values)
    assert torch.equal(smallest.values.sort().values, bounds.sort().values[:, : items.shape[1]])


FEATURES = {
    "normal": lambda rows: torch.randn(rows, 19),
    "ties": lambda rows: torch.randint(-1, 2, (rows, 3)).double(),
    "one value": lambda rows: torch.full((rows, 5), 0.5).bfloat16(),
    "strided": lambda rows: torch.randn(19, rows).T[:, ::2],
}


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("k", [1, 20, 260])
def test_ranks_what_is_kept(backend: str, name: str, metric: str, sign: float, k: int) -> None:
    """More queries than are taken together; bounds that are below the exact distance by up to the slack."""
    features = FEATURES[name](400)
    features[features.double().norm(dim=1) == 0] = 1
    query, gallery, slack = features[:131], features[131:], 0.3
    pairs = torch.cartesian_prod(torch.arange(131), torch.arange(269))
    exact = sign * reference.pair_distances(query, gallery, *pairs.T, metric).view(131, 269)
    bounds = (exact - 0.999 * slack * torch.rand(131, 269)).float() - 1e-4
    smallest = nearest.Smallest(131, 269, sign, torch.device("cpu"))
    smallest.add(sign * bounds, torch.zeros(131, dtype=torch.float64), 0)
    with dispatch.record() as calls:
        distances, items = smallest.rank(query, gallery, metric, slack, k)
    assert ("rank_kept", backend) in calls
    order = exact.argsort(dim=1, stable=True)[:, :k]
    assert torch.equal(items, order)
    assert torch.equal(distances, exact.gather(1, order))


def test_threads_do_not_matter() -> None:
    tile, offsets = torch.randn(70, 500), torch.zeros(70, dtype=torch.float64)
    found: list[Tensor] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            smallest = nearest.Smallest(70, 9, 1.0, tile.device)
            smallest.add(tile, offsets, 0)
            found += [smallest.values, smallest.items]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize(("width", "count"), [(512, 16), (512, 15), (512, 1), (512, 17), (500, 3), (16, 1), (3, 3)])
def test_the_extremes_of_rows(width: int, count: int, largest: bool) -> None:
    for rows in (torch.randn(20, width), torch.randint(0, 9, (20, width)).float()):
        values, columns = nearest._extremes(rows, count, largest=largest)
        assert torch.equal(rows.gather(1, columns), values)
        assert all(len(set(row)) == count for row in columns.tolist())
        assert torch.equal(values.sort().values, rows.topk(count, largest=largest).values.sort().values)
