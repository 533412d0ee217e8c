"""Ranking by the CUDA kernels of csrc/retrieval: the gallery passes by in tiles that are packed, filtered and refined.

How many pairs the filter leaves open only the GPU knows: the list has room for every pair of a tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, gpu_ranking
from sabmn_ext.ops.gpu_ranking import Labels, Matches, Norms
from sabmn_ext.ops.retrieval import _fields


def _stream() -> int:
    return torch.cuda.current_stream().cuda_stream  # type: ignore[no-any-return]


def _addresses(norms: Norms) -> tuple[int, int]:
    return (0, 0) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())


def squared_norms(features: Tensor) -> Tensor:
    """As ``reference.squared_norms``, bit for bit."""
    assert _native.module is not None
    norms = torch.empty(len(features), dtype=torch.float64, device=features.device)
    with torch.cuda.device(features.device):
        code = dispatch.DTYPE_CODES[features.dtype]
        status = _native.module.squared_norms_cuda(_fields(features), norms.data_ptr(), code, _stream())
    dispatch.check_status(status, "squared_norms", features)
    return norms


def pair_distances(
    query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, metric: str
) -> Tensor:
    """As ``reference.pair_distances``, bit for bit."""
    assert _native.module is not None
    query_indices, gallery_indices = query_indices.contiguous(), gallery_indices.contiguous()
    distances = torch.empty(len(query_indices), dtype=torch.float64, device=query.device)
    norms = gpu_ranking.norms_of(query, gallery, metric, squared_norms)
    with torch.cuda.device(query.device):
        status = _native.module.pair_distances_cuda(
            _fields(query),
            _fields(gallery),
            _addresses(norms),
            query_indices.data_ptr(),
            gallery_indices.data_ptr(),
            len(query_indices),
            distances.data_ptr(),
            dispatch.DTYPE_CODES[query.dtype],
            _stream(),
        )
    dispatch.check_status(status, "pair_distances", query, gallery)
    return distances


def _counted(
    labels: list[Tensor], counters: gpu_ranking.Counters, first: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Labels, matches and bins as csrc/bindings.cpp takes them."""
    matches = (counters.offsets, counters.distances, counters.indices, counters.between)
    return (
        (*(label.data_ptr() for label in labels), first),
        tuple(tensor.data_ptr() for tensor in matches),
        (*counters.bins, counters.histogram.data_ptr()),
    )


def count_nonmatches_in_rows(
    rows: Tensor, labels: Labels, matches: Matches, first: int, bins: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """``reference.count_nonmatches`` of given distances [Q, G]."""
    assert _native.module is not None
    codes, counters = gpu_ranking.contiguous(labels), gpu_ranking.Counters.of(matches, bins)
    with torch.cuda.device(rows.device):
        status = _native.module.count_nonmatches_in_rows_cuda(
            _fields(rows), *_counted(codes, counters, first), dispatch.DTYPE_CODES[rows.dtype], _stream()
        )
    dispatch.check_status(status, "count_nonmatches", rows)
    return counters.result()


@dataclass(frozen=True)
class _Packed:
    """Room for rows of one side as the filter takes them: csrc/retrieval/retrieval_cuda.h."""

    panels: Tensor
    values: Tensor  # [3, rows]

    @staticmethod
    def room(rows: int, dim: int, device: torch.device) -> "_Packed":
        assert _native.module is not None
        rows, dim = (
            -(-size // unit) * unit
            for size, unit in zip((rows, dim), (_native.module.PACKED_ROWS, _native.module.PACKED_DEPTH), strict=True)
        )
        return _Packed(torch.empty(rows * dim, device=device), torch.empty(3, rows, device=device))

    def fields(self) -> tuple[int, int, int]:
        return self.panels.data_ptr(), self.values.data_ptr(), self.values.shape[1]


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
    native = _native.module
    assert native is not None
    codes, counters = gpu_ranking.contiguous(labels), gpu_ranking.Counters.of(matches, bins)
    tiles = gpu_ranking.tiles(codes[1], len(query), native.PACKED_ROWS)
    if not tiles:
        return counters.result()
    norms = gpu_ranking.norms_of(query, gallery, metric, squared_norms)
    below, above = counters.enclosed(gpu_ranking.scaled_exponent(metric, scale))
    dim, device, code = query.shape[1], query.device, dispatch.DTYPE_CODES[query.dtype]
    queries = _Packed.room(len(query), dim, device)
    listed = torch.empty(len(query) * len(tiles[0]), dtype=torch.int32, device=device)
    num_listed = torch.zeros(len(tiles), dtype=torch.int32, device=device)

    def pack(side: Tensor, items: Tensor | None, squares: int, packed: _Packed) -> None:
        count, rows = (len(side), 0) if items is None else (len(items), items.data_ptr())
        status = native.pack_features_cuda(
            _fields(side), rows, count, squares, center.data_ptr(), scale, items is None, packed.fields(), code,
            _stream(),
        )  # fmt: skip
        dispatch.check_status(status, "count_nonmatches", query, gallery)

    with torch.cuda.device(device):
        pack(query, None, _addresses(norms)[0], queries)
        for number, items in enumerate(tiles):
            packed = _Packed.room(len(items), dim, device)
            pack(gallery, items, _addresses(norms)[1], packed)
            tile = (items, below, above, listed, num_listed[number])
            status = native.count_nonmatches_cuda(
                _fields(query),
                _fields(gallery),
                _addresses(norms),
                *_counted(codes, counters, first),
                scale,
                (queries.fields(), packed.fields()),
                len(items),
                [tensor.data_ptr() for tensor in tile],
                code,
                _stream(),
            )
            dispatch.check_status(status, "count_nonmatches", query, gallery)
    return counters.result()
