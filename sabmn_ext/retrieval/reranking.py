"""k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017) without any matrix of all pairs.

Queries and gallery together are N items; d is their squared Euclidean distance, or 2 − 2 cos. Each item's distances to
all items are divided by their maximum, once: d̃ of item i is d(i, ·) / max d(i, ·). N(i, k) are its k + 1 nearest items,
itself among them, ties to the lower index (queries first).

    R(i, k)   those j in N(i, k) with i in N(j, k)
    R*(i)     R(i, k1), and each R(j, k1/2) with j in R(i, k1) that shares more than 2/3 of its items with R(i, k1);
              k1/2 is rounded half to even
    V_i(j)    exp(−d̃(i, j)) for j in R*(i), divided by their sum; 0 elsewhere
    V'_i      the mean of V_j over the k2 nearest items j of i; V_i itself for k2 = 1
    J(q, g)   1 − m / (2 − m), m = Σ_j min(V'_q(j), V'_g(j))

The new distance is (1 − λ) J(q, g) + λ d̃(q, g). The lists come from exact neighbours (``search.neighbors``); d̃ in the
last line is ‖a‖² + ‖b‖² − 2 a·b, or 1 − cos, up to a factor (csrc/retrieval/rerank_cpu.cpp). All sums are in float64 in
one order: nothing depends on tiles, threads or the processor.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.ops.rerank import SparseRows, exact_center, mean_of_rows, reciprocal_neighbors, reranked_distances
from sabmn_ext.retrieval.evaluation import evaluate_distances
from sabmn_ext.retrieval.inputs import Array, as_labels, as_matrix, check_features
from sabmn_ext.retrieval.result import RetrievalResult
from sabmn_ext.retrieval.search import check_sides, neighbors

K1, K2, LAMBDA = 20, 6, 0.3  # the paper's for Market-1501, and everybody's since

_BLOCK_ELEMENTS = 1 << 23  # of a block of rows: 64 MB


class Reranked:
    """Re-ranked distances of queries to gallery items, computed in blocks of rows whenever they are asked for.

    ``evaluate_distances`` takes it as it is; ``dense()`` is the whole matrix.
    """

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        metric: str,
        largest: Tensor,
        query_rows: SparseRows,
        columns: SparseRows,
        lambda_value: float,
    ) -> None:
        self.shape = (len(query), len(gallery))
        self._features, self._metric, self._lambda = (query, gallery), metric, lambda_value
        self._center = exact_center(query, gallery, metric)
        self._largest, self._query_rows, self._columns = largest, query_rows, columns

    def rows(self, first: int, last: int) -> Tensor:
        """[last − first, G] float64: the distances of the queries ``first`` … ``last`` − 1."""
        query, gallery = self._features
        offsets, columns, values = self._query_rows
        begin, end = offsets[first], offsets[last]
        part = (offsets[first : last + 1] - begin).contiguous(), columns[begin:end], values[begin:end]
        some, largest = query[first:last], self._largest[first:last]
        return reranked_distances(some, gallery, self._metric, self._center, largest, part, self._columns, self._lambda)

    def __iter__(self) -> Iterator[Tensor]:
        """Consecutive blocks of rows."""
        rows = max(1, _BLOCK_ELEMENTS // self.shape[1])
        for first in range(0, self.shape[0], rows):
            yield self.rows(first, min(first + rows, self.shape[0]))

    def dense(self) -> Tensor:
        """[Q, G] float64."""
        return torch.cat(list(self))


def rerank(
    query: Array,
    gallery: Array,
    *,
    k1: int = K1,
    k2: int = K2,
    lambda_value: float = LAMBDA,
    metric: str = "euclidean",
) -> Reranked:
    """Distances re-ranked by k-reciprocal neighbours, among queries and gallery. Leave junk (pid −1) out beforehand.

    Args:
        query: [Q, D] torch (any device, any strides) or numpy, float16, bfloat16, float32 or float64.
        gallery: [G, D] in the same dtype on the same device.
        k1: neighbours that must be mutual.
        k2: nearest items whose vectors V are averaged; 1: no averaging.
        lambda_value: λ, the original distance's share, from 0 to 1.
        metric: ``"euclidean"`` or ``"cosine"``.

    Returns:
        an iterable of row blocks [rows, G] float64 on the CPU, smaller is nearer, for ``evaluate_distances``. The sets
        of neighbours are found here; the blocks are computed when they are taken.

    Raises:
        TypeError, ValueError: features that do not fit or are not finite; k1, k2 or lambda_value out of range.

    Memory: a copy of the features, about 2 kB for each item, and 64 MB.

    >>> distances = sabmn_ext.rerank(query, gallery)
    >>> sabmn_ext.evaluate_distances(distances, query_pids, gallery_pids, query_camids, gallery_camids).map
    """
    query, gallery = as_matrix("query", query), as_matrix("gallery", gallery)
    check_sides(query, gallery, metric)
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if not 0 <= lambda_value <= 1:
        raise ValueError(f"lambda_value is {lambda_value!r}; expected a number from 0 to 1")
    check_features("query", query, metric, None)  # before they are joined, so that the row that is named is its own
    check_features("gallery", gallery, metric, None)
    items = torch.cat((query, gallery))
    width = min(max(k1 + 1, k2), len(items))
    _, nearest, largest = neighbors(items, items, width, metric, farthest=True)
    assert largest is not None
    items, nearest, largest = items.cpu(), nearest.cpu(), largest.cpu()

    k_width, half_width = min(k1 + 1, len(items)), min(round(k1 / 2) + 1, len(items))
    vectors = _weights(items, metric, largest, *reciprocal_neighbors(nearest, k_width, half_width))
    if k2 > 1:
        vectors = mean_of_rows(vectors, nearest, min(k2, len(items)))
    offsets, columns, values = vectors
    of_queries = int(offsets[len(query)])
    query_rows = offsets[: len(query) + 1], columns[:of_queries], values[:of_queries]
    by_columns = _by_columns(offsets[len(query) :] - of_queries, columns[of_queries:], values[of_queries:], len(items))
    sides = items[: len(query)], items[len(query) :]
    return Reranked(*sides, metric, largest[: len(query)], query_rows, by_columns, float(lambda_value))


def evaluate_reranked(
    query_features: Array,
    gallery_features: Array,
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any = None,
    gallery_camids: Any = None,
    *,
    metric: str = "euclidean",
    max_rank: int = 50,
    query_names: Sequence[str] | None = None,
    gallery_names: Sequence[str] | None = None,
) -> RetrievalResult:
    """As ``evaluate_retrieval``, of distances re-ranked with ``K1``, ``K2``, ``LAMBDA``; junk is left out before."""
    query, gallery = as_matrix("query_features", query_features), as_matrix("gallery_features", gallery_features)
    check_sides(query, gallery, metric)
    check_features("query_features", query, metric, query_names)
    check_features("gallery_features", gallery, metric, gallery_names)
    pids = as_labels("gallery_pids", gallery_pids, len(gallery))
    kept = np.flatnonzero(pids != -1)
    if not len(kept):
        raise ValueError("no query has a valid match in the gallery: every gallery item has pid −1 (junk)")
    camids = None if gallery_camids is None else as_labels("gallery_camids", gallery_camids, len(gallery))[kept]
    distances = rerank(query, gallery[torch.from_numpy(kept).to(gallery.device)], metric=metric)
    result = evaluate_distances(distances, query_pids, pids[kept], query_camids, camids, max_rank=max_rank)
    num_junk = len(pids) - len(kept)
    return replace(result, metric=f"{metric}, re-ranked", num_gallery=len(pids), num_junk=num_junk)


def _weights(items: Tensor, metric: str, largest: Tensor, offsets: Tensor, columns: Tensor) -> SparseRows:
    """V: exp(−d̃) over each row's columns, divided by the row's sum."""
    of_row = torch.repeat_interleave(torch.arange(len(items)), offsets.diff())
    distances = torch.ops.sabmn_ext.pair_distances(items, items, of_row, columns, metric, None)
    scaled = torch.where(largest[of_row] > 0, distances / largest[of_row], 0.0)
    weights = np.exp(-scaled.numpy())
    sums = np.bincount(of_row.numpy(), weights=weights, minlength=len(items))
    return offsets, columns, torch.from_numpy(weights / sums[of_row.numpy()])


def _by_columns(offsets: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> SparseRows:
    """The transposed sparse matrix."""
    of_row = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    order = columns.argsort(stable=True)
    starts = torch.bincount(columns, minlength=num_columns).cumsum(0)
    return torch.cat((starts.new_zeros(1), starts)), of_row[order], values[order]
