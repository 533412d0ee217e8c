"""Who counts as a match: the camera rule, junk and leave-one-out, from the labels alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from sabmn_ext.retrieval.shards import Alone

# A block of queries ends where it would have more true matches than this; bounds the memory (some 100 bytes each).
_BLOCK_MATCHES = 1 << 18


@dataclass(frozen=True)
class MatchLists:
    """The true matches of consecutive queries."""

    queries: slice
    indices: np.ndarray  # [M] items of this part of the gallery, one query after the other, ascending for each
    num_matches: np.ndarray  # [queries]
    num_valid: np.ndarray  # [queries] gallery items that stay


@dataclass(frozen=True)
class Labels:
    """The labels of the queries and of a part of the gallery, int64.

    For a query the gallery drops the items with its pid and its camera, and those with pid −1; all else stays. pid 0 is
    a pid like any other. A query with pid −1 has no match, since every gallery item with its pid is dropped.
    """

    query_pids: np.ndarray  # [Q]
    gallery_pids: np.ndarray  # [G]
    query_camids: np.ndarray | None  # [Q]; None: the camera rule is off
    gallery_camids: np.ndarray | None  # [G]
    exclude_self: bool  # query i is gallery item i, and is dropped for itself
    first: int = 0  # the part's first item in the whole gallery

    def __post_init__(self) -> None:
        if (self.query_camids is None) != (self.gallery_camids is None):
            raise ValueError(
                "one of query_camids and gallery_camids is missing; give both, or neither (no camera rule)"
            )
        own = self.query_pids[self.first : self.first + len(self.gallery_pids)]
        if self.exclude_self and not np.array_equal(own, self.gallery_pids):
            raise ValueError("exclude_self: query i must be gallery item i, but query_pids and gallery_pids differ")

    @cached_property
    def pid_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """int32 numbers in place of the pids of both sides: −1 stays, −2 is whoever is not asked for."""
        return _codes(self.query_pids, self.gallery_pids, keep=-1)

    @cached_property
    def camera_codes(self) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """int32 numbers in place of the cameras of both sides."""
        if self.query_camids is None or self.gallery_camids is None:
            return None, None
        return _codes(self.query_camids, self.gallery_camids, keep=None)

    @cached_property
    def num_kept(self) -> int:
        """The gallery items that are not junk."""
        return int((self.gallery_pids != -1).sum())

    @cached_property
    def _by_pid(self) -> tuple[np.ndarray, np.ndarray]:
        """The pid codes of the gallery items that are asked for, sorted, and the items, ascending for each pid."""
        codes = self.pid_codes[1]
        items = np.flatnonzero(codes >= 0)
        order = items[np.argsort(codes[items], kind="stable")]
        return codes[order], order

    def group_sizes(self) -> np.ndarray:
        """[Q] how many gallery items have the query's pid."""
        codes, by_pid = self.pid_codes[0], self._by_pid[0]
        size = np.searchsorted(by_pid, codes, side="right") - np.searchsorted(by_pid, codes, side="left")
        return np.where(codes == -1, 0, size)

    def match_lists(self, queries: slice) -> MatchLists:
        """The true matches of these queries."""
        codes, (by_pid, by_pid_items) = self.pid_codes[0][queries], self._by_pid
        group = np.searchsorted(by_pid, codes, side="left")
        size = np.where(codes == -1, 0, np.searchsorted(by_pid, codes, side="right") - group)
        query_of = np.repeat(np.arange(len(size)), size)
        # Item j of a query's pid stands at group + j; j counts from 0 for every query.
        j = np.arange(len(query_of)) - (np.cumsum(size) - size)[query_of]
        items = by_pid_items[group[query_of] + j]
        keep = np.ones(len(items), dtype=bool)
        if self.query_camids is not None and self.gallery_camids is not None:
            keep &= self.query_camids[queries][query_of] != self.gallery_camids[items]
        if self.exclude_self:
            keep &= self.first + items != queries.start + query_of
        num_matches = np.bincount(query_of[keep], minlength=len(size))
        return MatchLists(queries, items[keep], num_matches, self.num_kept - size + num_matches)

    def why_no_match(self, exchange: Alone) -> str:
        """Why no query has a valid match in any part of the gallery, and the way out."""
        kept = self.gallery_pids[self.gallery_pids != -1]
        pids = np.unique(np.concatenate(exchange.gather(np.unique(kept)[:3])))
        met = exchange.add(np.isin(self.query_pids, kept).astype(np.int64)) > 0
        if len(pids) == 0:
            return "every gallery item has pid −1 (junk)"
        if not met.any():
            some = [", ".join(map(str, np.unique(x)[:3])) for x in (self.query_pids, pids)]
            return f"their pids do not meet (queries: {some[0]} …; gallery: {some[1]} …)"
        if self.query_camids is None or self.gallery_camids is None:
            return "every pid has one item only, which exclude_self drops"
        cameras = len(np.unique(np.concatenate((self.query_camids, *exchange.gather(np.unique(self.gallery_camids))))))
        return (
            f"the pids of {int(met.sum())} of {len(met)} queries are in the gallery, but only under the query's own "
            f"camera ({'there is one' if cameras == 1 else f'there are {cameras}'}), and the camera rule drops those. "
            "To switch the rule off pass no camids (command line: --no-camera-rule)"
        )


def query_blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Blocks of consecutive queries with at most ``_BLOCK_MATCHES`` items of their pids, or one query."""
    ends, start = np.cumsum(sizes), 0
    while start < len(sizes):
        stop = int(np.searchsorted(ends, ends[start] - sizes[start] + _BLOCK_MATCHES, side="right"))
        yield slice(start, start := max(start + 1, stop))


def _codes(query: np.ndarray, gallery: np.ndarray, keep: int | None) -> tuple[np.ndarray, np.ndarray]:
    values = np.unique(query)

    def code(labels: np.ndarray) -> np.ndarray:
        position = np.minimum(np.searchsorted(values, labels), len(values) - 1)
        codes = np.where(values[position] == labels, position, -2).astype(np.int32)
        if keep is not None:
            codes[labels == keep] = keep
        return codes

    return code(query), code(gallery)
