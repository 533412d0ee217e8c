"""The figures of an evaluation, all from the ranks of the true matches."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sabmn_ext.retrieval.verification import VerificationPairs, VerificationPoint


@dataclass(frozen=True)
class CameraPair:
    """The queries of one camera and their matches under another, the matches under all other cameras left out."""

    query_camid: int
    gallery_camid: int
    num_queries: int  # with a match under that camera; the means are over these
    map: float
    rank1: float


@dataclass(frozen=True)
class RetrievalResult:
    """What an evaluation found; figures are fractions, and means over the queries with a valid match.

    >>> result = evaluate_retrieval(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
    >>> print(result.table())
    >>> result.map, result.rank(1), result.invalid_queries
    """

    # One value for each query; NaN (first_match_rank: 0) where there is no valid match.
    ap: np.ndarray  # [Q] mean over the matches of (matches so far) / rank
    ap_trapezoid: np.ndarray  # [Q] the same with the mean of the precision at the match and just before it
    inp: np.ndarray  # [Q] matches / rank of the last one
    chance_ap: np.ndarray  # [Q] the expected ap of a random ranking
    first_match_rank: np.ndarray  # [Q] int64, from 1
    num_matches: np.ndarray  # [Q] int64
    query_pids: np.ndarray  # [Q] int64
    query_camids: np.ndarray | None  # [Q] int64; None: there are no cameras
    # One value for each true match, in the order of the ranks, one query after the other (num_matches says where).
    ranks: np.ndarray  # [M] int64, from 1
    match_camids: np.ndarray | None  # [M] int64
    pairs: VerificationPairs  # see verification()
    metric: str  # "euclidean", "cosine" or "given"
    camera_rule: bool
    num_gallery: int  # as handed in, junk included
    num_junk: int  # gallery items with pid −1
    max_rank: int

    def _mean(self, values: np.ndarray) -> float:
        # fsum is correctly rounded: no dependence on the order or the machine.
        return math.fsum(values[self.num_matches > 0]) / self.num_valid_queries

    @property
    def map(self) -> float:
        """Mean of the non-interpolated AP."""
        return self._mean(self.ap)

    @property
    def map_trapezoid(self) -> float:
        """Mean of the original benchmark's trapezoid AP: lower, and often mistaken for ``map`` or the reverse."""
        return self._mean(self.ap_trapezoid)

    @property
    def minp(self) -> float:
        """Mean of (number of matches) / (rank of the last one)."""
        return self._mean(self.inp)

    @property
    def chance_map(self) -> float:
        """What ``map`` is on average for random rankings of the same galleries."""
        return self._mean(self.chance_ap)

    @property
    def cmc(self) -> np.ndarray:
        """[max_rank] the fraction of queries with a match within the first 1, 2, … ranks."""
        return np.array([self.rank(k) for k in range(1, self.max_rank + 1)])

    def rank(self, k: int) -> float:
        """CMC at k, for any k ≥ 1."""
        if k < 1:
            raise ValueError(f"rank({k}): ranks start at 1")
        return int(((self.num_matches > 0) & (self.first_match_rank <= k)).sum()) / self.num_valid_queries

    def verification(self, fpr: float) -> VerificationPoint:
        """The threshold that accepts at most the share ``fpr`` of the negative pairs, and what it accepts exactly.

        >>> point = result.verification(1e-3)
        >>> point.measurable, point.threshold, point.fpr, point.tpr
        """
        return self.pairs.at(fpr)

    def camera_pairs(self) -> list[CameraPair]:
        """mAP and rank-1 between each two cameras, as the Market-1501 paper tabulates them; empty without cameras.

        A query's matches under the other cameras are left out of its ranking; the non-matches of all cameras stay.
        """
        if self.query_camids is None or self.match_camids is None:
            return []
        query_of = np.repeat(np.arange(self.num_queries), self.num_matches)
        first_of_query = (np.cumsum(self.num_matches) - self.num_matches)[query_of]
        nonmatches = self.ranks - 1 - (np.arange(len(query_of)) - first_of_query)  # before each match
        # A group is a query with one camera of its matches; the order within it stays that of the ranks.
        order = np.lexsort((self.match_camids, query_of))
        query_of, camids, nonmatches = query_of[order], self.match_camids[order], nonmatches[order]
        starts = np.flatnonzero(np.append(True, (np.diff(query_of) != 0) | (np.diff(camids) != 0)))
        count = np.diff(starts, append=len(order))
        position = np.arange(1, len(order) + 1) - np.repeat(starts, count)
        ap = np.add.reduceat(position / (position + nonmatches), starts) / count
        first = nonmatches[starts] == 0
        cameras = self.query_camids[query_of[starts]], camids[starts]
        pairs = []
        for query_camid, gallery_camid in np.unique(np.stack(cameras, axis=1), axis=0).tolist():
            of_pair = (cameras[0] == query_camid) & (cameras[1] == gallery_camid)
            n = int(of_pair.sum())
            rank1 = int(first[of_pair].sum()) / n
            pairs.append(CameraPair(query_camid, gallery_camid, n, math.fsum(ap[of_pair]) / n, rank1))
        return pairs

    @property
    def num_queries(self) -> int:
        """All queries, also those without a valid match."""
        return len(self.num_matches)

    @property
    def num_valid_queries(self) -> int:
        """Queries with a valid match: the denominator of every mean."""
        return int((self.num_matches > 0).sum())

    @property
    def invalid_queries(self) -> list[int]:
        """The indices of the queries without a valid match."""
        return (self.num_matches == 0).nonzero()[0].tolist()

    def to_dict(self) -> dict[str, Any]:
        """The main figures, ready for JSON."""
        ranks = {f"rank{k}": self.rank(k) for k in (1, 5, 10)}
        counts = ("num_queries", "num_valid_queries", "num_gallery")
        figures = {"map": self.map, "map_trapezoid": self.map_trapezoid, "minp": self.minp}
        return figures | ranks | {"chance_map": self.chance_map} | {name: getattr(self, name) for name in counts}

    def table(self) -> str:
        """A readable table, in percent."""
        names = ("mAP", "mAP (trapezoid)", "mINP", "rank-1", "rank-5", "rank-10")
        figures = (self.map, self.map_trapezoid, self.minp, self.rank(1), self.rank(5), self.rank(10))
        without = self.num_queries - self.num_valid_queries
        return (
            f"{self.num_queries:,} queries ({without:,} without a valid match, left out of the means), "
            f"{self.num_gallery:,} gallery items ({self.num_junk:,} junk)\n"
            f"distance: {self.metric}, camera rule {'on' if self.camera_rule else 'off'}\n"
            f"{'percent':8}{''.join(f'{name:>{len(name) + 3}}' for name in names)}\n"
            f"{'result':8}{''.join(f'{100 * x:{len(n) + 3}.2f}' for x, n in zip(figures, names, strict=True))}\n"
            f"{'chance':8}{100 * self.chance_map:{len(names[0]) + 3}.2f}"
        )


def chance_ap(num_matches: np.ndarray, num_valid: np.ndarray) -> np.ndarray:
    """The expected AP of a random ranking: (H_n + (P − 1)/(n − 1) · (n − H_n)) / n for P matches among n items.

    With x_r = 1 where rank r holds a match, AP = 1/P · Σ_r x_r (x_1 + … + x_r)/r. E[x_r] = P/n and, for s < r,
    E[x_s x_r] = P(P − 1)/(n(n − 1)), so E[AP] = 1/n · Σ_r (1 + (r − 1)(P − 1)/(n − 1))/r; H_n is the sum of 1/r.
    """
    harmonic = np.cumsum(1 / np.arange(1, int(num_valid.max()) + 1))[num_valid - 1]
    return (harmonic + (num_matches - 1) / np.maximum(num_valid - 1, 1) * (num_valid - harmonic)) / num_valid


def score_ranks(ranks: np.ndarray, num_matches: np.ndarray, num_valid: np.ndarray) -> dict[str, Any]:
    """The per-query fields of ``RetrievalResult``.

    Args:
        ranks: [M] the ascending ranks of each query's matches, one query after the other.
        num_matches, num_valid: [Q] matches, and gallery items that stay, of each query; some query has a match.
    """
    has_match = num_matches > 0
    count = num_matches[has_match]
    ends = np.cumsum(count)
    query_of = np.repeat(np.arange(len(count)), count)
    position = np.arange(1, len(ranks) + 1) - (ends - count)[query_of]
    precision = position / ranks
    # Just before rank r stand r − 1 items; before rank 1 the precision is taken as 1.
    before = np.where(ranks == 1, 1.0, (position - 1) / np.maximum(ranks - 1, 1))

    def each(values: np.ndarray, missing: float = math.nan) -> np.ndarray:
        out = np.full(len(num_matches), missing, dtype=values.dtype)
        out[has_match] = values
        return out

    return {
        "ap": each(np.bincount(query_of, weights=precision) / count),
        "ap_trapezoid": each(np.bincount(query_of, weights=(precision + before) / 2) / count),
        "inp": each(count / ranks[ends - 1]),
        "chance_ap": each(chance_ap(count, num_valid[has_match])),
        "first_match_rank": each(ranks[ends - count], 0),
        "num_matches": num_matches,
        "ranks": ranks,
    }
