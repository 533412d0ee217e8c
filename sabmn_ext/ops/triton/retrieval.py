"""Launches of the Triton kernels of the ranking: tiles of the gallery are filtered, and what is not certain refined."""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from sabmn_ext.ops import gpu_ranking, reference
from sabmn_ext.ops.gpu_ranking import Labels, Matches, Norms
from sabmn_ext.ops.triton import retrieval_kernels as kernels

_BLOCK_QUERIES, _BLOCK_ITEMS, _BLOCK_PAIRS, _CHUNK, _OPEN_RANK, _OPEN_BIN = (
    constant.value
    for constant in (
        kernels.BLOCK_QUERIES, kernels.BLOCK_ITEMS, kernels.BLOCK_PAIRS, kernels.CHUNK, kernels.OPEN_RANK,
        kernels.OPEN_BIN,
    )
)  # fmt: skip
_COUNT_BLOCK = 256
_REFINED_PAIRS = 1 << 20  # at a time
_PACKED_ROWS = 256  # in float64 at a time


def squared_norms(features: Tensor) -> Tensor:
    """As ``reference.squared_norms``, bit for bit."""
    rows = torch.arange(len(features), device=features.device)
    return _pair_sums(features, features, rows, rows, dot=True)


def pair_distances(
    query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, metric: str
) -> Tensor:
    """As ``reference.pair_distances``, bit for bit."""
    return _distances(query, gallery, query_indices, gallery_indices, _norms(query, gallery, metric))


def _pair_sums(query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, *, dot: bool) -> Tensor:
    count = len(query_indices)
    sums = torch.empty(count, dtype=torch.float64, device=query.device)
    if count:
        with torch.cuda.device_of(query):
            kernels.retrieval_pair_sums_kernel[(triton.cdiv(count, _BLOCK_PAIRS),)](
                query, gallery, query_indices.contiguous(), gallery_indices.contiguous(), sums, count, query.shape[1],
                *query.stride(), *gallery.stride(), DOT=dot, **kernels.EXACT_OPTIONS,
            )  # fmt: skip
    return sums


def _norms(query: Tensor, gallery: Tensor, metric: str) -> Norms:
    squares = gpu_ranking.norms_of(query, gallery, metric, squared_norms)
    return None if squares is None else (reference._sqrt(squares[0]), reference._sqrt(squares[1]))


def _distances(query: Tensor, gallery: Tensor, of_query: Tensor, of_item: Tensor, norms: Norms) -> Tensor:
    sums = _pair_sums(query, gallery, of_query, of_item, dot=norms is not None)
    return sums if norms is None else 1.0 - sums / (norms[0][of_query] * norms[1][of_item])


# ---- counting ----


@dataclass(frozen=True)
class _Counters(gpu_ranking.Counters):
    """retrieval_kernels.py says what the tensors are."""

    @cached_property
    def steps(self) -> int:
        """Of a search among the true matches of a query."""
        return int(self.offsets.diff().max()).bit_length() if len(self.offsets) > 1 else 0

    def add(self, flags: Tensor, of_query: Tensor, items: Tensor, distances: Tensor) -> None:
        """Count pairs by their float64 distances."""
        lowest, negative, count = self.bins
        with torch.cuda.device_of(flags):
            kernels.retrieval_count_kernel[(triton.cdiv(len(flags), _COUNT_BLOCK),)](
                flags, of_query, items, distances, self.offsets, self.distances, self.indices, self.between,
                self.histogram, len(flags), lowest, negative, count - 1, self.steps, BLOCK=_COUNT_BLOCK,
                **kernels.EXACT_OPTIONS,
            )  # fmt: skip


