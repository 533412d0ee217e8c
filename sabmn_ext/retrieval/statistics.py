"""Confidence intervals of retrieval figures, and of the difference between two runs: a bootstrap over identities.

A figure is a mean over the queries with a valid match. The queries of one identity are alike (Market-1501 has 4.5 of
them an identity), so identities are drawn with replacement, each with all its queries, and the mean is taken over the
queries drawn (a cluster bootstrap with percentile limits: Davison and Hinkley, Bootstrap Methods and their Application,
1997, sections 3.8 and 5.3). It covers the choice of the test identities, and not the noise of training.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from sabmn_ext.retrieval.result import RetrievalResult

FIGURES = ("map", "map_trapezoid", "minp", "rank1")
_BLOCK_ELEMENTS = 1 << 18  # draws of an identity at a time: a few MB


@dataclass(frozen=True)
class QueryScores:
    """What a result found for each query: all that its figures and their intervals come from.

    >>> scores = QueryScores.of(result)
    >>> bootstrap(scores)["map"]
    Interval(value=0.8039918, low=0.7890312, high=0.8182743)
    """

    pids: np.ndarray  # [Q] int64
    num_matches: np.ndarray  # [Q] int64; 0: no valid match, and no part in the means
    first_match_rank: np.ndarray  # [Q] int64, from 1; 0 where there is no match
    ap: np.ndarray  # [Q] float64; NaN where there is no match, as in the other two
    ap_trapezoid: np.ndarray  # [Q]
    inp: np.ndarray  # [Q]

    @staticmethod
    def of(result: RetrievalResult) -> "QueryScores":
        names = ("query_pids", "num_matches", "first_match_rank", "ap", "ap_trapezoid", "inp")
        return QueryScores(*(getattr(result, name) for name in names))

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists for JSON, NaN as None."""
        columns = {name: column.tolist() for name, column in vars(self).items()}
        return {name: [None if x != x else x for x in column] for name, column in columns.items()}

    @staticmethod
    def from_dict(columns: dict[str, list[Any]]) -> "QueryScores":
        """The reverse of ``to_dict``; a ValueError names a column that is missing, of another length or no numbers."""
        arrays = {}
        for name in QueryScores.__dataclass_fields__:
            if not isinstance(columns.get(name), list):
                raise ValueError(f"there is no list {name!r}")
            dtype = np.float64 if name in ("ap", "ap_trapezoid", "inp") else np.int64
            try:
                arrays[name] = np.array(columns[name], dtype=dtype)
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"the list {name!r} holds something else than numbers") from None
            if arrays[name].shape != arrays["pids"].shape:
                raise ValueError(f"the list {name!r} has {len(columns[name])} values for {len(columns['pids'])} pids")
        scores = QueryScores(**arrays)
        if np.isnan(scores.figures()[scores.valid]).any():
            raise ValueError("a query with matches has no score")
        return scores

    @property
    def valid(self) -> np.ndarray:
        """[Q] bool: the queries with a valid match."""
        return self.num_matches > 0

    def figures(self) -> np.ndarray:
        """[Q, 4] what the ``FIGURES`` are means of; without meaning where a query is not valid."""
        return np.stack([self.ap, self.ap_trapezoid, self.inp, self.first_match_rank == 1], axis=1)

    def means(self) -> dict[str, float]:
        """The ``FIGURES``, by the correctly rounded sum of ``RetrievalResult``."""
        valid = self.figures()[self.valid]
        return {name: math.fsum(column) / len(valid) for name, column in zip(FIGURES, valid.T, strict=True)}

    @property
    def num_identities(self) -> int:
        """Identities with a valid query: what is resampled."""
        return len(np.unique(self.pids[self.valid]))


@dataclass(frozen=True)
class Interval:
    """A figure, or the difference of two, as a fraction, and its confidence limits."""

    value: float
    low: float
    high: float

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high


