"""Ranks of true matches by counting: rank(t_m) = m + #{valid non-matches before t_m}. No sort of the gallery, no matrix.

Three private ops (a later filter and a gallery in several parts need them apart): the distances of the true matches, and the
counts for features or for given distances. Distances are float64 sums in a fixed order (``reference._lane_sum``), the same
bits from every backend, tile and number of threads.
"""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference

METRICS = ("euclidean", "cosine")
_TILE_BYTES = 1 << 18  # a tile of queries and one of the gallery stay in a core's second-level cache

_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_MATCHES = "Tensor query_pids, Tensor gallery_pids, Tensor offsets, Tensor distances, Tensor indices"
_library.define(
    "pair_distances(Tensor query, Tensor gallery, Tensor query_indices, Tensor gallery_indices, str metric, "
    "str? backend=None) -> Tensor"
)
_library.define(
    f"count_nonmatches(Tensor query, Tensor gallery, {_MATCHES}, str metric, str? backend=None) -> Tensor"
)
_library.define(f"count_nonmatches_in_rows(Tensor rows, {_MATCHES}, str? backend=None) -> Tensor")

for _operation in ("pair_distances", "count_nonmatches", "count_nonmatches_in_rows"):
    dispatch.register(_operation, cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES))


def _fields(matrix: Tensor) -> tuple[int, int, int, int, int]:
    return matrix.data_ptr(), *matrix.shape, *matrix.stride()  # type: ignore[return-value]


def _check_index(name: str, index: Tensor, size: int) -> None:
    if index.numel() and not (0 <= int(index.min()) and int(index.max()) < size):
        raise ValueError(f"{name} lies outside 0 … {size - 1}")


