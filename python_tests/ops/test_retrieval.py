"""The retrieval ops: the same bits from every backend, instruction set, tile and number of threads."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference, retrieval

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
DIMS = (1, 15, 16, 17, 131)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def draw_labels(num_queries: int, num_gallery: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query_pids, gallery_pids with junk, offsets, matches: every other item with the query's pid."""
    generator = torch.Generator().manual_seed(seed)
    query_pids = torch.randint(0, 6, (num_queries,), generator=generator)
    gallery_pids = torch.randint(-1, 6, (num_gallery,), generator=generator)
    lists = [(gallery_pids == pid).nonzero()[::2, 0] for pid in query_pids]
    offsets = torch.tensor([0, *(len(items) for items in lists)]).cumsum(0)
    return query_pids, gallery_pids, offsets, torch.cat(lists)


def draw_features(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    features = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    features[rows // 2 :] = features[: rows - rows // 2].clone()  # every item has a duplicate: exact ties
    return features


def rank_matches(*arguments: Any, **options: Any) -> Tensor:
    return retrieval.rank_matches(*arguments, **options)[0]


@pytest.fixture
def isas() -> Iterator[list[str]]:
    """The instruction sets that run here; the chosen one is put back."""
    assert _native.module is not None
    chosen, usable = _native.module.isa(), []
    for isa in _native.module.build_info()["isas"]:
        try:
            _native.module.set_isa(isa)
            usable.append(isa)
        except ValueError:
            pass
    _native.module.set_isa(chosen)
    yield usable
    _native.module.set_isa(chosen)


@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("dim", DIMS)
def test_reference_distances_against_correctly_rounded_sums(dim: int, metric: str) -> None:
    query, gallery = draw_features(4, dim, torch.float64, dim), draw_features(6, dim, torch.float64, dim + 1)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(6))
    ours = reference.pair_distances(query, gallery, *pairs.T, metric).tolist()
    for (i, j), value in zip(pairs.tolist(), ours, strict=True):
        q, g = query[i].tolist(), gallery[j].tolist()
        if metric == "euclidean":
            expected = math.fsum((a - b) ** 2 for a, b in zip(q, g, strict=True))
        else:
            dot = math.fsum(a * b for a, b in zip(q, g, strict=True))
            expected = 1 - dot / math.sqrt(math.fsum(a * a for a in q) * math.fsum(b * b for b in g))
        assert value == pytest.approx(expected, rel=1e-14, abs=1e-15)


@native
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_backends_and_instruction_sets_agree_bit_for_bit(
    dim: int, dtype: torch.dtype, metric: str, isas: list[str]
) -> None:
    assert _native.module is not None
    query, gallery = draw_features(7, dim, dtype, dim), draw_features(51, dim, dtype, dim + 1)
    query[2] = gallery[5]
    labels = draw_labels(7, 51, dim)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(51)).T
    distances = reference.pair_distances(query, gallery, *pairs, metric)
    ranks = rank_matches(query, gallery, *labels, metric=metric, backend="torch")
    for isa in isas:
        _native.module.set_isa(isa)
        with dispatch.record() as calls:
            ours = torch.ops.sabmn_ext.pair_distances(query, gallery, *pairs, metric, None)
            our_ranks = rank_matches(query, gallery, *labels, metric=metric)
        assert calls == [("pair_distances", "cpu")] * 2 + [("count_nonmatches", "cpu")]
        assert torch.equal(ours, distances), isa
        assert torch.equal(our_ranks, ranks), isa