def bootstrap(
    scores: QueryScores, *, confidence: float = 0.95, replicates: int = 10_000, seed: int = 0
) -> dict[str, Interval]:
    """Intervals of mAP, trapezoid mAP, mINP and rank-1 (``FIGURES``), from resampled query identities.

    Args:
        scores: the result.
        confidence: the share of test samples whose interval is to hold the true value.
        replicates: resamplings.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: fewer than two identities have a query with a valid match; settings out of range.
    """
    replicated = _resampled_means(_identity_sums(scores), replicates, seed)
    return _intervals(scores.means(), replicated, confidence)


def bootstrap_difference(
    scores: QueryScores,
    other: QueryScores,
    *,
    confidence: float = 0.95,
    replicates: int = 10_000,
    seed: int = 0,
) -> dict[str, Interval]:
    """Intervals of the differences ``scores`` − ``other``; each resampling draws the same identities for both.

    Paired, it is much narrower than the two intervals of the runs suggest: what makes an identity hard is hard for
    both. The arguments are those of ``bootstrap``.

    Raises:
        ValueError: as there; the two are not results of the same queries in the same order on the same gallery.
    """
    _check_same_queries(scores, other)
    one, two = (_resampled_means(_identity_sums(each), replicates, seed) for each in (scores, other))
    here, there = scores.means(), other.means()
    return _intervals({name: here[name] - there[name] for name in FIGURES}, one - two, confidence)


def _check_same_queries(scores: QueryScores, other: QueryScores) -> None:
    if len(scores.pids) != len(other.pids):
        raise ValueError(f"the results have {len(scores.pids)} and {len(other.pids)} queries; expected the same ones")
    for name, what in (("pids", "pid"), ("num_matches", "number of true matches")):
        one, two = getattr(scores, name), getattr(other, name)
        if len(different := (one != two).nonzero()[0]):
            q = int(different[0])
            hint = "query order" if name == "pids" else "gallery and camera rule"
            raise ValueError(
                f"the results are not comparable: query {q} has the {what} {one[q]} in one and {two[q]} in the other "
                f"({len(different)} of {len(one)} queries differ); expected the same {hint}"
            )


def _identity_sums(scores: QueryScores) -> np.ndarray:
    """[I, 5] each identity's sums of the figures over its valid queries, and their number."""
    valid = scores.valid
    identities, identity_of = np.unique(scores.pids[valid], return_inverse=True)
    if len(identities) < 2:
        who = "1 identity has" if len(identities) else "0 identities have"
        raise ValueError(f"{who} a query with a valid match; resampling identities needs two or more")
    columns = np.column_stack([scores.figures()[valid], np.ones(int(valid.sum()))])
    return np.stack([np.bincount(identity_of, weights=column) for column in columns.T], axis=1)


def _resampled_means(sums: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """[R, 4] the figures of each resampling: Σ w_i s_i / Σ w_i n_i, w_i: how often identity i is drawn."""
    if not isinstance(replicates, int) or replicates < 1:
        raise ValueError(f"replicates is {replicates!r}; expected an integer of at least 1")
    size = len(sums)
    rng = np.random.default_rng(seed)
    means = np.empty((replicates, sums.shape[1] - 1))
    rows = max(1, _BLOCK_ELEMENTS // size)
    for first in range(0, replicates, rows):
        few = min(rows, replicates - first)
        drawn = rng.integers(size, size=(few, size)) + size * np.arange(few)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=few * size).reshape(few, size)  # [few, I]
        totals = weights.astype(np.float64) @ sums  # [few, 5]
        means[first : first + few] = totals[:, :-1] / totals[:, -1:]
    return means


def _intervals(values: dict[str, float], replicated: np.ndarray, confidence: float) -> dict[str, Interval]:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; expected a share between 0 and 1, such as 0.95")
    tail = (1 - confidence) / 2
    limits = np.quantile(replicated, (tail, 1 - tail), axis=0)  # [2, 4]
    return {name: Interval(values[name], *pair) for name, pair in zip(FIGURES, limits.T.tolist(), strict=True)}
