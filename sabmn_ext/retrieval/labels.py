"""Who counts as a match: the camera rule, junk and leave-one-out, from the labels alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# A block of queries ends where it would have more true matches than this; bounds the memory (some 100 bytes each).
_BLOCK_MATCHES = 1 << 20


@dataclass(frozen=True)
class MatchLists:
    """The true matches of consecutive queries."""

    queries: slice
    indices: np.ndarray  # [M] gallery indices, one query after the other, ascending for each
    num_matches: np.ndarray  # [queries]
    num_valid: np.ndarray  # [queries] gallery items that stay


@dataclass(frozen=True)
class Labels:
    """The labels of both sides, int64.

    For a query the gallery drops the items with its pid and its camera, and those with pid −1; all else stays. pid 0 is
    a pid like any other. A query with pid −1 has no match, since every gallery item with its pid is dropped.
    """

    query_pids: np.ndarray  # [Q]
    gallery_pids: np.ndarray  # [G]
    query_camids: np.ndarray | None  # [Q]; None: the camera rule is off
    gallery_camids: np.ndarray | None  # [G]
    exclude_self: bool  # query i is gallery item i, and is dropped for itself

    def __post_init__(self) -> None:
        if len(self.query_pids) == 0 or len(self.gallery_pids) == 0:
            raise ValueError(f"there are no {'gallery items' if len(self.query_pids) else 'queries'}")
        if (self.query_camids is None) != (self.gallery_camids is None):
            raise ValueError(
                "one of query_camids and gallery_camids is missing; give both, or neither (no camera rule)"
            )
        if self.exclude_self and not np.array_equal(self.query_pids, self.gallery_pids):
            raise ValueError("exclude_self: query i must be gallery item i, but query_pids and gallery_pids differ")

    @cached_property
    def _by_pid(self) -> tuple[np.ndarray, np.ndarray]:
        """The gallery's pids, sorted, and their indices, ascending for each pid."""
        order = np.argsort(self.gallery_pids, kind="stable")
        return self.gallery_pids[order], order

    def match_lists(self, first: int, last: int) -> Iterator[MatchLists]:
        """The true matches of the queries first … last − 1, in blocks."""
        pids, sorted_pids = self.query_pids[first:last], self._by_pid[0]
        group = np.searchsorted(sorted_pids, pids, side="left")
        size = np.where(pids == -1, 0, np.searchsorted(sorted_pids, pids, side="right") - group)
        ends = np.cumsum(size)
        start = 0
        while start < len(pids):
            limit = ends[start] - size[start] + _BLOCK_MATCHES
            stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
            yield self._match_list(first + start, group[start:stop], size[start:stop])
            start = stop

    def _match_list(self, first: int, group: np.ndarray, size: np.ndarray) -> MatchLists:
        query_of = np.repeat(np.arange(len(size)), size)
        # Item j of a query's pid stands at group + j; j counts from 0 for every query.
        j = np.arange(len(query_of)) - (np.cumsum(size) - size)[query_of]
        items = self._by_pid[1][group[query_of] + j]
        keep = np.ones(len(items), dtype=bool)
        if self.query_camids is not None and self.gallery_camids is not None:
            keep = self.query_camids[first + query_of] != self.gallery_camids[items]
        if self.exclude_self:
            keep &= items != first + query_of
        num_matches = np.bincount(query_of[keep], minlength=len(size))
        num_valid = int((self.gallery_pids != -1).sum()) - size + num_matches
        return MatchLists(slice(first, first + len(size)), items[keep], num_matches, num_valid)

    def why_no_match(self) -> str:
        """Why no query has a valid match, and the way out."""
        kept = self.gallery_pids[self.gallery_pids != -1]
        met = np.isin(self.query_pids, kept)
        if len(kept) == 0:
            return "every gallery item has pid −1 (junk)"
        if not met.any():
            some = [", ".join(map(str, np.unique(pids)[:3])) for pids in (self.query_pids, kept)]
            return f"their pids do not meet (queries: {some[0]} …; gallery: {some[1]} …)"
        if self.query_camids is None or self.gallery_camids is None:
            return "every pid has one item only, which exclude_self drops"
        cameras = len(np.union1d(self.query_camids, self.gallery_camids))
        return (
            f"the pids of {int(met.sum())} of {len(met)} queries are in the gallery, but only under the query's own "
            f"camera ({'there is one' if cameras == 1 else f'there are {cameras}'}), and the camera rule drops those. "
            "To switch the rule off pass no camids (command line: --no-camera-rule)"
        )
