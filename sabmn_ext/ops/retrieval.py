"""Ranks of true matches by counting: rank(t_m) = m + #{valid non-matches before t_m}. No sort of the gallery.

Private ops, apart because a gallery in several parts needs them apart: squared lengths, the distances of the true
matches, and the counts with the histogram of the non-matches. Distances are float64 sums in a fixed order
(``reference.pair_distances``): the same bits from every backend, tile and number of threads. The C++, the CUDA and the
Triton kernels compute in float32 what is certain by a proven bound, and the rest exactly: csrc/retrieval/count_cpu.cpp,
csrc/retrieval/retrieval_cuda.cu and ops/triton/retrieval_kernels.py.
"""

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference

METRICS = ("euclidean", "cosine")
_GPU = ("cuda", "triton")
_BLOCK_BYTES = 1 << 24  # packed queries
_TILE_BYTES = 1 << 21  # packed gallery items: in the caches
_TILE_ROWS = 512
_NORM_ROWS = 1 << 16

_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_library.define("squared_norms(Tensor features, str? backend) -> Tensor")
_library.define(
    "pair_distances(Tensor query, Tensor gallery, Tensor query_indices, Tensor gallery_indices, str metric, "
    "str? backend) -> Tensor"
)
_library.define(
    "count_nonmatches(Tensor? query, Tensor gallery, Tensor query_pids, Tensor gallery_pids, Tensor? query_camids, "
    "Tensor? gallery_camids, Tensor offsets, Tensor distances, Tensor indices, int first, str metric, int exponent, "
    "str? backend) -> (Tensor, Tensor)"
)
for _operation in ("squared_norms", "pair_distances", "count_nonmatches"):
    dispatch.register(
        _operation,
        cuda=dispatch.native_cuda(*dispatch.DTYPE_CODES),
        triton=dispatch.triton(*dispatch.DTYPE_CODES),
        cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES),
    )


def bins(exponent: int, *, signed: bool) -> tuple[int, int, int]:
    """(lowest, negative, count) of ``reference.bin_of``: bins for distances up to 2^exponent.

    For features from 2^(exponent − 64) on, 2¹⁶ bins; for given distances, which may be negative (``signed``), from
    2^(exponent − 128) on and as many below 0.
    """
    binades = 128 if signed else 64
    per_sign = binades << reference.BIN_BITS
    lowest = (1023 + exponent - binades) << reference.BIN_BITS
    return (lowest, per_sign + 1, 2 * per_sign + 1) if signed else (lowest, 0, per_sign)


