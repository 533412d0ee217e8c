"""Ranks of true matches by counting: rank(t_m) = m + #{valid non-matches before t_m}. No sort of the gallery.

Two private ops, apart because a filter before them and a gallery in several parts need them apart: the distances of the
true matches, and the counts. Distances are float64 sums in a fixed order (``reference.pair_distances``): the same bits
from every backend, tile and number of threads.
"""

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference

METRICS = ("euclidean", "cosine")
_TILE_BYTES = 1 << 18  # a tile of queries and one of the gallery stay in a core's second-level cache

_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_library.define(
    "pair_distances(Tensor query, Tensor gallery, Tensor query_indices, Tensor gallery_indices, str metric, "
    "str? backend) -> Tensor"
)
_library.define(
    "count_nonmatches(Tensor? query, Tensor gallery, Tensor query_pids, Tensor gallery_pids, Tensor offsets, "
    "Tensor distances, Tensor indices, str metric, str? backend) -> Tensor"
)
for _operation in ("pair_distances", "count_nonmatches"):
    dispatch.register(_operation, cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The ranks of every query's true matches, from 1, ascending; ties go to the lower gallery index.

    Args:
        query: [Q, D] features, or None where ``gallery`` holds distances.
        gallery: [G, D] features in the same dtype, or [Q, G] distances; without NaN.
        query_pids, gallery_pids: [Q], [G] int64; gallery items with pid −1 are dropped.
        offsets, matches: [Q + 1], [M] int64; the gallery indices of query q's true matches, ascending, are
            ``matches[offsets[q]:offsets[q + 1]]``. Other gallery items with the query's pid are dropped.
        metric: ``"euclidean"`` or ``"cosine"``.

    Returns:
        ranks [M] int64; and the matches in their order: distances [M] float64, gallery indices [M] int64.
    """
    lengths = offsets.diff()
    query_of = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)
    if query is None:
        distances = gallery[query_of, matches].double()
    else:
        distances = torch.ops.sabmn_ext.pair_distances(query, gallery, query_of, matches, metric, backend)
    order = distances.argsort(stable=True)
    order = order[query_of[order].argsort(stable=True)]
    distances, matches = distances[order], matches[order]
    counts = torch.ops.sabmn_ext.count_nonmatches(
        query, gallery, query_pids, gallery_pids, offsets, distances, matches, metric, backend
    )
    return counts + torch.arange(1, len(matches) + 1, device=offsets.device) - offsets[query_of], distances, matches


def _check(query: Tensor, gallery: Tensor, metric: str, int64s: tuple[Tensor, ...]) -> None:
    if query.dim() != 2 or gallery.dim() != 2 or query.shape[1] != gallery.shape[1] or query.dtype != gallery.dtype:
        raise ValueError(
            f"query and gallery must be [Q, D] and [G, D] in one dtype, but are {list(query.shape)} {query.dtype} and "
            f"{list(gallery.shape)} {gallery.dtype}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    if not all(tensor.dtype == torch.int64 for tensor in int64s):
        raise TypeError("pids, offsets and indices must be int64")


def _check_indices(name: str, indices: Tensor, size: int) -> None:
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= size):
        raise ValueError(f"{name} leaves the range 0 … {size - 1}")


def _fields(matrix: Tensor) -> tuple[int, ...]:
    return matrix.data_ptr(), *matrix.shape, *matrix.stride()


def _workspace(query_rows: int, gallery_rows: int, dim: int) -> Tensor:
    assert _native.module is not None
    size = _native.module.rank_workspace(query_rows, gallery_rows, dim)
    return torch.empty(torch.get_num_threads() * size, dtype=torch.float64)


@torch.library.impl(_library, "pair_distances", "CompositeExplicitAutograd")
def _pair_distances(
    query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, metric: str, backend: str | None
) -> Tensor:
    _check(query, gallery, metric, (query_indices, gallery_indices))
    if dispatch.choose("pair_distances", backend, query.device, query.dtype) == "torch":
        return reference.pair_distances(query, gallery, query_indices, gallery_indices, metric)
    assert _native.module is not None
    _check_indices("query_indices", query_indices, len(query))
    _check_indices("gallery_indices", gallery_indices, len(gallery))
    if query_indices.shape != gallery_indices.shape:
        raise ValueError(f"{len(query_indices)} query_indices but {len(gallery_indices)} gallery_indices")
    query_indices, gallery_indices = query_indices.contiguous(), gallery_indices.contiguous()
    distances = torch.empty(len(query_indices), dtype=torch.float64)
    workspace = _workspace(1, 1, query.shape[1])  # by name: it must live until the call returns
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


def _tile_rows(dim: int, most: int, needed: int) -> int:
    """Rows of a tile: a multiple of 4 that stays in the cache, no more than needed."""
    rows = min(most, needed, _TILE_BYTES // (8 * max(dim, 1)))
    return max(4, -(-rows // 4) * 4)


@torch.library.impl(_library, "count_nonmatches", "CompositeExplicitAutograd")
def _count_nonmatches(
    query: Tensor | None,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    metric: str,
    backend: str | None,
) -> Tensor:
    matches: tuple[Tensor, ...] = (query_pids, gallery_pids, offsets, distances, indices)
    _check(gallery if query is None else query, gallery, metric, (query_pids, gallery_pids, offsets, indices))
    if dispatch.choose("count_nonmatches", backend, gallery.device, gallery.dtype) == "torch":
        if query is None:
            return reference.count_nonmatches_in_rows(gallery, *matches)
        return reference.count_nonmatches(query, gallery, query_pids, gallery_pids, offsets, distances, indices, metric)
    assert _native.module is not None
    rows, columns = gallery.shape if query is None else (len(query), len(gallery))
    lengths = (rows, columns, rows + 1, len(indices), len(indices))
    if tuple(map(len, matches)) != lengths or distances.dtype != torch.float64:
        raise ValueError(f"pids, offsets, distances (float64) and indices must have lengths {lengths}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != len(indices) or bool((offsets.diff() < 0).any()):
        raise ValueError("offsets must ascend from 0 to the number of matches")
    matches = tuple(tensor.contiguous() for tensor in matches)
    counts, threads = torch.empty(len(indices), dtype=torch.int64), torch.get_num_threads()
    fields = [tensor.data_ptr() for tensor in (*matches, counts)]
    dtype = dispatch.DTYPE_CODES[gallery.dtype]
    if query is None:
        status = _native.module.count_nonmatches_in_rows(_fields(gallery), fields, dtype, threads)
    else:
        dim = query.shape[1]
        tiles = _tile_rows(dim, 64, -(-rows // threads)), _tile_rows(dim, 256, columns)
        workspace = _workspace(*tiles, dim)
        status = _native.module.count_nonmatches(
            _fields(query),
            _fields(gallery),
            fields,
            METRICS.index(metric),
            *tiles,
            workspace.data_ptr(),
            dtype,
            threads,
        )
    dispatch.check_status(status, "count_nonmatches", gallery)
    return counts


@torch.library.register_fake("sabmn_ext::pair_distances", lib=_library)
def _(query, gallery, query_indices, gallery_indices, metric, backend):  # type: ignore[no-untyped-def]
    return query.new_empty(query_indices.shape, dtype=torch.float64)


@torch.library.register_fake("sabmn_ext::count_nonmatches", lib=_library)
def _(query, gallery, query_pids, gallery_pids, offsets, distances, indices, metric, backend):  # type: ignore[no-untyped-def]
    return indices.new_empty(indices.shape)
