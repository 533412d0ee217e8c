"""What the CUDA and the Triton launches of the ranking share: counters, labels, enclosed thresholds, tiles."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sabmn_ext.ops import reference

Labels = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # pids of both sides, camids of both sides
Matches = tuple[Tensor, Tensor, Tensor]  # offsets, distances, indices
Norms = tuple[Tensor, Tensor] | None  # [Q] and [G], for the cosine

_Counters = TypeVar("_Counters", bound="Counters")

_TILE_PAIRS = 1 << 24  # at a time
_TILE_ROWS = 4096


def norms_of(query: Tensor, gallery: Tensor, metric: str, squared_norms: Callable[[Tensor], Tensor]) -> Norms:
    """The squared lengths of both sides' rows, where the metric needs them."""
    return (squared_norms(query), squared_norms(gallery)) if metric == "cosine" else None


def contiguous(labels: Labels) -> list[Tensor]:
    """Contiguous labels; without cameras no two are the same."""
    query_pids, gallery_pids, query_camids, gallery_camids = labels
    if query_camids is None or gallery_camids is None:
        query_camids, gallery_camids = torch.zeros_like(query_pids), torch.ones_like(gallery_pids)
    return [label.contiguous() for label in (query_pids, gallery_pids, query_camids, gallery_camids)]


def tiles(gallery_pids: Tensor, num_queries: int, least: int) -> list[Tensor]:
    """The gallery items that are not junk, in tiles of at least ``least`` rows."""
    kept = (gallery_pids != -1).nonzero()[:, 0]
    rows = min(_TILE_ROWS, max(least, _TILE_PAIRS // max(1, num_queries)))
    return list(kept.split(rows)) if len(kept) and num_queries else []


@dataclass(frozen=True)
class Counters:
    """The queries' true matches, and what is counted."""

    offsets: Tensor  # [Q + 1]
    distances: Tensor  # [M]
    indices: Tensor  # [M]
    between: Tensor  # [M], takes the items that come between a query's true match and the one before it
    histogram: Tensor
    bins: tuple[int, int, int]

    @classmethod
    def of(cls: type[_Counters], matches: Matches, bins: tuple[int, int, int]) -> _Counters:
        offsets, distances, indices = (tensor.contiguous() for tensor in matches)
        histogram = torch.zeros(bins[2], dtype=torch.int64, device=offsets.device)
        return cls(offsets, distances, indices, torch.zeros_like(indices), histogram, bins)

    def enclosed(self, exponent: int) -> tuple[Tensor, Tensor]:
        """float32 numbers below and above the matches' distances times 2^exponent."""
        thresholds = self.distances * 2.0**exponent
        margin = thresholds.abs() * 2.0**-22 + 2.0**-126
        return (thresholds - margin).float(), (thresholds + margin).float()

    def result(self) -> tuple[Tensor, Tensor]:
        """The items before each true match, and the histogram."""
        total = torch.cat((self.between.new_zeros(1), self.between.cumsum(0)))
        return total[1:] - total[self.offsets[:-1]].repeat_interleave(self.offsets.diff()), self.histogram


def scaled_exponent(metric: str, scale: int) -> int:
    """The filter's x is 2^this times the distance."""
    return 2 * scale + (metric == "cosine")


def lowest_float_bin(bins: tuple[int, int, int], exponent: int) -> int:
    """csrc/retrieval/order.h"""
    return min(max(bins[0] - ((1023 - 127 - exponent) << reference.BIN_BITS), 0), 256 << reference.BIN_BITS)
