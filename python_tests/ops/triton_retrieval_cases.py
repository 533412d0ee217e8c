"""Ranking by the Triton kernels against float64 and against C++: on a GPU, or with TRITON_INTERPRET=1 on the CPU.

Triton reads the variable when it is imported: ``test_triton_retrieval.py`` runs this file in a process of its own.
"""

import math
import os
from collections.abc import Callable
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

from sabmn_ext import _native, evaluate_retrieval
from sabmn_ext.ops import dispatch, gpu_ranking, reference, retrieval
from sabmn_ext.ops.triton import retrieval as launches
from sabmn_ext.ops.triton import retrieval_kernels as kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EXPECTED = ["torch"] if _native.module is None else ["torch", "cpu"]


def check(query: Tensor | None, gallery: Tensor, case: Case, metric: str = "euclidean", first: int = 0) -> None:
    """The same ranks and histogram as from the other backends, computed on the CPU."""
    with dispatch.record() as calls:
        ours = rank(query, gallery, case, metric, "triton", first, device=DEVICE)
    assert {backend for _, backend in calls} == {"triton"}
    for backend in EXPECTED:
        assert_same(ours, rank(query, gallery, case, metric, backend, first), (metric, gallery.dtype, backend))


@pytest.fixture
def refined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs were computed in float64, call by call."""
    counts: list[int] = []
    add = launches._Counters.add

    def counted(self: launches._Counters, flags: Tensor, *rest: Tensor) -> None:
        counts.append(len(flags))
        add(self, flags, *rest)

    monkeypatch.setattr(launches._Counters, "add", counted)
    return counts


# Blocks have 64 × 64 pairs, and 64 features are summed at a time.
@pytest.mark.parametrize("metric", retrieval.METRICS)
@pytest.mark.parametrize("draw", DRAWS)
def test_same_bits_as_the_other_backends(draw: Callable[..., Tensor], metric: str, seed: int) -> None:
    which = (DRAWS.index(draw) + 2 * retrieval.METRICS.index(metric)) % 4
    dim, dtype = (131, 17, 64, 1)[which], DTYPES[which]
    query, gallery = draw(5, dim, dtype, 100 * seed + dim), draw(67, dim, dtype, 100 * seed + dim + 1)
    query[2] = gallery[5]
    if metric == "cosine":
        query[query == 0], gallery[gallery == 0] = 1, 1
    pairs = torch.tensor([[2, 2, 0, 4, 1], [5, 66, 0, 65, 7]])
    operands = (x.to(DEVICE) for x in (query, gallery, *pairs))
    distances = torch.ops.sabmn_ext.pair_distances(*operands, metric, "triton").cpu()
    assert torch.equal(distances, reference.pair_distances(query, gallery, *pairs, metric))
    norms = torch.ops.sabmn_ext.squared_norms(gallery.to(DEVICE), "triton").cpu()
    assert torch.equal(norms, reference.squared_norms(gallery))
    check(query, gallery, draw_case(5, 67, 100 * seed + dim, cameras=dim % 2 == 1), metric)


@pytest.mark.parametrize("draw", [draw_features, near_duplicates])
def test_many_blocks_tiles_and_matches(draw: Callable[..., Tensor], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ranking, "_TILE_ROWS", 67)
    monkeypatch.setattr(launches, "_REFINED_PAIRS", 700)
    query, gallery = draw(66, 70, torch.float32, seed), draw(141, 70, torch.float32, seed + 1)
    case = draw_case(66, 141, seed, pids=2)
    assert int(case.offsets.diff().max()) > 16
    check(query, gallery, case)


def test_the_filter_settles_most_pairs_and_refines_the_others(refined: list[int], seed: int) -> None:
    query, gallery = torch.randn(40, 256), torch.randn(200, 256)
    check(query, gallery, draw_case(40, 200, seed, pids=40))
    assert 0 < sum(refined) < 40 * 200 / 5
    refined.clear()
    query, gallery = (next_to_ties(rows, 256, torch.float32, seed) for rows in (9, 100))
    query[:] = 0
    check(query, gallery, draw_case(9, 100, seed))
    assert sum(refined) > 9 * 100 / 4


@pytest.mark.parametrize("metric", retrieval.METRICS)
def test_rounding_errors_that_do_not_cancel(metric: str, seed: int) -> None:
    dim, generator = 1024, torch.Generator().manual_seed(seed)
    number = one_sided_rounding(dim, seed)
    bits = torch.randint(-1, 2, (40, dim), generator=generator) * (torch.rand(40, 1, generator=generator) < 0.8)
    gallery = (torch.arange(40) % 2 * 2 - 1)[:, None] * number * (1 + bits * torch.finfo(torch.float32).eps)
    query = (number * (torch.arange(4) % 2 * 2 - 1)[:, None]).float().repeat(1, dim)
    check(query, gallery.float(), draw_case(4, 40, seed), metric)


if DEVICE == "cpu":  # on a GPU the product cannot be exchanged

    @pytest.mark.parametrize("metric", retrieval.METRICS)
    def test_any_product_within_the_bound(metric: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rows of ±1 but for the last bit, so that |a·b| is ‖a‖‖b‖, and products that are off by 0.9 γ ‖a‖‖b‖."""
        product, random = kernels._product, np.random.default_rng(seed)

        def inexact(*operands: Any) -> Any:
            result = product(*operands)
            off = 0.9 * (64 + 1 + 1) * 2.0**-24  # count_cpu.cpp, 2., for 64 features
            result.handle.data *= random.choice(np.float32([1 - off, 1, 1 + off]), result.handle.data.shape)
            return result

        monkeypatch.setattr(kernels, "_product", inexact)
        query, gallery = (
            (torch.arange(rows) % 2 * 2 - 1)[:, None] * next_to_ties(rows, 64, torch.float32, seed).abs()
            for rows in (4, 60)
        )
        check(query, gallery, draw_case(4, 60, seed), metric)


