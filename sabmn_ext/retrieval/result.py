"""The figures of an evaluation, all from the ranks of the true matches."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


def chance_ap(num_matches: np.ndarray, num_valid: np.ndarray) -> np.ndarray:
    """The expected AP of a random ranking: (H_n + (P − 1)/(n − 1) · (n − H_n)) / n for P matches among n items.

    With x_r = 1 where rank r holds a match, AP = 1/P · Σ_r x_r (x_1 + … + x_r)/r. E[x_r] = P/n and, for s < r,
    E[x_s x_r] = P(P − 1)/(n(n − 1)), so E[AP] = 1/n · Σ_r (1 + (r − 1)(P − 1)/(n − 1))/r; H_n is the sum of 1/r.
    """
    harmonic = np.cumsum(1 / np.arange(1, max(1, int(num_valid.max(initial=1))) + 1))[num_valid - 1]
    return (harmonic + (num_matches - 1) / np.maximum(num_valid - 1, 1) * (num_valid - harmonic)) / num_valid


@dataclass(frozen=True)
class QueryFigures:
    """One value for each query; NaN (``first_match_rank``: 0) where there is no valid match."""

    ap: np.ndarray  # mean over the matches of (matches so far) / rank
    ap_trapezoid: np.ndarray  # mean over the matches of the mean of the precision at the match and just before it
    inp: np.ndarray  # matches / rank of the last one
    chance_ap: np.ndarray  # expected ap of a random ranking
    first_match_rank: np.ndarray  # int64
    num_matches: np.ndarray  # int64
    num_valid: np.ndarray  # int64, gallery items that stay for this query

    @classmethod
    def from_ranks(cls, ranks: np.ndarray, num_matches: np.ndarray, num_valid: np.ndarray) -> "QueryFigures":
        """From the ascending ranks [M] of all queries' matches, one query after the other."""
        has_match = num_matches > 0
        count, total = num_matches[has_match], num_valid[has_match]
        ends = np.cumsum(count)
        query_of = np.repeat(np.arange(len(count)), count)
        position = np.arange(1, len(ranks) + 1) - (ends - count)[query_of]
        precision = position / ranks
        # Just before rank r there are r − 1 items; at rank 1 there are none, and the precision is taken as 1.
        before = np.where(ranks == 1, 1.0, (position - 1) / np.maximum(ranks - 1, 1))

        def mean(values: np.ndarray) -> np.ndarray:
            return np.bincount(query_of, weights=values, minlength=len(count)) / count

        def spread(values: np.ndarray, missing: float) -> np.ndarray:
            out = np.full(len(num_matches), missing, dtype=np.result_type(values, type(missing)))
            out[has_match] = values
            return out

        return cls(
            ap=spread(mean(precision), math.nan),
            ap_trapezoid=spread(mean((precision + before) / 2), math.nan),
            inp=spread(count / ranks[ends - 1], math.nan),
            chance_ap=spread(chance_ap(count, total), math.nan),
            first_match_rank=spread(ranks[ends - count], 0),
            num_matches=num_matches,
            num_valid=num_valid,
        )


@dataclass(frozen=True)
class RetrievalResult:
    """What an evaluation found. All figures are fractions, and means over the queries with a valid match.

    >>> result = evaluate_retrieval(query, gallery, query_pids, gallery_pids, query_camids, gallery_camids)
    >>> print(result.table())
    >>> result.map, result.rank(1), result.invalid_queries
    """

    queries: QueryFigures
    metric: str  # "euclidean", "cosine" or "given"
    camera_rule: bool
    num_gallery: int  # as handed in, junk included
    num_junk: int  # gallery items with pid −1
    max_rank: int

    def _mean(self, values: np.ndarray) -> float:
        # fsum is correctly rounded: no dependence on the order or the machine.
        return math.fsum(values[self.queries.num_matches > 0]) / self.num_valid_queries

    @property
    def ap(self) -> np.ndarray:
        """[Q] average precision; NaN where a query has no valid match."""
        return self.queries.ap

    @property
    def first_match_rank(self) -> np.ndarray:
        """[Q] int64, from 1; 0 where a query has no valid match."""
        return self.queries.first_match_rank

    @property
    def map(self) -> float:
        """Mean of the non-interpolated AP."""
        return self._mean(self.queries.ap)

    @property
    def map_trapezoid(self) -> float:
        """Mean of the original benchmark's trapezoid AP (lower; here too over the queries with a match)."""
        return self._mean(self.queries.ap_trapezoid)

    @property
    def minp(self) -> float:
        """Mean of (number of matches) / (rank of the last one)."""
        return self._mean(self.queries.inp)

    @property
    def chance_map(self) -> float:
        """What ``map`` is on average for random rankings of the same galleries."""
        return self._mean(self.queries.chance_ap)

    @property
    def cmc(self) -> np.ndarray:
        """[max_rank] the fraction of queries with a match within the first 1, 2, … ranks."""
        return np.array([self.rank(k) for k in range(1, self.max_rank + 1)])

    def rank(self, k: int) -> float:
        """CMC at k, for any k ≥ 1."""
        if k < 1:
            raise ValueError(f"rank({k}): ranks start at 1")
        first = self.queries.first_match_rank
        return int(((first > 0) & (first <= k)).sum()) / self.num_valid_queries

    @property
    def num_queries(self) -> int:
        """All queries, also those without a valid match."""
        return len(self.queries.num_matches)

    @property
    def num_valid_queries(self) -> int:
        """Queries with a valid match: the denominator of every mean."""
        return int((self.queries.num_matches > 0).sum())

    @property
    def invalid_queries(self) -> list[int]:
        """The indices of the queries without a valid match."""
        return [int(q) for q in (self.queries.num_matches == 0).nonzero()[0]]

    def to_dict(self) -> dict[str, Any]:
        """The main figures, ready for JSON; fractions."""
        names = ("map", "map_trapezoid", "minp")
        counts = ("chance_map", "num_queries", "num_valid_queries", "num_gallery")
        ranks = {f"rank{k}": self.rank(k) for k in (1, 5, 10)}
        return {n: getattr(self, n) for n in names} | ranks | {n: getattr(self, n) for n in counts}

    def table(self) -> str:
        """A readable table, in percent."""
        head = f"{'':8}{'mAP':>8}{'mAP trapezoid':>15}{'mINP':>8}{'rank-1':>8}{'rank-5':>8}{'rank-10':>9}"
        row = [self.map, self.map_trapezoid, self.minp, *(self.rank(k) for k in (1, 5, 10))]
        cells = "".join(f"{100 * x:{w}.2f}" for x, w in zip(row, (8, 15, 8, 8, 8, 9), strict=True))
        rule = f"camera rule {'on' if self.camera_rule else 'off'}"
        without = self.num_queries - self.num_valid_queries
        return "\n".join(
            [
                f"{self.num_queries:,} queries ({without:,} without a valid match, left out of the means), "
                f"{self.num_gallery:,} gallery images ({self.num_junk:,} junk)",
                f"distance: {self.metric}, {rule}; percent",
                head,
                f"{'result':8}{cells}",
                f"{'chance':8}{100 * self.chance_map:8.2f}",
            ]
        )