def distance_exponent(largest_squared_norm: float, metric: str) -> int:
    """An exponent for ``count_nonmatches``: no distance between such features is above 2^exponent."""
    if metric == "cosine":
        return 4
    # Features, and their centre, have a norm ≤ 2^half; less the centre ≤ 2^(half + 1), and two are 2^(half + 2) apart.
    half = -(-math.frexp(largest_squared_norm)[1] // 2)
    return 2 * max(half, -400) + 5


def _check(query: Tensor, gallery: Tensor, metric: str, int64s: tuple[Tensor, ...]) -> None:
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1] or query.dtype != gallery.dtype:
        raise ValueError(
            f"query and gallery must be [Q, D] and [G, D] in one dtype, but are {list(query.shape)} {query.dtype} and "
            f"{list(gallery.shape)} {gallery.dtype}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    if not all(tensor.dtype == torch.int64 for tensor in int64s):
        raise TypeError("offsets and indices must be int64")


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(f"{name} leaves the range 0 … {size - 1}")


def _launches(backend: str) -> Any:
    """The module of a GPU backend."""
    return importlib.import_module(f"sabmn_ext.ops.{backend}.retrieval")


def _fields(matrix: Tensor) -> tuple[int, ...]:
    """A matrix as csrc/bindings.cpp takes it."""
    return matrix.data_ptr(), *matrix.shape, *matrix.stride()


def _workspace(rows: int, dim: int) -> Tensor:
    """Room for some padded float64 rows for each thread."""
    padded = -(-dim // reference.NUM_LANES) * reference.NUM_LANES
    return torch.empty(torch.get_num_threads() * rows * padded, dtype=torch.float64)


@torch.library.impl(_library, "squared_norms", "CompositeExplicitAutograd")
def _squared_norms(features: Tensor, backend: str | None) -> Tensor:
    chosen = dispatch.choose("squared_norms", backend, features.device, features.dtype)
    if chosen == "torch":
        return reference.squared_norms(features)
    if chosen in _GPU:
        return _launches(chosen).squared_norms(features)  # type: ignore[no-any-return]
    assert _native.module is not None
    norms, workspace = torch.empty(len(features), dtype=torch.float64), _workspace(1, features.shape[1])
    code, threads = dispatch.DTYPE_CODES[features.dtype], torch.get_num_threads()
    status = _native.module.squared_norms(_fields(features), norms.data_ptr(), workspace.data_ptr(), code, threads)
    dispatch.check_status(status, "squared_norms", features)
    return norms


@torch.library.impl(_library, "pair_distances", "CompositeExplicitAutograd")
def _pair_distances(
    query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, metric: str, backend: str | None
) -> Tensor:
    _check(query, gallery, metric, (query_indices, gallery_indices))
    chosen = dispatch.choose("pair_distances", backend, query.device, query.dtype)
    if chosen == "torch":
        return reference.pair_distances(query, gallery, query_indices, gallery_indices, metric)
    _check_indices("query_indices", query_indices, len(query))
    _check_indices("gallery_indices", gallery_indices, len(gallery))
    if query_indices.shape != gallery_indices.shape:
        raise ValueError(f"{len(query_indices)} query_indices but {len(gallery_indices)} gallery_indices")
    if chosen in _GPU:
        found = _launches(chosen).pair_distances(query, gallery, query_indices, gallery_indices, metric)
        return found  # type: ignore[no-any-return]
    assert _native.module is not None
    query_indices, gallery_indices = query_indices.contiguous(), gallery_indices.contiguous()
    distances = torch.empty(len(query_indices), dtype=torch.float64)
    workspace = _workspace(2, query.shape[1])  # by name: it must live until the call returns
    status = _native.module.pair_distances(
        _fields(query),
        _fields(gallery),
        query_indices.data_ptr(),
        gallery_indices.data_ptr(),
        len(query_indices),
        METRICS.index(metric),
        distances.data_ptr(),
        workspace.data_ptr(),
        dispatch.DTYPE_CODES[query.dtype],
        torch.get_num_threads(),
    )
    dispatch.check_status(status, "pair_distances", query, gallery)
    return distances


def _center(query: Tensor, metric: str) -> Tensor:
    """[D] float64: the mean of the queries, or of their unit vectors for the cosine.

    Distances do not change when it is subtracted from both sides, and most cancellation is gone.
    """
    total = torch.zeros(query.shape[1], dtype=torch.float64, device=query.device)
    for rows in query.split(max(1, _TILE_BYTES // (8 * max(1, query.shape[1])))):
        block = rows.double()
        total += (torch.nn.functional.normalize(block) if metric == "cosine" else block).sum(dim=0)
    return total / max(1, len(query))


@torch.library.impl(_library, "count_nonmatches", "CompositeExplicitAutograd")
def _count_nonmatches(
    query: Tensor | None,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor | None,
    gallery_camids: Tensor | None,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    first: int,
    metric: str,
    exponent: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    _check(gallery if query is None else query, gallery, metric, (offsets, indices))
    rows, columns = gallery.shape if query is None else (len(query), len(gallery))
    matches = (offsets, distances, indices)
    if tuple(map(len, matches)) != (rows + 1, len(indices), len(indices)) or distances.dtype != torch.float64:
        raise ValueError(f"offsets must have length {rows + 1}; distances (float64) and indices the same length")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
        raise ValueError("offsets must ascend from 0 to the number of matches")
    if (query_camids is None) != (gallery_camids is None):
        raise ValueError("one of query_camids and gallery_camids is missing")
    labels = (query_pids, gallery_pids, query_camids, gallery_camids)
    for label, length in zip(labels, (rows, columns) * 2, strict=True):
        if label is not None and (label.dtype != torch.int32 or label.shape != (length,)):
            raise ValueError(f"pids and camids must be int32 [{rows}] and [{columns}]")
    limits = bins(exponent, signed=query is None)
    chosen = dispatch.choose("count_nonmatches", backend, gallery.device, gallery.dtype)
    if chosen == "torch":
        return reference.count_nonmatches(query, gallery, *labels, *matches, first, metric, limits)
    scale = (3 - exponent - (metric == "cosine")) // 2  # 2^scale times a feature less the centre is at most 1 long
    if chosen in _GPU:
        launches = _launches(chosen)
        if query is None:
            found = launches.count_nonmatches_in_rows(gallery, labels, matches, first, limits)
        else:
            center = _center(query, metric)
            found = launches.count_nonmatches(query, gallery, labels, matches, first, metric, limits, center, scale)
        return found  # type: ignore[no-any-return]
    assert _native.module is not None
    offsets, distances, indices = (tensor.contiguous() for tensor in matches)
    counts, histogram = torch.empty_like(indices), torch.zeros(limits[2], dtype=torch.int64)
    threads = torch.get_num_threads()
    contiguous = [None if label is None else label.contiguous() for label in labels]
    label_fields = (*(0 if label is None else label.data_ptr() for label in contiguous), first)
    match_fields = [tensor.data_ptr() for tensor in (offsets, distances, indices, counts)]
    bin_fields = (*limits, histogram.data_ptr())
    code = dispatch.DTYPE_CODES[gallery.dtype]
    if query is None:
        workspace = torch.empty(threads * (limits[2] + 1), dtype=torch.int64)
        status = _native.module.count_nonmatches_in_rows(
            _fields(gallery), label_fields, match_fields, bin_fields, workspace.data_ptr(), code, threads
        )
    else:
        dim = query.shape[1]
        block_rows = max(1, min(rows, _BLOCK_BYTES // (4 * dim)))
        tile_rows = max(1, min(columns, _TILE_ROWS, _TILE_BYTES // (4 * dim)))
        size = _native.module.count_workspace(dim, block_rows, tile_rows, limits[2], threads)
        workspace, center = torch.empty(size, dtype=torch.uint8), _center(query, metric)
        status = _native.module.count_nonmatches(
            _fields(query),
            _fields(gallery),
            label_fields,
            match_fields,
            bin_fields,
            METRICS.index(metric),
            center.data_ptr(),
            scale,
            block_rows,
            tile_rows,
            workspace.data_ptr(),
            code,
            threads,
        )
    dispatch.check_status(status, "count_nonmatches", gallery)
    return counts, histogram


@torch.library.register_fake("sabmn_ext::squared_norms", lib=_library)
def _(features, backend):  # type: ignore[no-untyped-def]
    return features.new_empty(features.shape[:1], dtype=torch.float64)


@torch.library.register_fake("sabmn_ext::pair_distances", lib=_library)
def _(query, gallery, query_indices, gallery_indices, metric, backend):  # type: ignore[no-untyped-def]
    return query.new_empty(query_indices.shape, dtype=torch.float64)


@torch.library.register_fake("sabmn_ext::count_nonmatches", lib=_library)
def _(  # type: ignore[no-untyped-def]
    query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, offsets, distances, indices, first, metric,
    exponent, backend,
):  # fmt: skip
    return indices.new_empty(indices.shape), indices.new_empty(bins(exponent, signed=query is None)[2])