def test_distances_next_to_the_edge_of_a_bin() -> None:
    gallery = torch.tensor([[2.0, 0.0], [2.0, 2.0**-13], [-2.0, 2.0**-13], [1.0, 1.0], [0.0, 2.0], [2.0**-13, 2.0]])
    case = draw_case(1, 6, 0, cameras=False)
    case.query_pids[:], case.gallery_pids[:] = 1, 2
    case.offsets, case.matches = torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64)
    check(torch.zeros(1, 2), gallery, case)


def test_rows_beyond_the_scale_are_refined(refined: list[int]) -> None:
    query, gallery = draw_features(8, 20, torch.float32, 0), draw_features(64, 20, torch.float32, 1)
    case = draw_case(8, 64, 2)
    query_of = torch.repeat_interleave(torch.arange(8), case.offsets.diff())
    distances = reference.pair_distances(query, gallery, query_of, case.matches, "euclidean")
    order = np.lexsort((case.matches, distances, query_of))
    labels = case.query_pids, case.gallery_pids, case.query_camids, case.gallery_camids, case.offsets
    tensors = query, gallery, *labels, distances[order], case.matches[order]
    for exponent in (-41, 1, 5, 201):
        options = 0, "euclidean", exponent
        on_device = [None if x is None else x.to(DEVICE) for x in tensors]
        ours = torch.ops.sabmn_ext.count_nonmatches(*on_device, *options, "triton")
        expected = torch.ops.sabmn_ext.count_nonmatches(*tensors, *options, "torch")
        assert_same((ours[0].cpu(), ours[1].cpu()), expected, exponent)
    assert sum(refined) > 0


def test_any_strides() -> None:
    wide = torch.randn(60, 40)
    query, gallery = wide.T[3:29:3, :31], wide[::2, 5:36]
    case = draw_case(len(query), len(gallery), 4)
    check(query, gallery, case)
    check(None, torch.cdist(query, gallery).T.contiguous().T, case)


@pytest.mark.parametrize("cameras", [True, False])
def test_given_distances_of_any_sign(cameras: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_REFINED_PAIRS", 150)  # two rows at a time
    rows = torch.randn(9, 71, dtype=torch.float64)
    rows[0, :9] = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1e300, -1e300, 1e-300, -1e-300, 1.0])
    for values in (rows, rows.float().round()):
        check(None, values, draw_case(9, 71, 1, cameras=cameras))


def test_a_part_of_a_gallery_whose_items_tie_with_matches_elsewhere() -> None:
    query, gallery = small_integers(12, 9, torch.float32, 0), small_integers(90, 9, torch.float32, 1)
    check(query, gallery, draw_case(12, 90, 2), first=1000)


@pytest.mark.parametrize("pids", ["no matches", "junk only", "no valid query", "no items"])
def test_nothing_to_count(pids: str) -> None:
    rows = 0 if pids == "no items" else 7
    case = draw_case(5, rows, 0)
    case.offsets, case.matches = torch.zeros(6, dtype=torch.int64), torch.tensor([], dtype=torch.int64)
    if pids == "no valid query":
        case.query_pids[:] = -1
    elif pids == "junk only":
        case.gallery_pids[:] = -1
    query, gallery = torch.randn(5, 3), torch.randn(rows, 3)
    labels = case.query_pids, case.gallery_pids, case.query_camids, case.gallery_camids, case.offsets
    tensors = *labels, torch.empty(0, dtype=torch.float64), case.matches
    for first in ((query, gallery), (None, torch.randn(5, rows))):
        on_device = [None if x is None else x.to(DEVICE) for x in (*first, *tensors)]
        ours = torch.ops.sabmn_ext.count_nonmatches(*on_device, 0, "euclidean", 7, "triton")
        expected = torch.ops.sabmn_ext.count_nonmatches(*first, *tensors, 0, "euclidean", 7, "torch")
        assert_same((ours[0].cpu(), ours[1].cpu()), expected)


def test_an_evaluation() -> None:
    generator = np.random.default_rng(0)
    labels = [generator.integers(-1, 9, size) for size in (20, 150)] + [generator.integers(0, 3, n) for n in (20, 150)]
    query, gallery = torch.randn(20, 30), torch.randn(150, 30)
    for metric in retrieval.METRICS:
        ours = evaluate_retrieval(query.to(DEVICE), gallery.to(DEVICE), *labels, metric=metric, backend="triton")
        expected = evaluate_retrieval(query, gallery, *labels, metric=metric, backend="torch")
        assert np.array_equal(ours.ranks, expected.ranks)
        assert np.array_equal(ours.pairs.counts, expected.pairs.counts)
        assert ours.map == expected.map


def test_an_index_outside_is_refused() -> None:
    query, gallery, zero = torch.zeros(2, 3).to(DEVICE), torch.zeros(4, 3).to(DEVICE), torch.tensor([0]).to(DEVICE)
    with pytest.raises(ValueError, match=r"gallery_indices leaves the range 0 … 3"):
        torch.ops.sabmn_ext.pair_distances(query, gallery, zero, zero + 4, "euclidean", "triton")
