"""topk: the lists of a stable sort of the float64 distances, whatever the tiles, the threads or the product."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sabmn_ext
from sabmn_ext.ops import reference
from sabmn_ext.retrieval import search

METRICS = ("euclidean", "cosine")


def sorted_by_distance(query: Tensor, gallery: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """All distances, and a stable sort."""
    pairs = torch.cartesian_prod(torch.arange(len(query)), torch.arange(len(gallery)))
    distances = reference.pair_distances(query, gallery, *pairs.T, metric).view(len(query), len(gallery))
    order = distances.argsort(dim=1, stable=True)[:, :k]
    nearest = distances.gather(1, order)
    return torch.from_numpy(np.sqrt(nearest.numpy())) if metric == "euclidean" else nearest, order


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert (found[0].dtype, found[1].dtype) == (torch.float64, torch.int64)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def draw(rows: int, dim: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(rows, dim, dtype=torch.float64)).to(dtype)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"_QUERY_ROWS": 7, "_TILE_ROWS": 32, "_SQUARE_ROWS": 21, "_BLOCK_ROWS": 5, "_OPEN_PAIRS": 400}
    for name, value in sizes.items():
        monkeypatch.setattr(search, name, value)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_every_dtype(dtype: torch.dtype, metric: str) -> None:
    query, gallery = draw(17, 19, dtype), draw(150, 19, dtype)
    for k in (1, 5, 149, 150):
        found = sabmn_ext.topk(query, gallery, k, metric=metric)
        assert_same(found, sorted_by_distance(query, gallery, k, metric))


HARD = {
    # Exact in float32: any difference is a bug; most distances are ties.
    "small integers": lambda rows: torch.randint(-2, 3, (rows, 6)).float(),
    # Every product is the same to float32; ‖q‖² + ‖g‖² − 2qg has no correct digit.
    "near duplicates": lambda rows: 30 + 1e-6 * torch.randn(rows, 6, dtype=torch.float64),
    "one value": lambda rows: torch.full((rows, 6), 0.7),
    "tiny": lambda rows: 1e-30 * torch.randn(rows, 6),
    "huge": lambda rows: 1e18 * torch.randn(rows, 6),
    "float64 range": lambda rows: 10.0 ** torch.randint(-140, 140, (rows, 1)).double() * torch.randn(rows, 6).double(),
    "one far away": lambda rows: torch.randn(rows, 6) * (1 + 1e9 * (torch.arange(rows) == 3)).float()[:, None],
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("spare", [0, 16])
@pytest.mark.usefixtures("small_tiles")
def test_hard_features(name: str, metric: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_SPARE", spare)
    query, gallery = HARD[name](15), HARD[name](140)
    for k in (1, 20):
        assert_same(sabmn_ext.topk(query, gallery, k, metric=metric), sorted_by_distance(query, gallery, k, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.usefixtures("small_tiles")
def test_the_farthest_item(name: str, metric: str) -> None:
    query, gallery = HARD[name](15), HARD[name](140)
    *_, farthest = search.neighbors(query, gallery, 3, metric, farthest=True)
    pairs = torch.cartesian_prod(torch.arange(15), torch.arange(140))
    assert farthest is not None
    assert torch.equal(farthest, reference.pair_distances(query, gallery, *pairs.T, metric).view(15, 140).amax(1))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("spare", [0, 16])
@pytest.mark.usefixtures("small_tiles")
def test_the_queries_are_the_gallery(name: str, metric: str, spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the product gives what the whole one gives; k above the rows of a block, too."""
    monkeypatch.setattr(search, "_SPARE", spare)
    items = HARD[name](67)
    pairs = torch.cartesian_prod(torch.arange(67), torch.arange(67))
    distances = reference.pair_distances(items, items, *pairs.T, metric).view(67, 67)
    for k in (1, 9, 40, 67):
        nearest, indices, farthest = search.neighbors(items, items, k, metric, farthest=True)
        order = distances.argsort(dim=1, stable=True)[:, :k]
        assert torch.equal(indices, order)
        assert torch.equal(nearest, distances.gather(1, order))
        assert farthest is not None
        assert torch.equal(farthest, distances.amax(dim=1))


@pytest.fixture
def restored_settings() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.usefixtures("restored_settings")
def test_nothing_depends_on_threads_tiles_and_the_products_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = draw(150, 65), draw(2000, 65)
    gallery[1000:] = gallery[:1000]
    expected = sabmn_ext.topk(query, gallery, 30)
    torch.set_num_threads(1)
    assert_same(sabmn_ext.topk(query[3:4], gallery, 30), (expected[0][3:4], expected[1][3:4]))
    monkeypatch.setattr(search, "_TILE_ROWS", 77)
    monkeypatch.setattr(search, "_QUERY_ROWS", 31)
    torch.set_float32_matmul_precision("medium")  # bfloat16 products, where the processor has them
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(sabmn_ext.topk(query, gallery, 30), expected)