@native
@pytest.mark.parametrize("metric", retrieval.METRICS)
def test_tiles_and_threads_change_nothing(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery = draw_features(37, 33, torch.float32, 0), draw_features(301, 33, torch.float32, 1)
    labels = draw_labels(37, 301, 2)
    expected = rank_matches(query, gallery, *labels, metric=metric, backend="torch")
    threads = torch.get_num_threads()
    try:
        for tile_bytes in (1, 3000, 1 << 18):
            for count in (1, 3):
                monkeypatch.setattr(retrieval, "_TILE_BYTES", tile_bytes)
                torch.set_num_threads(count)
                assert torch.equal(rank_matches(query, gallery, *labels, metric=metric), expected)
    finally:
        torch.set_num_threads(threads)
    one_by_one = [
        rank_matches(
            query[q : q + 1],
            gallery,
            labels[0][q : q + 1],
            labels[1],
            labels[2][q : q + 2] - labels[2][q],
            labels[3][labels[2][q] : labels[2][q + 1]],
            metric=metric,
        )
        for q in range(37)
    ]
    assert torch.equal(torch.cat(one_by_one), expected)


@native
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_any_strides(backend: str) -> None:
    wide = torch.randn(60, 40, generator=torch.Generator().manual_seed(3))
    query, gallery = wide.T[3:29:3, :31], wide[::2, 5:36]
    labels = draw_labels(len(query), len(gallery), 4)
    expected = rank_matches(query.contiguous(), gallery.contiguous(), *labels, backend=backend)
    assert torch.equal(rank_matches(query, gallery, *labels, backend=backend), expected)
    rows = torch.cdist(query, gallery).T.contiguous().T
    expected = rank_matches(None, rows.contiguous(), *labels, backend=backend)
    assert torch.equal(rank_matches(None, rows, *labels, backend=backend), expected)


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_read_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]  # subnormals and infinities included
    rows = values[None]
    pid, before_all = torch.tensor([0]), torch.tensor([-1])
    for threshold in (0, 1, 777, len(values) // 2, len(values) - 1):
        distance = values[threshold : threshold + 1].double()
        counts = torch.ops.sabmn_ext.count_nonmatches(
            None, rows, pid, torch.ones(len(values), dtype=torch.int64), torch.tensor([0, 1]), distance, before_all,
            "euclidean", "cpu",
        )  # fmt: skip
        assert int(counts) == int((values.double() < distance).sum())
    finite = values[values.isfinite()][:, None]
    items = torch.arange(len(finite))
    squares = torch.ops.sabmn_ext.pair_distances(
        torch.zeros(1, 1, dtype=dtype), finite, torch.zeros_like(items), items, "euclidean", "cpu"
    )
    assert torch.equal(squares, finite[:, 0].double().square())


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_ties_go_to_the_lower_gallery_index(backend: str) -> None:
    if backend == "cpu" and _native.module is None:
        pytest.skip("the native module is not built")
    query, gallery = torch.ones(1, 20), torch.zeros(6, 20)  # all at the same distance
    pids = torch.tensor([1, 2, 1, 2, -1, 1])  # matches 2 and 5; 0 has the query's pid but is dropped; 4 is junk
    ranks = rank_matches(
        query, gallery, torch.tensor([1]), pids, torch.tensor([0, 2]), torch.tensor([2, 5]), backend=backend
    )
    assert ranks.tolist() == [2, 4]


def op_arguments(features: bool) -> tuple[object, ...]:
    query, gallery = draw_features(5, 9, torch.float32, 0), draw_features(21, 9, torch.float32, 1)
    labels = draw_labels(5, 21, 2)
    query_of = torch.repeat_interleave(torch.arange(5), labels[2].diff())
    distances = reference.pair_distances(query, gallery, query_of, labels[3], "euclidean")
    order = torch.tensor(sorted(range(len(query_of)), key=lambda m: (query_of[m], distances[m], m)))
    sides = (query, gallery) if features else (None, torch.cdist(query, gallery))
    return *sides, *labels[:3], distances[order], labels[3][order], "euclidean", None


def test_opcheck() -> None:
    query, gallery = draw_features(5, 9, torch.float32, 0), draw_features(21, 9, torch.float32, 1)
    indices = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(0))
    for metric in retrieval.METRICS:
        torch.library.opcheck(torch.ops.sabmn_ext.pair_distances, (query, gallery, indices, indices, metric, None))
    for features in (True, False):
        torch.library.opcheck(torch.ops.sabmn_ext.count_nonmatches, op_arguments(features))


@native
def test_a_call_that_would_read_outside_is_refused() -> None:
    query, gallery = torch.zeros(2, 3), torch.zeros(4, 3)
    one = torch.tensor([4])
    with pytest.raises(ValueError, match=r"gallery_indices leaves the range 0 … 3"):
        torch.ops.sabmn_ext.pair_distances(query, gallery, torch.tensor([0]), one, "euclidean", "cpu")
    with pytest.raises(ValueError, match=r"one dtype"):
        torch.ops.sabmn_ext.pair_distances(query, gallery.double(), one, one, "euclidean", "cpu")
    with pytest.raises(TypeError, match="int64"):
        torch.ops.sabmn_ext.pair_distances(query, gallery, one.int(), one, "euclidean", "cpu")
    arguments = list(op_arguments(True))
    arguments[4] = arguments[4] + 1  # type: ignore[operator]
    with pytest.raises(ValueError, match="offsets must ascend"):
        torch.ops.sabmn_ext.count_nonmatches(*arguments)
    arguments = list(op_arguments(True))
    arguments[3] = arguments[3][:-1]  # type: ignore[index]
    with pytest.raises(ValueError, match="must have lengths"):
        torch.ops.sabmn_ext.count_nonmatches(*arguments)