def count_nonmatches_in_rows(
    rows: Tensor, labels: Labels, matches: Matches, first: int, bins: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """``reference.count_nonmatches`` of given distances [Q, G]."""
    query_pids, gallery_pids, query_camids, gallery_camids = gpu_ranking.contiguous(labels)
    counters = _Counters.of(matches, bins)
    step = max(1, _REFINED_PAIRS // max(1, rows.shape[1]))
    for some in (slice(start, start + step) for start in range(0, len(rows), step)):
        pids = query_pids[some, None]
        valid = (pids != -1) & (gallery_pids != -1) & (gallery_pids != pids)
        flags = valid * _OPEN_RANK + (valid & (gallery_camids != query_camids[some, None])) * _OPEN_BIN
        of_query, items = valid.nonzero(as_tuple=True)
        if len(items):
            chosen = flags.to(torch.uint8)[of_query, items], rows[some][of_query, items].double()
            counters.add(chosen[0], of_query + some.start, items + first, chosen[1])
    return counters.result()


def count_nonmatches(
    query: Tensor,
    gallery: Tensor,
    labels: Labels,
    matches: Matches,
    first: int,
    metric: str,
    bins: tuple[int, int, int],
    center: Tensor,
    scale: int,
) -> tuple[Tensor, Tensor]:
    """``reference.count_nonmatches`` of features; 2^scale (x − center) should be at most 1 long."""
    query_pids, gallery_pids, query_camids, gallery_camids = gpu_ranking.contiguous(labels)
    counters = _Counters.of(matches, bins)
    norms = _norms(query, gallery, metric)
    exponent = gpu_ranking.scaled_exponent(metric, scale)
    bound = _Bound.of(query.shape[1], metric, scale)
    a, query_values = bound.pack(query, None if norms is None else norms[0], center)
    query_values[1] = _round_up(bound.dot * query_values[1].double())
    below, above = counters.enclosed(exponent)
    lowest = gpu_ranking.lowest_float_bin(bins, exponent)
    for items in gpu_ranking.tiles(gallery_pids, len(query), _BLOCK_ITEMS):
        b, gallery_values = bound.pack(gallery[items], None if norms is None else norms[1][items], center)
        flags = torch.empty(len(query), len(items), dtype=torch.uint8, device=query.device)
        grid = triton.cdiv(len(items), _BLOCK_ITEMS), triton.cdiv(len(query), _BLOCK_QUERIES)
        with torch.cuda.device_of(query):
            kernels.retrieval_filter_kernel[grid](
                a, b, query_values, gallery_values, query_pids, gallery_pids[items], query_camids,
                gallery_camids[items], counters.offsets, below, above, counters.between, counters.histogram, flags,
                len(query), len(items), a.shape[1], lowest, bins[2] - 1, counters.steps, **kernels.FILTER_OPTIONS,
            )  # fmt: skip
        flat = flags.flatten()
        for pairs in flat.nonzero()[:, 0].split(_REFINED_PAIRS):
            of_query, of_item = pairs // len(items), items[pairs % len(items)]
            if len(pairs):
                distances = _distances(query, gallery, of_query, of_item, norms)
                counters.add(flat[pairs], of_query, of_item + first, distances)
    return counters.result()


def _round_up(values: Tensor) -> Tensor:
    """float32, not below ``values`` up to the few ulp that the bound has to spare."""
    return (values * (1 + 2.0**-20)).float()


@dataclass(frozen=True)
class _Bound:
    """e = dot ‖a‖‖b‖ + sum (A + B) + absolute; derived at the top of csrc/retrieval/count_cpu.cpp."""

    scale: int
    dot: float
    sum: float
    absolute: float

    @staticmethod
    def of(dim: int, metric: str, scale: int) -> "_Bound":
        u, spare, roundings = 2.0**-24, 1 + 2.0**-10, (dim + 64) * 2.0**-52
        depth = _CHUNK + -(-dim // _CHUNK) + 1  # roundings of a term of the product
        gamma = depth * u / (1 - depth * u)
        absolute = 64 * dim * 2.0**-126 + dim * 2.0**-1074 * 4.0**scale
        if metric == "cosine":
            absolute += 32 * roundings * 4.0**scale
        dot = 2 * (gamma * (1 + u) ** 2 + 2 * u + u * u)
        return _Bound(scale, spare * dot, spare * (8 * u + 4 * roundings), spare * absolute)

    def pack(self, features: Tensor, norms: Tensor | None, center: Tensor) -> tuple[Tensor, Tensor]:
        """2^scale (x − center) [rows, whole chunks]; and [3, rows]: its square, its length, its part of e. float32."""
        rows, dim = features.shape
        packed = torch.zeros(rows, triton.cdiv(dim, _CHUNK) * _CHUNK, device=features.device)
        values = torch.empty(3, rows, device=features.device)
        for some in (slice(start, start + _PACKED_ROWS) for start in range(0, rows, _PACKED_ROWS)):
            x = features[some].double()
            x = ((x if norms is None else x / norms[some, None]) - center) * 2.0**self.scale
            squares = x.square().sum(dim=1)
            usable = squares <= 2.0  # False for NaN: nothing is certain about such a row
            packed[some, :dim] = torch.where(usable[:, None], x, 0.0)
            values[0, some] = torch.where(usable, squares, 0.0)
            values[1, some] = torch.where(usable, _round_up(squares.sqrt()), 1.0)
            own = _round_up(self.sum * squares + self.absolute / 2)
            values[2, some] = torch.where(usable, own, torch.inf)
        return packed, values
