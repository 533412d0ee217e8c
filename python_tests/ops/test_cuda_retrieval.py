"""How ops/cuda calls the CUDA kernels of the ranking: on a GPU, and without one against a stand-in for them.

The kernels themselves are tested in the harness (python_tests/simt). The stand-in gets what they get, addresses, sizes
and strides, and computes by the reference what they would, so that a wrong address or stride is a wrong result.
"""

from typing import Any

import native_stand_in
import pytest
import torch
from native_stand_in import at
from retrieval_cases import DRAWS, DTYPES, Case, assert_same, draw_case, draw_features, rank, small_integers
from torch import Tensor

from sabmn_ext.ops import dispatch, gpu_ranking, reference, retrieval

OPERATIONS = ("squared_norms", "pair_distances", "count_nonmatches")


def matrix(fields: tuple[int, ...], dtype: int) -> Tensor:
    return at(fields[0], fields[1:3], native_stand_in.DTYPES[dtype], fields[3:])


class StandIn:
    """The functions of the native module that csrc/bindings.cpp defines for retrieval_cuda.h."""

    PACKED_ROWS, PACKED_DEPTH = 8, 4

    def __init__(self) -> None:
        self.packed: dict[tuple[int, ...], tuple[Any, ...]] = {}
        self.tiles = 0

    def squared_norms_cuda(self, features: Any, norms: int, dtype: int, stream: int) -> int:
        values = matrix(features, dtype)
        at(norms, values.shape[:1], torch.float64).copy_(reference.squared_norms(values))
        return 0

    def pair_distances_cuda(
        self, query: Any, gallery: Any, norms: Any, query_indices: int, gallery_indices: int, num_pairs: int,
        distances: int, dtype: int, stream: int,
    ) -> int:  # fmt: skip
        sides = matrix(query, dtype), matrix(gallery, dtype)
        indices = (at(address, (num_pairs,), torch.int64) for address in (query_indices, gallery_indices))
        found = reference.pair_distances(*sides, *indices, self.metric(sides, norms))
        at(distances, (num_pairs,), torch.float64).copy_(found)
        return 0

    @staticmethod
    def metric(sides: tuple[Tensor, Tensor], norms: tuple[int, int]) -> str:
        if norms == (0, 0):
            return "euclidean"
        for side, address in zip(sides, norms, strict=True):
            assert torch.equal(at(address, (len(side),), torch.float64), reference.squared_norms(side))
        return "cosine"

    def count(
        self, query: Tensor | None, gallery: Tensor, items: Tensor, sizes: tuple[int, int], labels: Any, matches: Any,
        bins: Any, metric: str,
    ) -> Tensor:  # fmt: skip
        """Adds what the reference finds in these items; returns the matches' distances."""
        codes = [at(a, (size,), torch.int32) for a, size in zip(labels[:4], sizes * 2, strict=True)]
        pids = torch.full_like(codes[1], -1)  # all else is as junk
        pids[items] = codes[1][items]
        offsets = at(matches[0], (sizes[0] + 1,), torch.int64)
        (count,) = offsets[-1:].tolist()
        distances, indices, between = (
            at(address, (count,), dtype)
            for address, dtype in zip(matches[1:], (torch.float64, torch.int64, torch.int64), strict=True)
        )
        histogram = at(bins[3], (bins[2],), torch.int64)
        found = reference.count_nonmatches(
            query, gallery, codes[0], pids, *codes[2:], offsets, distances, indices, labels[4], metric, tuple(bins[:3])
        )
        before = found[0].clone()
        starts = offsets[:-1][offsets.diff() > 0]
        before[1:] -= found[0][:-1]
        before[starts] = found[0][starts]
        between += before
        histogram += found[1]
        return distances

    def count_nonmatches_in_rows_cuda(
        self, rows: Any, labels: Any, matches: Any, bins: Any, dtype: int, stream: int
    ) -> int:
        values = matrix(rows, dtype)
        items = torch.arange(values.shape[1])
        self.count(None, values, items, tuple(values.shape), labels, matches, bins, "euclidean")  # type: ignore[arg-type]
        return 0

    def pack_features_cuda(
        self, features: Any, items: int, count: int, squares: int, center: int, scale: int, query: bool, packed: Any,
        dtype: int, stream: int,
    ) -> int:  # fmt: skip
        rows, dim = -(-count // 8) * 8, -(-features[2] // 4) * 4
        assert packed[2] == rows
        at(packed[0], (rows, dim), torch.float32).fill_(0)  # as much room as there must be
        at(packed[1], (3, rows), torch.float32).fill_(0)
        at(center, (features[2],), torch.float64)
        self.packed[packed] = (features, items, count, squares, scale, query)
        return 0

    def count_nonmatches_cuda(
        self, query: Any, gallery: Any, norms: Any, labels: Any, matches: Any, bins: Any, scale: int, sides: Any,
        count: int, tile: Any, dtype: int, stream: int,
    ) -> int:  # fmt: skip
        both = matrix(query, dtype), matrix(gallery, dtype)
        metric = self.metric(both, norms)
        items, below, above, listed, num_listed = tile
        assert self.packed[sides[0]] == (query, 0, len(both[0]), norms[0], scale, True)
        assert self.packed[sides[1]] == (gallery, items, count, norms[1], scale, False)
        at(listed, (len(both[0]), count), torch.int32).fill_(0)
        assert at(num_listed, (1,), torch.int32).tolist() == [0]
        rows = at(items, (count,), torch.int64)
        distances = self.count(both[0], both[1], rows, (query[1], gallery[1]), labels, matches, bins, metric)
        x = distances * 2.0 ** (2 * scale + (metric == "cosine"))
        limits = [at(address, (len(x),), torch.float32).double() for address in (below, above)]
        assert bool((limits[0] < x).all())
        assert bool((limits[1] > x).all())
        assert bool((limits[1] - limits[0] <= 1e-6 * x.abs() + 1e-30).all())
        self.tiles += 1
        return 0


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    native = StandIn()
    native_stand_in.install(monkeypatch, native, OPERATIONS)
    return native


def check(query: Tensor | None, gallery: Tensor, case: Case, metric: str = "euclidean", first: int = 0) -> None:
    with dispatch.record() as calls:
        ours = rank(query, gallery, case, metric, "cuda", first)
    assert {backend for _, backend in calls} == {"cuda"}
    assert_same(ours, rank(query, gallery, case, metric, "torch", first))


@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_addresses_and_strides(
    stand_in: StandIn, dtype: torch.dtype, metric: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_ranking, "_TILE_ROWS", 13)
    wide = draw_features(40, 60, dtype, seed)
    query, gallery = wide.T[3:29:3, :31], wide[::2, 5:36]
    for cameras in (True, False):
        check(query, gallery, draw_case(len(query), len(gallery), seed, cameras=cameras), metric, first=7 * cameras)
    assert stand_in.tiles >= 2
    rows = torch.cdist(query.double(), gallery.double()).to(dtype)
    check(None, rows.T.contiguous().T, draw_case(len(query), len(gallery), seed))


def test_nothing_to_count(stand_in: StandIn) -> None:
    query, gallery = small_integers(3, 5, torch.float32, 0), small_integers(4, 5, torch.float32, 1)
    case = draw_case(3, 4, 0)
    case.gallery_pids[:] = -1
    case.offsets, case.matches = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    check(query, gallery, case, "cosine")
    assert stand_in.tiles == 0


def test_a_failed_launch_names_operation_and_shapes(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stand_in, "count_nonmatches_cuda", lambda *given: 2)
    query, gallery = small_integers(3, 5, torch.float32, 0), small_integers(9, 5, torch.float32, 1)
    with pytest.raises(RuntimeError, match=r"count_nonmatches failed for tensors \[3, 5\] torch.float32"):
        rank(query, gallery, draw_case(3, 9, 0), backend="cuda")


def test_cuda_serves_every_type_on_a_gpu_only() -> None:
    for operation in OPERATIONS:
        reason = dispatch.why_not(operation, "cuda", torch.device("cpu"), torch.float32)
        assert reason is not None
        assert "no cuda kernel" not in reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_the_gpu(draw: Any, dtype: torch.dtype, metric: str, seed: int) -> None:
    query, gallery = draw(130, 131, dtype, seed), draw(1001, 131, dtype, seed + 1)
    if metric == "cosine":
        query[query == 0], gallery[gallery == 0] = 1, 1
    case = draw_case(130, 1001, seed)
    ours = rank(query, gallery, case, metric, "cuda", device="cuda")
    assert_same(ours, rank(query, gallery, case, metric, "torch"))