def _check(query: Tensor, gallery: Tensor, metric: str, *labels: Tensor) -> None:
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1] or query.dtype != gallery.dtype:
        raise ValueError(
            f"query and gallery must be [Q, D] and [G, D] in one dtype, but are {list(query.shape)} {query.dtype} and "
            f"{list(gallery.shape)} {gallery.dtype}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    if any(label.dtype != torch.int64 for label in labels):
        raise TypeError("pids and indices must be int64")


def _native_matches(rows: int, columns: int, matches: tuple[Tensor, ...], counts: Tensor) -> list[int]:
    query_pids, gallery_pids, offsets, distances, indices = matches
    lengths = (rows, columns, rows + 1, len(indices), len(indices))
    if tuple(map(len, matches)) != lengths or distances.dtype != torch.float64:
        raise ValueError(f"pids, offsets, distances (float64), indices must have lengths {lengths}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
        raise ValueError("offsets must ascend from 0 to the number of matches")
    if not all(part.is_contiguous() for part in matches):
        raise ValueError("pids, offsets, distances and indices must be contiguous")
    return [part.data_ptr() for part in (*matches, counts)]


@torch.library.impl(_library, "pair_distances", "CompositeExplicitAutograd")
def _pair_distances(
    query: Tensor,
    gallery: Tensor,
    query_indices: Tensor,
    gallery_indices: Tensor,
    metric: str,
    backend: str | None = None,
) -> Tensor:
    _check(query, gallery, metric, query_indices, gallery_indices)
    if dispatch.choose("pair_distances", backend, query.device, query.dtype) == "torch":
        return reference.pair_distances(query, gallery, query_indices, gallery_indices, metric)
    assert _native.module is not None
    _check_index("query_indices", query_indices, len(query))
    _check_index("gallery_indices", gallery_indices, len(gallery))
    query_indices, gallery_indices = query_indices.contiguous(), gallery_indices.contiguous()
    threads = torch.get_num_threads()
    workspace = torch.empty(threads * _native.module.rank_workspace(1, 1, query.shape[1]), dtype=torch.float64)
    distances = torch.empty(len(query_indices), dtype=torch.float64)
    status = _native.module.pair_distances(
        _fields(query),
        _fields(gallery),
        dispatch.DTYPE_CODES[query.dtype],
        query_indices.data_ptr(),
        gallery_indices.data_ptr(),
        len(query_indices),
        METRICS.index(metric),
        distances.data_ptr(),
        workspace.data_ptr(),
        threads,
    )
    dispatch.check_status(status, "pair_distances", query, gallery)
    return distances


def _tile_rows(length: int, most: int, limit: int) -> int:
    """Rows of a tile: a multiple of 4, as many as fit in the cache, no more than needed."""
    fitting = min(most, _TILE_BYTES // (8 * max(16, length)), limit)
    return max(4, (fitting + 3) // 4 * 4)


@torch.library.impl(_library, "count_nonmatches", "CompositeExplicitAutograd")
def _count_nonmatches(
    query: Tensor,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    metric: str,
    backend: str | None = None,
) -> Tensor:
    _check(query, gallery, metric, query_pids, gallery_pids, offsets, indices)
    matches = (query_pids, gallery_pids, offsets, distances, indices)
    if dispatch.choose("count_nonmatches", backend, query.device, query.dtype) == "torch":
        return reference.count_nonmatches(query, gallery, *matches, metric)
    assert _native.module is not None
    counts = torch.empty_like(indices)
    threads = torch.get_num_threads()
    query_rows = _tile_rows(query.shape[1], 64, -(-len(query) // threads))
    gallery_rows = _tile_rows(query.shape[1], 256, len(gallery))
    size = _native.module.rank_workspace(query_rows, gallery_rows, query.shape[1])
    workspace = torch.empty(threads * size, dtype=torch.float64)
    status = _native.module.count_nonmatches(
        _fields(query),
        _fields(gallery),
        dispatch.DTYPE_CODES[query.dtype],
        _native_matches(len(query), len(gallery), matches, counts),
        METRICS.index(metric),
        query_rows,
        gallery_rows,
        workspace.data_ptr(),
        threads,
    )
    dispatch.check_status(status, "count_nonmatches", query, gallery)
    return counts


@torch.library.impl(_library, "count_nonmatches_in_rows", "CompositeExplicitAutograd")
def _count_nonmatches_in_rows(
    rows: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    backend: str | None = None,
) -> Tensor:
    _check(rows, rows, METRICS[0], query_pids, gallery_pids, offsets, indices)
    matches = (query_pids, gallery_pids, offsets, distances, indices)
    if dispatch.choose("count_nonmatches_in_rows", backend, rows.device, rows.dtype) == "torch":
        return reference.count_nonmatches_in_rows(rows, *matches)
    assert _native.module is not None
    counts = torch.empty_like(indices)
    status = _native.module.count_nonmatches_in_rows(
        _fields(rows),
        dispatch.DTYPE_CODES[rows.dtype],
        _native_matches(*rows.shape, matches, counts),
        torch.get_num_threads(),
    )
    dispatch.check_status(status, "count_nonmatches_in_rows", rows)
    return counts


@torch.library.register_fake("sabmn_ext::pair_distances", lib=_library)
def _(query, gallery, query_indices, gallery_indices, metric, backend=None):  # type: ignore[no-untyped-def]
    return query.new_empty(query_indices.shape, dtype=torch.float64)


@torch.library.register_fake("sabmn_ext::count_nonmatches", lib=_library)
@torch.library.register_fake("sabmn_ext::count_nonmatches_in_rows", lib=_library)
def _(*arguments, **options):  # type: ignore[no-untyped-def]
    return torch.empty_like(next(a for a in reversed(arguments) if isinstance(a, Tensor)))


def rank_matches(
    query: Tensor | None,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    offsets: Tensor,
    matches: Tensor,
    *,
    metric: str = "euclidean",
    backend: str | None = None,
) -> Tensor:
    """The ranks of every query's true matches, from 1, ascending; ties go to the lower gallery index.

    Args:
        query: [Q, D] features, or None where ``gallery`` holds distances.
        gallery: [G, D] features, or [Q, G] distances.
        query_pids, gallery_pids: [Q], [G] int64; gallery items with pid −1 are dropped.
        offsets, matches: [Q + 1], [M] int64; the gallery indices of query q's true matches, ascending, are
            ``matches[offsets[q]:offsets[q + 1]]``.

    Returns:
        [M] int64.
    """
    lengths = offsets.diff()
    query_of = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    if query is None:
        distances = gallery[query_of, matches].double()
    else:
        distances = torch.ops.sabmn_ext.pair_distances(query, gallery, query_of, matches, metric, backend)
    order = distances.argsort(stable=True)
    order = order[query_of[order].argsort(stable=True)]
    sorted_matches = (query_pids, gallery_pids, offsets, distances[order], matches[order])
    if query is None:
        counts = torch.ops.sabmn_ext.count_nonmatches_in_rows(gallery, *sorted_matches, backend)
    else:
        counts = torch.ops.sabmn_ext.count_nonmatches(query, gallery, *sorted_matches, metric, backend)
    return counts + torch.arange(1, len(matches) + 1, device=offsets.device) - offsets[query_of]