def rounded_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Products as a device makes them whose settings allow them less than float32."""
    products = search._products
    monkeypatch.setattr(search, "_products", lambda *pair: products(*(rows.to(dtype).float() for rows in pair)))


def test_a_coarse_product_changes_nothing_where_it_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = draw(40, 2), draw(2000, 2)
    expected = sorted_by_distance(query, gallery, 9, "euclidean")
    rounded_product(monkeypatch, torch.bfloat16)
    monkeypatch.setattr(search, "_input_rounding", lambda device: 2.0**-8)
    assert_same(sabmn_ext.topk(query, gallery, 9), expected)
    monkeypatch.setattr(search, "_input_rounding", lambda device: 0.0)
    monkeypatch.setattr(search, "_SPARE", 0)
    assert not torch.equal(sabmn_ext.topk(query, gallery, 9)[1], expected[1])  # so the bound is what makes it exact


@pytest.mark.usefixtures("restored_settings")
def test_the_settings_are_read() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert search._input_rounding(cpu) == 0
    torch.set_float32_matmul_precision("high")
    assert (search._input_rounding(cpu), search._input_rounding(gpu)) == (2.0**-10, 2.0**-10)
    torch.set_float32_matmul_precision("medium")
    assert (search._input_rounding(cpu), search._input_rounding(gpu)) == (2.0**-8, 2.0**-10)


def test_the_bound_holds_for_the_products_own_worst_case() -> None:
    """Long sums of terms of one sign, added one after the other in float32."""
    query, gallery = draw(4, 3000).abs(), draw(30, 3000).abs()
    largest = float(max(query.double().square().sum(1).max(), gallery.double().square().sum(1).max()))
    bound = search._Bound.of(query - 5, "euclidean", 4 * largest)
    columns, lengths = bound.gallery_columns(query)
    bound.to_query(columns, lengths)
    a, b = ((x.double() - bound.center) * 2.0**bound.scale for x in (query, gallery))
    tile = bound.gallery_columns(gallery)[0]
    product = torch.zeros(4, 30)
    for k in range(columns.shape[1]):
        product += columns[:, k, None] * tile[:, k]
    exact = b.square().sum(1) - 2 * a @ b.T
    assert bool((product.double() <= exact).all())
    assert float((exact - product.double()).max()) < 0.01 * float(exact.abs().max())


def test_numpy_strides_and_memory_maps(tmp_path: Any) -> None:
    query, gallery = draw(5, 8).numpy(), draw(60, 8).numpy()
    np.save(tmp_path / "gallery.npy", gallery)
    expected = sabmn_ext.topk(query, gallery, 7)
    assert_same(sabmn_ext.topk(query, np.load(tmp_path / "gallery.npy", mmap_mode="r"), 7), expected)
    assert_same(sabmn_ext.topk(np.asfortranarray(query), gallery.repeat(2, axis=0)[::2], 7), expected)
    assert_same(sabmn_ext.topk(torch.from_numpy(query).requires_grad_(), torch.from_numpy(gallery), 7), expected)


GOOD = torch.eye(4)
BAD: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((GOOD, GOOD, 0), ValueError, "k is 0; expected 1 to 4, the number of gallery items"),
    ((GOOD, GOOD, -3), ValueError, "k is -3; expected 1 to 4"),
    ((GOOD, GOOD, 5), ValueError, "k is 5; expected 1 to 4"),
    ((GOOD, GOOD, 2.0), TypeError, "k is 2.0; expected an integer"),
    ((GOOD, GOOD, None), TypeError, "k is None; expected an integer"),
    ((GOOD, GOOD[:, :3], 1), ValueError, r"\[4, 4\] and \[4, 3\]"),
    ((GOOD, GOOD.double(), 1), TypeError, "one dtype and device"),
    ((GOOD, GOOD.int(), 1), TypeError, "gallery: expected a tensor or array of float16"),
    ((GOOD[0], GOOD, 1), ValueError, r"query has shape \[4\]; expected two dimensions"),
    ((GOOD, GOOD[:0], 1), ValueError, "there are no gallery items"),
    ((GOOD[:0], GOOD, 1), ValueError, "there are no queries"),
    ((GOOD[:, :0], GOOD[:, :0], 1), ValueError, "with one D ≥ 1"),
    ((GOOD, GOOD / 0, 1), ValueError, "gallery row 0 holds NaN or infinite values"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sabmn_ext.topk(*arguments)


def test_bad_metrics() -> None:
    with pytest.raises(ValueError, match="metric 'dot' is unknown; expected one of euclidean, cosine"):
        sabmn_ext.topk(GOOD, GOOD, 1, metric="dot")
    with pytest.raises(ValueError, match="query row 2 is zero, and the cosine"):
        sabmn_ext.topk(GOOD * torch.tensor([1, 1, 0, 1])[:, None], GOOD, 1, metric="cosine")
    with pytest.raises(ValueError, match="300000 dimensions: too many"):
        sabmn_ext.topk(torch.ones(1, 300_000), torch.ones(1, 300_000), 1)
