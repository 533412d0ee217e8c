"""The nearest gallery items of every query, exactly, with neither a sort of the gallery nor a distance matrix.

Filter and refine, as csrc/retrieval/count_cpu.cpp does. With a = 2^scale (q − c), b = 2^scale (g − c) for a fixed c
(unit vectors q, g for the cosine) the distance is, up to a power of two, ‖a‖² + ‖b‖² − 2 a·b. A float32 product of
tiles gives a lower bound of it: two more columns subtract the product's own error, so each entry of

    [−2a, 1 − κ, −β‖a‖] · [b, ‖b‖², ‖b‖]  =  ‖b‖² − 2 a·b − β‖a‖‖b‖ − κ‖b‖²

is, as computed, at most ‖b‖² − 2 a·b. For each query the items with the smallest bounds are kept, a few more than asked
for. The float64 distances of those that the bound does not rule out are then computed in the fixed order of
``reference.pair_distances``. If the k-th of these is below every other item's bound, the list is certain; else all
items whose bound leaves it open are computed. So the result does not depend on tiles, threads, device or the
product's precision.

The bound. u = 2⁻²⁴, n = D + 2 terms, v: the relative rounding of a product's inputs, where a setting of torch allows
TF32 or bfloat16. Rounding a, b, ‖b‖² to float32 costs (2u + u²) 2‖a‖‖b‖ + u‖b‖². The product, in any order, with fused
multiply-adds or without, is off by at most ρ = γ + 2v + v² of the sum of its terms' magnitudes,
2‖a‖‖b‖ + ‖b‖² + β‖a‖‖b‖, where γ = n u / (1 − n u). Hence β = (4u + 2ρ)(1 + 2⁻⁵) and κ = (2u + ρ)(1 + 2⁻⁵) suffice as
long as ρ ≤ 2⁻⁶. float64 sums, the exact distance's own among them, are each off by at most (D + 64) 2⁻⁵² of
2(‖a‖² + ‖b‖²), or for the cosine by that of 32 · 2^(2 scale); underflow by 2⁻¹²⁶ a rounding.
"""

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops.cpu.products import multiply
from sabmn_ext.ops.nearest import Smallest
from sabmn_ext.ops.reference import _sqrt
from sabmn_ext.ops.retrieval import METRICS, distance_exponent
from sabmn_ext.retrieval.inputs import Array, as_matrix, check_features

_QUERY_ROWS, _TILE_ROWS = 2048, 2048
_SQUARE_ROWS = 1024  # of both sides, where the queries are the gallery
_BLOCK_ROWS = 256  # in float64 at a time
_SPARE = 16  # candidates beyond those asked for, though no more than four for each; and an eighth of these
_OPEN_PAIRS = 1 << 22  # at a time, where the lists are not certain


def topk(query: Array, gallery: Array, k: int, *, metric: str = "euclidean") -> tuple[Tensor, Tensor]:
    """The ``k`` nearest gallery items of every query, nearest first; ties go to the lower index.

    Args:
        query: [Q, D] torch (any device, any strides) or numpy, float16, bfloat16, float32 or float64.
        gallery: [G, D] in the same dtype on the same device; read in tiles, so it may be memory-mapped.
        k: from 1 to G.
        metric: ``"euclidean"`` or ``"cosine"`` (1 − cos), on the features as they are.

    Returns:
        distances [Q, k] float64 and indices [Q, k] int64, on the features' device. Both are exact: those of a stable
        sort of the float64 distances, whatever the tiles, the threads or the processor.

    Memory: a float32 copy of the queries, some 70 bytes for each of their k nearest items, and 100 MB.

    Raises:
        TypeError, ValueError: dtypes, devices or dimensions that do not fit; k out of range; NaN or infinite features
            (names the row), zero features with the cosine metric.

    >>> gallery = torch.tensor([[0.0, 3.0], [0.0, 1.0], [0.0, -1.0]])
    >>> sabmn_ext.topk(torch.zeros(1, 2), gallery, 2)
    (tensor([[1., 1.]], dtype=torch.float64), tensor([[1, 2]]))
    """
    distances, indices, _ = neighbors(query, gallery, k, metric)
    return (_sqrt(distances) if metric == "euclidean" else distances), indices


