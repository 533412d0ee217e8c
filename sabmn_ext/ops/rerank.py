"""k-reciprocal re-ranking on sparse rows: three private steps, in C++ or in plain torch (``reference``), on the CPU.

A sparse matrix is (offsets [rows + 1], columns [entries], values [entries]): row i holds the entries offsets[i] …
offsets[i + 1] − 1, its columns ascending. The definition is in sabmn_ext/retrieval/reranking.py.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.retrieval import METRICS, _fields

SparseRows = tuple[Tensor, Tensor, Tensor]

dispatch.register("rerank", cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES))


def _taken(dtype: torch.dtype = torch.float64) -> str:
    return dispatch.choose("rerank", None, torch.device("cpu"), dtype)


def _two_passes(rows: int, fill: Callable[..., int], *, values: bool) -> SparseRows:
    """A sparse matrix from a function that is called for the rows' lengths, and then for their entries."""
    lengths, offsets = torch.empty(rows, dtype=torch.int64), torch.zeros(rows + 1, dtype=torch.int64)
    fill((lengths.data_ptr(), 0, 0, 0))
    torch.cumsum(lengths, 0, out=offsets[1:])
    columns = torch.empty(int(offsets[-1]), dtype=torch.int64)
    entries = torch.empty(len(columns) if values else 0, dtype=torch.float64)
    fill(tuple(tensor.data_ptr() for tensor in (lengths, offsets, columns, entries)))
    return offsets, columns, entries


def reciprocal_neighbors(neighbors: Tensor, k_width: int, half_width: int) -> tuple[Tensor, Tensor]:
    """Every item's expanded k-reciprocal neighbours, as (offsets, items ascending).

    Args:
        neighbors: [N, width] int64, every item's nearest items, itself among them, nearest first.
        k_width, half_width: how many of them are the k1 and the k1/2 neighbours.
    """
    if _taken() == "torch":
        return reference.reciprocal_neighbors(neighbors, k_width, half_width)
    module = _native.module
    assert module is not None
    neighbors, threads = neighbors.contiguous(), torch.get_num_threads()
    workspace = torch.empty(threads * (k_width + half_width + k_width * (half_width + 1)), dtype=torch.int64)
    lists = (neighbors.data_ptr(), *neighbors.shape)

    def fill(output: tuple[int, ...]) -> int:
        return module.reciprocal_neighbors(lists, k_width, half_width, output, workspace.data_ptr(), threads)

    return _two_passes(len(neighbors), fill, values=False)[:2]


def mean_of_rows(rows: SparseRows, neighbors: Tensor, k: int) -> SparseRows:
    """Row i of the result: the mean of ``rows`` (values > 0) over the first ``k`` of item i's ``neighbors``."""
    if _taken() == "torch":
        return reference.mean_of_rows(rows, neighbors, k)
    module = _native.module
    assert module is not None
    neighbors, threads = neighbors.contiguous(), torch.get_num_threads()
    workspace = torch.empty(threads * 2 * len(neighbors), dtype=torch.float64)
    lists, given = (neighbors.data_ptr(), *neighbors.shape), tuple(tensor.data_ptr() for tensor in rows)

    def fill(output: tuple[int, ...]) -> int:
        return module.mean_of_rows(given, lists, k, output, workspace.data_ptr(), threads)

    return _two_passes(len(neighbors), fill, values=True)


def exact_center(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """[D] float64: what can be subtracted from both sides without any rounding, where that helps; else 0.

    Feature by feature: with values of one sign, the largest at most twice the smallest, subtracting the smallest (in
    magnitude) is exact (Sterbenz) and leaves no more significant bits than there were. All other features range over at
    least half of the largest magnitude, and a quarter of that is at most the root of each item's largest distance. So,
    this subtracted, no ‖a‖² is above 16 D times that distance, and ‖a‖² + ‖b‖² − 2 a·b in float64 has lost little.
    """
    low = torch.minimum(query.amin(dim=0), gallery.amin(dim=0)).double()
    high = torch.maximum(query.amax(dim=0), gallery.amax(dim=0)).double()
    zero = torch.zeros_like(low)
    if metric == "cosine":
        return zero
    return torch.where((low > 0) & (high <= 2 * low), low, torch.where((high < 0) & (low >= 2 * high), high, zero))


def reranked_distances(
    query: Tensor,
    gallery: Tensor,
    metric: str,
    center: Tensor,
    largest: Tensor,
    query_rows: SparseRows,
    columns: SparseRows,
    lam: float,
) -> Tensor:
    """(1 − λ) · Jaccard distance + λ · d / largest, [Q, G] float64.

    Args:
        query, gallery: [Q, D], [G, D] features in one dtype on the CPU.
        center: ``exact_center`` of all queries and the gallery.
        largest: [Q] float64, what each query's distances are divided by; 0: the distances count as 0.
        query_rows: [Q, N] sparse.
        columns: the gallery's rows [G, N] by columns: [N, G] sparse.
        lam: λ.
    """
    if _taken(query.dtype) == "torch":
        return reference.reranked_distances(query, gallery, metric, largest, query_rows, columns, lam)
    module = _native.module
    assert module is not None
    threads = torch.get_num_threads()
    distances = torch.empty(len(query), len(gallery), dtype=torch.float64)
    size = module.reranked_workspace(query.shape[1], len(query), threads)
    workspace = torch.empty(size, dtype=torch.float64)
    center, largest = center.contiguous(), largest.contiguous()
    status = module.reranked_distances(
        _fields(query),
        _fields(gallery),
        METRICS.index(metric),
        center.data_ptr(),
        largest.data_ptr(),
        tuple(tensor.data_ptr() for tensor in query_rows),
        tuple(tensor.data_ptr() for tensor in columns),
        lam,
        distances.data_ptr(),
        workspace.data_ptr(),
        dispatch.DTYPE_CODES[query.dtype],
        threads,
    )
    dispatch.check_status(status, "rerank", query, gallery)
    return distances
