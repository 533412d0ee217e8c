"""The retrieval ops: the same bits from every backend, instruction set, tile and number of threads."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from retrieval_cases import (
    DRAWS,
    DTYPES,
    Case,
    assert_same,
    draw_case,
    draw_features,
    near_duplicates,
    next_to_ties,
    one_sided_rounding,
    rank,
    small_integers,
)
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference, retrieval

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
DIMS = (1, 15, 16, 17, 131)


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
@pytest.mark.parametrize("draw", DRAWS)
def test_backends_and_instruction_sets_agree_bit_for_bit(
    draw: Callable[..., Tensor], dim: int, dtype: torch.dtype, metric: str, isas: list[str], seed: int
) -> None:
    assert _native.module is not None
    query, gallery = draw(7, dim, dtype, 100 * seed + dim), draw(51, dim, dtype, 100 * seed + dim + 1)
    query[2] = gallery[5]
    if metric == "cosine":
        query[query == 0], gallery[gallery == 0] = 1, 1
    case = draw_case(7, 51, 100 * seed + dim, cameras=dim % 2 == 1)
    pairs = torch.cartesian_prod(torch.arange(7), torch.arange(51)).T
    distances = reference.pair_distances(query, gallery, *pairs, metric)
    norms, expected = reference.squared_norms(gallery), rank(query, gallery, case, metric, "torch")
    for isa in isas:
        _native.module.set_isa(isa)
        with dispatch.record() as calls:
            assert torch.equal(torch.ops.sabmn_ext.squared_norms(gallery, None), norms), isa
            ours = torch.ops.sabmn_ext.pair_distances(query, gallery, *pairs, metric, None)
            assert_same(rank(query, gallery, case, metric), expected, isa)
        assert {backend for _, backend in calls} == {"cpu"}
        assert torch.equal(ours, distances), isa


@native
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("draw", [draw_features, near_duplicates, small_integers, next_to_ties])
def test_larger_than_a_tile(draw: Callable[..., Tensor], metric: str, isas: list[str], seed: int) -> None:
    """Several query panels and gallery tiles; 70 and more matches for some queries, which are counted another way."""
    assert _native.module is not None
    query, gallery = draw(61, 150, torch.float32, seed), draw(1201, 150, torch.float32, seed + 1)
    case = draw_case(61, 1201, seed, pids=7)
    counts = case.offsets.diff()
    assert int(counts.max()) > 64
    few = draw_case(61, 1201, seed + 1, pids=25)
    assert 0 < int(few.offsets.diff().max()) <= 64
    for labels in (case, few):
        expected = rank(query, gallery, labels, metric, "torch")
        for isa in isas:
            _native.module.set_isa(isa)
            assert_same(rank(query, gallery, labels, metric), expected, isa)


@native
@pytest.mark.parametrize("metric", retrieval.METRICS)
def test_rounding_errors_that_do_not_cancel(metric: str, isas: list[str], seed: int) -> None:
    """Errors of the float32 product far above those of random features, and distances that differ by less."""
    assert _native.module is not None
    dim, generator = 1024, torch.Generator().manual_seed(seed)
    number = one_sided_rounding(dim, seed)

    def side(rows: int) -> Tensor:
        sign = (torch.arange(rows) % 2 * 2 - 1)[:, None]  # so that the centre is 0
        bits = torch.randint(-1, 2, (rows, dim), generator=generator) * (torch.rand(rows, 1, generator=generator) < 0.8)
        return (sign * number * (1 + bits * torch.finfo(torch.float32).eps)).float()

    query, gallery = (number * (torch.arange(10) % 2 * 2 - 1)[:, None]).float().repeat(1, dim), side(300)
    case = draw_case(10, 300, seed)
    expected = rank(query, gallery, case, metric, "torch")
    for isa in isas:
        _native.module.set_isa(isa)
        assert_same(rank(query, gallery, case, metric), expected, isa)


@native
def test_distances_next_to_the_edge_of_a_bin(isas: list[str]) -> None:
    """4 + 2⁻²⁶ is above the edge at 4, and 4 in float32."""
    assert _native.module is not None
    gallery = torch.tensor([[2.0, 0.0], [2.0, 2.0**-13], [-2.0, 2.0**-13], [1.0, 1.0], [0.0, 2.0], [2.0**-13, 2.0]])
    case = draw_case(1, 6, 0, cameras=False)
    case.query_pids[:], case.gallery_pids[:] = 1, 2
    case.offsets, case.matches = torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64)
    expected = rank(torch.zeros(1, 2), gallery, case, backend="torch")
    assert expected[1][expected[1] > 0].tolist() == [1, 2, 3]
    for isa in isas:
        _native.module.set_isa(isa)
        assert_same(rank(torch.zeros(1, 2), gallery, case), expected, isa)


@pytest.mark.parametrize("metric", retrieval.METRICS)
def test_histogram_against_plain_counting(metric: str, seed: int) -> None:
    query, gallery = draw_features(9, 20, torch.float32, seed), draw_features(80, 20, torch.float32, seed + 1)
    case = draw_case(9, 80, seed)
    pairs = torch.cartesian_prod(torch.arange(9), torch.arange(80)).T
    distances = reference.pair_distances(query, gallery, *pairs, metric)
    assert case.query_camids is not None
    assert case.gallery_camids is not None
    q, g = pairs
    negative = (case.query_pids[q] != case.gallery_pids[g]) & (case.query_pids[q] != -1) & (case.gallery_pids[g] != -1)
    negative &= case.query_camids[q] != case.gallery_camids[g]
    norm = max(float(reference.squared_norms(x).max()) for x in (query, gallery))
    limits = retrieval.bins(retrieval.distance_exponent(norm, metric), signed=False)
    edges = reference.bin_edges(*limits)
    assert bool((edges.diff() > 0).all())
    assert limits[2] >= 2**16
    histogram = rank(query, gallery, case, metric)[1]
    for k in histogram.nonzero()[:, 0].tolist():
        inside = negative & (distances > edges[k]) & (distances <= edges[k + 1])
        assert int(histogram[k]) == int(inside.sum())
    assert int(histogram.sum()) == int(negative.sum())


def test_bins_are_ordered_and_an_upper_edge_belongs_to_its_bin() -> None:
    for limits in (retrieval.bins(4, signed=False), retrieval.bins(64, signed=True), retrieval.bins(-31, signed=False)):
        edges = reference.bin_edges(*limits)
        inner = edges[1:-1]
        assert torch.equal(reference.bin_of(inner, *limits), torch.arange(limits[2] - 1))
        above = torch.nextafter(inner, torch.full_like(inner, torch.inf))
        assert torch.equal(reference.bin_of(above, *limits), torch.arange(1, limits[2]))
        assert reference.bin_of(edges[[0, -1]], *limits).tolist() == [0, limits[2] - 1]


@native
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("draw", [draw_features, near_duplicates])
def test_tiles_blocks_and_threads_change_nothing(
    draw: Callable[..., Tensor], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, gallery = draw(37, 33, torch.float32, 0), draw(301, 33, torch.float32, 1)
    case = draw_case(37, 301, 2)
    expected = rank(query, gallery, case, metric, "torch")
    threads = torch.get_num_threads()
    try:
        for block_bytes, tile_bytes in ((1, 1), (3000, 9000), (1 << 20, 1 << 20)):
            monkeypatch.setattr(retrieval, "_BLOCK_BYTES", block_bytes)
            monkeypatch.setattr(retrieval, "_TILE_BYTES", tile_bytes)
            for count in (1, 3):
                torch.set_num_threads(count)
                assert_same(rank(query, gallery, case, metric), expected, (block_bytes, tile_bytes, count))
    finally:
        torch.set_num_threads(threads)
    one_by_one = [rank(query[q : q + 1], gallery, case.part(q, q + 1), metric) for q in range(37)]
    assert torch.equal(torch.cat([ranks for ranks, _ in one_by_one]), expected[0])
    if metric == "cosine":  # whose bins are the same for all features
        assert torch.equal(sum(histogram for _, histogram in one_by_one), expected[1])


@native
def test_rows_beyond_the_scale_are_refined() -> None:
    """The filter must not be sure of anything where the exponent that it was given is too small."""
    query, gallery = draw_features(8, 20, torch.float32, 0), draw_features(64, 20, torch.float32, 1)
    case = draw_case(8, 64, 2)
    query_of = torch.repeat_interleave(torch.arange(8), case.offsets.diff())
    distances = reference.pair_distances(query, gallery, query_of, case.matches, "euclidean")
    order = np.lexsort((case.matches, distances, query_of))
    labels = case.query_pids, case.gallery_pids, case.query_camids, case.gallery_camids, case.offsets
    for exponent in (-41, 1, 5, 201):
        arguments = query, gallery, *labels, distances[order], case.matches[order], 0, "euclidean", exponent
        assert_same(
            torch.ops.sabmn_ext.count_nonmatches(*arguments, "cpu"),
            torch.ops.sabmn_ext.count_nonmatches(*arguments, "torch"),
            exponent,
        )


@native
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_any_strides(backend: str) -> None:
    wide = torch.randn(60, 40, generator=torch.Generator().manual_seed(3))
    query, gallery = wide.T[3:29:3, :31], wide[::2, 5:36]
    case = draw_case(len(query), len(gallery), 4)
    expected = rank(query.contiguous(), gallery.contiguous(), case, backend=backend)
    assert_same(rank(query, gallery, case, backend=backend), expected)
    rows = torch.cdist(query, gallery).T.contiguous().T
    expected = rank(None, rows.contiguous(), case, backend=backend)
    assert_same(rank(None, rows, case, backend=backend), expected)


@native
@pytest.mark.parametrize("cameras", [True, False])
def test_given_distances_of_any_sign(cameras: bool) -> None:
    rows = torch.randn(9, 71, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows[0, :9] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e300, 1e-300, -1e-300, 1.0])
    case = draw_case(9, 71, 1, cameras=cameras)
    for values in (rows, rows.float(), rows.round()):
        assert_same(rank(None, values, case, backend="cpu"), rank(None, values, case, backend="torch"))


@native
def test_parts_of_a_gallery_add_up() -> None:
    query, gallery = small_integers(12, 9, torch.float32, 0), small_integers(90, 9, torch.float32, 1)
    case = draw_case(12, 90, 2)
    query_of = torch.repeat_interleave(torch.arange(12), case.offsets.diff())
    distances = reference.pair_distances(query, gallery, query_of, case.matches, "euclidean")
    order = np.lexsort((case.matches, distances, query_of))
    matches = case.offsets, distances[order], case.matches[order]

    def count(first: int, last: int) -> tuple[Tensor, Tensor]:
        assert case.gallery_camids is not None
        pids, camids = case.gallery_pids[first:last], case.gallery_camids[first:last]
        labels = case.query_pids, pids, case.query_camids, camids
        return torch.ops.sabmn_ext.count_nonmatches(
            query, gallery[first:last], *labels, *matches, first, "euclidean", 9, None
        )

    parts = [count(*limits) for limits in ((0, 31), (31, 31), (31, 80), (80, 90))]
    assert_same((sum(part[0] for part in parts), sum(part[1] for part in parts)), count(0, 90))


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_value_is_read_exactly(dtype: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = values[~values.isnan()]  # subnormals and infinities included
    rows = values[None]
    pid, before_all = torch.tensor([0], dtype=torch.int32), torch.tensor([-1])
    for threshold in (0, 1, 777, len(values) // 2, len(values) - 1):
        distance = values[threshold : threshold + 1].double()
        counts, _ = torch.ops.sabmn_ext.count_nonmatches(
            None, rows, pid, torch.ones(len(values), dtype=torch.int32), None, None, torch.tensor([0, 1]), distance,
            before_all, 0, "euclidean", 64, "cpu",
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
    pids = torch.tensor([1, 2, 1, 2, -1, 1], dtype=torch.int32)  # matches 2 and 5; 0 is dropped; 4 is junk
    offsets, matches = torch.tensor([0, 2]), torch.tensor([2, 5])
    case = Case(torch.tensor([1], dtype=torch.int32), pids, None, None, offsets, matches)
    assert rank(query, gallery, case, backend=backend)[0].tolist() == [2, 4]


def op_arguments(features: bool) -> tuple[Any, ...]:
    query, gallery = draw_features(5, 9, torch.float32, 0), draw_features(21, 9, torch.float32, 1)
    case = draw_case(5, 21, 2)
    query_of = torch.repeat_interleave(torch.arange(5), case.offsets.diff())
    distances = reference.pair_distances(query, gallery, query_of, case.matches, "euclidean")
    order = np.lexsort((case.matches, distances, query_of))
    sides = (query, gallery) if features else (None, torch.cdist(query, gallery))
    labels = case.query_pids, case.gallery_pids, case.query_camids, case.gallery_camids, case.offsets
    return *sides, *labels, distances[order], case.matches[order], 0, "euclidean", 9, None


def test_opcheck() -> None:
    query, gallery = draw_features(5, 9, torch.float32, 0), draw_features(21, 9, torch.float32, 1)
    indices = torch.randint(0, 5, (30,), generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(torch.ops.sabmn_ext.squared_norms, (query, None))
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

    def refuse(index: int, change: Callable[[Any], Any], message: str) -> None:
        arguments = list(op_arguments(True))
        arguments[index] = change(arguments[index])
        with pytest.raises(ValueError, match=message):
            torch.ops.sabmn_ext.count_nonmatches(*arguments)

    refuse(6, lambda offsets: offsets + 1, "offsets must ascend")
    refuse(6, lambda offsets: offsets[:-1], "offsets must have length 6")
    refuse(7, lambda distances: distances[:-1], "the same length")
    refuse(3, lambda pids: pids[:-1], r"int32 \[5\] and \[21\]")
    refuse(2, lambda pids: pids.long(), "must be int32")
    refuse(4, lambda camids: None, "one of query_camids and gallery_camids is missing")