def neighbors(
    query: Array, gallery: Array, k: int, metric: str, *, farthest: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As ``topk``, with distances as they are ranked (Euclidean: squared); and [Q] the largest ones, if asked for.

    Where the queries are the gallery (the same object, on the CPU), the product of all pairs is symmetric: half of its
    blocks are computed, and each serves the items of both its sides. An entry plus its query's part bounds the pair.
    """
    symmetric = query is gallery
    query, gallery = as_matrix("query", query), as_matrix("gallery", gallery)
    check_sides(query, gallery, metric)
    k = _check_k(k, len(gallery))
    largest = check_features("query", query, metric, None)
    if not symmetric:
        largest = max(largest, check_features("gallery", gallery, metric, None))
    bound = _Bound.of(query, metric, largest)
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        pass_all = _pass_halves if symmetric and query.device.type == "cpu" else _pass_tiles
        blocks, longest = pass_all(query, gallery, bound, k, farthest)
        distances, indices = _refine(blocks, [block.nearest for block in blocks], gallery, longest)
        last = [block.farthest for block in blocks if block.farthest]
        return distances, indices, -_refine(blocks, last, gallery, longest)[0][:, 0] if last else None


def check_sides(query: Tensor, gallery: Tensor, metric: str) -> None:
    """A TypeError or ValueError unless [Q, D] and [G, D] can be compared."""
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    if query.dtype != gallery.dtype or query.device != gallery.device:
        both = " and ".join(f"{x.dtype} on {x.device}" for x in (query, gallery))
        raise TypeError(f"query and gallery must have one dtype and device, but are {both}")
    if query.shape[1] != gallery.shape[1] or query.shape[1] == 0:
        both = " and ".join(str(list(x.shape)) for x in (query, gallery))
        raise ValueError(f"query and gallery must be [Q, D] and [G, D] with one D ≥ 1, but are {both}")
    if len(query) == 0 or len(gallery) == 0:
        raise ValueError(f"there are no {'gallery items' if len(query) else 'queries'}")


def _check_k(k: Any, num_gallery: int) -> int:
    try:
        number = operator.index(k)
    except TypeError:
        raise TypeError(f"k is {k!r}; expected an integer") from None
    if not 1 <= number <= num_gallery:
        raise ValueError(f"k is {number}; expected 1 to {num_gallery}, the number of gallery items")
    return number


# ---- filter ----


def _input_rounding(device: torch.device) -> float:
    """The relative rounding of what enters a float32 product, by torch's settings; 0 for products in float32."""
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    precision = backend.matmul.fp32_precision
    return {"none": 0.0, "ieee": 0.0, "tf32": 2.0**-10}.get(precision, 2.0**-8)


def _directions(features: Tensor, metric: str) -> Tensor:
    """float64; unit vectors for the cosine, by the norms that the exact distance has."""
    rows = features.double()
    return rows / torch.ops.sabmn_ext.squared_norms(features, None).sqrt()[:, None] if metric == "cosine" else rows


@dataclass(frozen=True)
class _Bound:
    """The constants of this file's first comment."""

    metric: str
    center: Tensor  # [D] float64
    scale: int
    unit: float  # ‖a − b‖² = unit · distance
    dot: float  # β
    square: float  # κ
    own: float  # the float64 sums' part of ‖a‖² + ‖b‖²
    absolute: float

    @staticmethod
    def of(query: Tensor, metric: str, largest_squared_norm: float) -> "_Bound":
        dim, u, v = query.shape[1], 2.0**-24, _input_rounding(query.device)
        rho = (dim + 2) * u / (1 - (dim + 2) * u) + 2 * v + v * v
        if not 0 <= rho <= 2.0**-6:
            raise ValueError(f"the features have {dim} dimensions: too many to search with float32 products")
        blocks = [_directions(rows, metric).sum(dim=0) for rows in query.split(_QUERY_ROWS)]
        scale = (3 - distance_exponent(largest_squared_norm, metric) - (metric == "cosine")) // 2
        sums, shift, spare = (dim + 64) * 2.0**-52, 4.0**scale, 1 + 2.0**-5
        return _Bound(
            metric,
            torch.stack(blocks).sum(dim=0) / len(query),
            scale,
            shift * (2 if metric == "cosine" else 1),
            spare * (4 * u + 2 * rho),
            spare * (2 * u + rho),
            spare * 8 * sums,
            spare * (16 * (dim + 2) * 2.0**-126 + dim * 2.0**-1074 * shift + 32 * sums * shift * (metric == "cosine")),
        )

    def gallery_columns(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, D + 2] float32: b, ‖b‖², ‖b‖; and ‖b‖ [rows] float64."""
        dim, shift = features.shape[1], 2.0**self.scale
        columns = torch.empty(len(features), dim + 2, device=features.device)
        lengths = torch.empty(len(features), dtype=torch.float64, device=features.device)
        for first in range(0, len(features), _BLOCK_ROWS):
            some = slice(first, first + _BLOCK_ROWS)
            rows = torch.add(-shift * self.center, _directions(features[some], self.metric), alpha=shift)
            columns[some, :dim] = rows
            lengths[some] = torch.linalg.vector_norm(rows, dim=1)
        columns[:, -2] = lengths.square()
        columns[:, -1] = lengths
        return columns, lengths

    def slack(self, longest: float) -> float:
        """How far the bound of a pair, of what is at most ``longest``, can be below the exact distance."""
        return (2 * (self.dot + self.square) + 8 * self.own) * longest**2 + 2 * self.absolute

    def to_query(self, columns: Tensor, lengths: Tensor) -> None:
        """What ``gallery_columns`` gave becomes −2a, 1 − κ, −β‖a‖, in place."""
        columns[:, :-2] *= -2
        columns[:, -2] = 1 - self.square - self.own
        columns[:, -1] = -self.dot * lengths


class _Kept:
    """The items whose bounds are smallest, so far: of the distance, or (sign −1) of the negative distance.

    An entry of the product is at most ‖b‖² − 2 a·b, and at least that less twice what was subtracted.
    """

    def __init__(self, lengths: Tensor, k: int, sign: float, bound: _Bound) -> None:
        self.k, self.sign, self.bound = k, sign, bound
        self.smallest = Smallest(len(lengths), k + min(_SPARE, 4 * k) + k // 8, sign, lengths.device)

    def offset(self, lengths: Tensor, longest: float) -> Tensor:
        """[rows] float64: sign · ‖a − b‖² is at least sign · entry plus this; ‖a‖ and the longest ‖b‖ are given."""
        bound = self.bound
        offset = self.sign * lengths.square() - bound.own * lengths.square() - bound.absolute
        if self.sign < 0:
            offset = offset - 2 * (bound.dot * lengths * longest + (bound.square + bound.own) * longest**2)
        return offset


class _Block:
    """Some queries, and what is kept for them while the gallery passes by in tiles."""

    def __init__(self, query: Tensor, bound: _Bound, k: int, farthest: bool) -> None:
        self.query, self.bound = query, bound
        self.columns, self.lengths = bound.gallery_columns(query)  # [rows, D + 2], [rows]
        self.longest = float(self.lengths.max())
        self.nearest = _Kept(self.lengths, k, 1.0, bound)
        self.farthest = _Kept(self.lengths, 1, -1.0, bound) if farthest else None

    def to_query(self) -> None:
        self.bound.to_query(self.columns, self.lengths)

    def add(self, product: Tensor, lengths: Tensor, longest: float, first: int, *, transposed: bool = False) -> None:
        """A product of queries of ``lengths`` and items up to ``longest``; transposed: the block holds the latter."""
        for kept in filter(None, (self.nearest, self.farthest)):
            kept.smallest.add(product, kept.offset(lengths, longest), first, transposed=transposed)


def _products(rows: Tensor, others: Tensor) -> Tensor:
    """rows · othersᵀ in float32, sums in any order; on the CPU by the C++ kernel, where there is one."""
    if rows.device.type != "cpu" or _native.module is None:
        return rows @ others.T
    return multiply(rows[None], others.T[None], rows.new_empty(1, len(rows), len(others)))[0]


def _pass_tiles(
    query: Tensor, gallery: Tensor, bound: _Bound, k: int, farthest: bool
) -> tuple[list[_Block], float]:
    """The queries' blocks after the whole gallery has passed by, and the longest ‖a‖ or ‖b‖."""
    blocks = [_Block(rows, bound, k, farthest) for rows in query.split(_QUERY_ROWS)]
    longest = max(block.longest for block in blocks)
    for block in blocks:
        block.to_query()
    for first in range(0, len(gallery), _TILE_ROWS):
        tile, lengths = bound.gallery_columns(gallery[first : first + _TILE_ROWS])
        tile_longest = float(lengths.max())
        longest = max(longest, tile_longest)
        for block in blocks:
            block.add(_products(block.columns, tile), block.lengths, tile_longest, first)
    return blocks, longest


def _pass_halves(items: Tensor, _: Tensor, bound: _Bound, k: int, farthest: bool) -> tuple[list[_Block], float]:
    """The same where the queries are the gallery."""
    blocks = [_Block(rows, bound, k, farthest) for rows in items.split(_SQUARE_ROWS)]
    for i, block in enumerate(blocks):
        diagonal = block.columns.clone()
        block.to_query()
        for j, other in enumerate(blocks[i:], start=i):
            product = _products(block.columns, diagonal if other is block else other.columns)
            block.add(product, block.lengths, other.longest, j * _SQUARE_ROWS)
            if other is not block:
                other.add(product, block.lengths, other.longest, i * _SQUARE_ROWS, transposed=True)
    return blocks, max(block.longest for block in blocks)


# ---- refine ----


def _refine(
    blocks: list[_Block], kept: list[_Kept], gallery: Tensor, longest: float
) -> tuple[Tensor, Tensor]:
    """What is asked for of all queries: signed distances [Q, k] and items [Q, k]."""
    found, open_rows = [], []
    for block, each in zip(blocks, kept, strict=True):
        beyond = each.smallest.values.amax(dim=1)  # a bound of all that is not kept
        slack = each.bound.slack(longest)
        distances, items = each.smallest.rank(block.query, gallery, each.bound.metric, slack, each.k)
        found.append((distances, items))
        limits = distances[:, -1] * each.bound.unit
        # A shorter list than the gallery is certain if all that is not in it is farther.
        is_open = (beyond <= limits) & (each.smallest.values.shape[1] < len(gallery))
        few = is_open.nonzero()[:, 0]
        open_rows.append((few, block.query[few], block.columns[few], block.lengths[few], limits[few]))
    distances, items = (torch.cat(parts) for parts in zip(*found, strict=True))
    firsts = range(0, len(distances), len(found[0][0]))
    rows = torch.cat([first + few for first, (few, *_) in zip(firsts, open_rows, strict=True)])
    query, columns, lengths, limits = (torch.cat(parts) for parts in list(zip(*open_rows, strict=True))[1:])
    step = max(1, _OPEN_PAIRS // len(gallery))
    for some in (slice(first, first + step) for first in range(0, len(rows), step)):
        settled = _refine_all(query[some], gallery, columns[some], lengths[some], limits[some], kept[0])
        distances[rows[some]], items[rows[some]] = settled
    return distances, items


def _refine_all(
    query: Tensor, gallery: Tensor, columns: Tensor, lengths: Tensor, limits: Tensor, kept: _Kept
) -> tuple[Tensor, Tensor]:
    """The lists of some queries from every item whose bound does not exceed ``limits``; a limit is above k items."""
    parts = []
    for first in range(0, len(gallery), _TILE_ROWS):
        tile, tile_lengths = kept.bound.gallery_columns(gallery[first : first + _TILE_ROWS])
        offsets = kept.offset(lengths, float(tile_lengths.max()))
        below = kept.sign * _products(columns, tile).double() + offsets[:, None] <= limits[:, None]
        rows, items = below.nonzero().T
        pairs = torch.ops.sabmn_ext.pair_distances(query, gallery, rows, items + first, kept.bound.metric, None)
        parts.append((rows, items + first, kept.sign * pairs))
    rows, items, distances = (torch.cat(part) for part in zip(*parts, strict=True))
    order = items.argsort()
    for key in (distances, rows):
        order = order[key[order].argsort(stable=True)]
    begin = torch.searchsorted(rows[order], torch.arange(len(query), device=rows.device))
    chosen = order[begin[:, None] + torch.arange(kept.k, device=rows.device)]  # [queries, k]
    return distances[chosen], items[chosen]
