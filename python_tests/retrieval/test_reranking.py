"""Re-ranking against a dense float64 twin of its definition, which shares nothing with the package."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sabmn_ext
from sabmn_ext import _native
from sabmn_ext.ops import dispatch
from sabmn_ext.ops.rerank import exact_center
from sabmn_ext.retrieval import reranking, search


def dense_twin(query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, lam: float, metric: str) -> np.ndarray:
    """The definition in docs/search.md, step by step, with N × N matrices."""
    items = np.concatenate((query, gallery)).astype(np.float64)
    if metric == "cosine":
        units = items / np.linalg.norm(items, axis=1, keepdims=True)
        distances = 2 - 2 * units @ units.T
    else:
        distances = ((items[:, None] - items[None]) ** 2).sum(axis=2)
    count = len(items)
    scaled = (distances / distances.max(axis=0)).T  # each column by its maximum; row i: the distances of item i
    order = np.argsort(scaled, axis=1, kind="stable")

    def reciprocal(i: int, k: int) -> list[int]:
        return [j for j in order[i, : k + 1] if i in order[j, : k + 1]]

    weights = np.zeros((count, count))
    for i in range(count):
        first = set(reciprocal(i, k1))
        expanded = set(first)
        for j in first:
            second = set(reciprocal(j, round(k1 / 2)))
            if len(second & first) > 2 / 3 * len(second):
                expanded |= second
        members = sorted(expanded)
        weights[i, members] = np.exp(-scaled[i, members])
        weights[i] /= max(weights[i].sum(), 1e-300)
    if k2 > 1:
        weights = np.stack([weights[order[i, :k2]].mean(axis=0) for i in range(count)])
    shared = np.minimum(weights[: len(query), None], weights[None, len(query) :]).sum(axis=2)
    return (1 - lam) * (1 - shared / (2 - shared)) + lam * scaled[: len(query), len(query) :]


def people(num_query: int, num_gallery: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A few centres and as much noise, so that the neighbours overlap."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(max(2, num_gallery // 8), 7, generator=generator)
    sides = []
    for count in (num_query, num_gallery):
        of = torch.randint(len(centers), (count,), generator=generator)
        sides.append((centers[of] + 0.5 * torch.randn(count, 7, generator=generator)).to(dtype))
    return sides[0], sides[1]


SETTINGS = [(20, 6, 0.3), (20, 1, 0.3), (5, 3, 0.0), (7, 9, 0.8), (1, 1, 0.5), (3, 2, 1.0)]
CASES = [("auto", *each) for each in SETTINGS] + [("torch", 20, 6, 0.3), ("torch", 7, 9, 0.8)]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize(("backend", "k1", "k2", "lam"), CASES)
def test_equal_to_the_dense_twin(
    backend: str, k1: int, k2: int, lam: float, metric: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SABMN_BACKEND", backend)
    query, gallery = people(9, 80, seed + 10 * k1 + k2)
    options: dict[str, Any] = {"k1": k1, "k2": k2, "lambda_value": lam, "metric": metric}
    with dispatch.record() as calls:
        found = sabmn_ext.rerank(query, gallery, **options).dense()
    expected = dense_twin(query.numpy(), gallery.numpy(), k1, k2, lam, metric)
    assert (found.dtype, found.shape) == (torch.float64, (9, 80))
    assert np.abs(found.numpy() - expected).max() < 1e-9
    taken = "torch" if backend == "torch" or _native.module is None else "cpu"
    assert {name for operation, name in calls if operation == "rerank"} == {taken}
    # Something has been re-ranked, and not everything is alike.
    plain = dense_twin(query.numpy(), gallery.numpy(), k1, k2, 1.0, metric)
    assert lam == 1 or (np.abs(expected - plain) > 0.01).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype(dtype: torch.dtype, seed: int) -> None:
    query, gallery = people(7, 60, seed, dtype)
    found = sabmn_ext.rerank(query, gallery).dense()
    expected = dense_twin(query.double().numpy(), gallery.double().numpy(), 20, 6, 0.3, "euclidean")
    assert np.abs(found.numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("sizes", [(1, 63, 3), (13, 64, 255), (98, 65, 257), (25, 130, 600)])
def test_sizes_that_fill_no_panel(sizes: tuple[int, int, int], metric: str) -> None:
    num_query, num_gallery, dim = sizes
    query = torch.randn(2 * num_query, dim).abs()[::2]
    gallery = torch.randn(dim, num_gallery).abs().T
    found = sabmn_ext.rerank(query, gallery, metric=metric).dense()
    expected = dense_twin(query.numpy(), gallery.numpy(), 20, 6, 0.3, metric)
    assert np.abs(found.numpy() - expected).max() < 1e-9


OFFSETS = {
    "far from the origin": lambda x: 1000 + x,
    "far on the other side": lambda x: -3000 + x,
    "near duplicates": lambda x: 30 + 1e-5 * x,
    "one feature far": lambda x: x + 1e4 * torch.eye(7)[0],
    "one item far": lambda x: x + 1e6 * (torch.arange(len(x)) == 3)[:, None],
}


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_cancels_is_subtracted_first(name: str, dtype: torch.dtype, seed: int) -> None:
    query, gallery = (OFFSETS[name](side.double()).to(dtype) for side in people(21, 130, seed))
    found = sabmn_ext.rerank(query, gallery).dense()
    expected = dense_twin(query.numpy(), gallery.numpy(), 20, 6, 0.3, "euclidean")
    assert np.abs(found.numpy() - expected).max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_center_is_subtracted_without_rounding(dtype: torch.dtype) -> None:
    x, scale, offset = torch.rand(90, 5), torch.tensor([1.0, -6, 2, 1, 0]), torch.tensor([3.0, -7, -1, 0, 1])
    query, gallery = (offset + scale * x).to(dtype).split((20, 70))
    center = exact_center(query, gallery, "euclidean")
    assert (center != 0).tolist() == [True, True, False, False, True]
    for side in (query, gallery):
        differences = side.double() - center
        assert torch.equal(differences.to(dtype).double(), differences)
    assert not exact_center(query, gallery, "cosine").any()


def test_ties_and_duplicates(seed: int) -> None:
    """Small integers: most distances are ties, decided by the lower index; an item may be missing in its own list."""
    generator = torch.Generator().manual_seed(seed)
    query, gallery = (torch.randint(-1, 2, (n, 3), generator=generator).double() for n in (12, 120))
    found = sabmn_ext.rerank(query, gallery, k1=6, k2=3)
    expected = dense_twin(query.numpy(), gallery.numpy(), 6, 3, 0.3, "euclidean")
    assert np.abs(found.dense().numpy() - expected).max() < 1e-9


def test_few_items_and_one_value() -> None:
    query, gallery = people(1, 4, 0)
    expected = dense_twin(query.numpy(), gallery.numpy(), 20, 6, 0.3, "euclidean")
    assert np.abs(sabmn_ext.rerank(query, gallery).dense().numpy() - expected).max() < 1e-9
    collapsed = sabmn_ext.rerank(torch.ones(3, 4), torch.ones(30, 4)).dense()
    assert torch.isfinite(collapsed).all()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_same_bits_from_blocks_threads_tiles_and_every_instruction_set(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, gallery = people(37, 150, seed)
    expected = sabmn_ext.rerank(query, gallery).dense()
    if _native.module is not None:
        chosen = _native.module.isa()
        try:
            for isa in _native.module.build_info()["isas"]:
                try:
                    _native.module.set_isa(isa)
                except ValueError:
                    continue
                assert torch.equal(sabmn_ext.rerank(query, gallery).dense(), expected), isa
        finally:
            _native.module.set_isa(chosen)
    torch.set_num_threads(1 if torch.get_num_threads() > 1 else 2)
    monkeypatch.setattr(search, "_SQUARE_ROWS", 41)
    monkeypatch.setattr(reranking, "_BLOCK_ELEMENTS", 150 * 5)
    found = sabmn_ext.rerank(query, gallery)
    assert [len(block) for block in found] == [5] * 7 + [2]
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found.rows(11, 13), expected[11:13])


def test_the_evaluator_takes_it(seed: int) -> None:
    query, gallery = people(30, 200, seed)
    pids = [np.random.default_rng(seed).integers(0, 20, n) for n in (30, 200)]
    lazy = sabmn_ext.evaluate_distances(sabmn_ext.rerank(query, gallery), *pids)
    expected = dense_twin(query.numpy(), gallery.numpy(), 20, 6, 0.3, "euclidean")
    assert lazy.map == pytest.approx(sabmn_ext.evaluate_distances(expected, *pids).map, abs=1e-12)


def test_reranking_finds_what_the_distance_alone_does_not() -> None:
    """Two rings of neighbours, one within the other: the far side of a ring is nearer in steps than the other ring."""
    angles = torch.linspace(0, 2 * torch.pi, 61)[:-1]
    ring = torch.stack((angles.cos(), angles.sin()), dim=1)
    gallery, pids = torch.cat((ring, 1.6 * ring)), np.repeat([0, 1], 60)
    plain = sabmn_ext.evaluate_retrieval(gallery, gallery, pids, pids, exclude_self=True)
    found = sabmn_ext.evaluate_distances(sabmn_ext.rerank(gallery, gallery, k1=8), pids, pids, exclude_self=True)
    assert found.map > plain.map + 0.01


BAD = [
    ({"k1": 0}, "k1 is 0; expected an integer of at least 1"),
    ({"k1": -20}, "k1 is -20; expected"),
    ({"k2": 2.5}, "k2 is 2.5; expected"),
    ({"lambda_value": 1.5}, "lambda_value is 1.5; expected a number from 0 to 1"),
    ({"lambda_value": float("nan")}, "lambda_value is nan; expected"),
    ({"metric": "dot"}, "metric 'dot' is unknown"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sabmn_ext.rerank(torch.eye(3), torch.eye(3), **options)


def test_bad_features() -> None:
    with pytest.raises(ValueError, match=r"\[3, 3\] and \[2, 2\]"):
        sabmn_ext.rerank(torch.eye(3), torch.eye(2))
    with pytest.raises(ValueError, match="there are no gallery items"):
        sabmn_ext.rerank(torch.eye(3), torch.eye(3)[:0])
    with pytest.raises(ValueError, match="gallery row 1 holds NaN"):
        sabmn_ext.rerank(torch.eye(3), torch.tensor([[1.0, 2, 3], [1, torch.nan, 3]]))
