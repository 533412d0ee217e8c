"""Verification: are these two images the same person? Accepted pairs are those with distance ≤ threshold.

Positives are the queries' true matches, negatives the pairs of different people (under different cameras where the
camera rule is on); pid −1 is dropped on either side. The positives' distances are kept, the negatives counted in bins.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class VerificationPoint:
    """One point of the curve. Where it is not measurable, ``threshold``, ``fpr`` and ``tpr`` are NaN."""

    requested_fpr: float
    threshold: float  # accept a pair if its distance (Euclidean, 1 − cos, or as given) is at most this
    fpr: float  # the share of the negatives that are accepted, exact; at most requested_fpr
    tpr: float  # the share of the positives that are accepted, exact
    num_negatives: int

    @property
    def measurable(self) -> bool:
        """Whether at least 10 accepted negatives stand behind the requested rate."""
        return not math.isnan(self.fpr)


@dataclass(frozen=True)
class VerificationPairs:
    """All positives, and a histogram of all negatives, in the distances that are ranked (Euclidean: squared).

    Bin k, of those that are not empty, holds the negatives with edges[k] < distance ≤ edges[k + 1].
    """

    positives: np.ndarray  # [M] float64, one query after the other, in the order of their ranks
    edges: np.ndarray  # [bins + 1] float64, ascending: the bins' lower edges, and the last one's upper edge
    counts: np.ndarray  # [bins] int64
    squared: bool  # the distances are squared

    @property
    def num_negatives(self) -> int:
        return int(self.counts.sum())

    @property
    def num_positives(self) -> int:
        return len(self.positives)

    def curve(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(thresholds, fpr, tpr), [bins + 1] each, ascending: the exact rates at every edge."""
        accepted = np.concatenate(([0], np.cumsum(self.counts)))
        positives = np.searchsorted(np.sort(self.positives), self.edges, side="right")
        tpr = positives / max(self.num_positives, 1)
        return self._distance(self.edges), accepted / max(self.num_negatives, 1), tpr

    def at(self, fpr: float) -> VerificationPoint:
        """The highest edge whose false-positive rate is at most ``fpr``; not measurable below 10 / num_negatives."""
        if not 0 < fpr <= 1:
            raise ValueError(f"fpr is {fpr!r}; expected a rate above 0 and up to 1")
        negatives = self.num_negatives
        if fpr * negatives < 10 or self.num_positives == 0:
            return VerificationPoint(fpr, math.nan, math.nan, math.nan, negatives)
        accepted = np.concatenate(([0], np.cumsum(self.counts)))
        edge = int(np.searchsorted(accepted / negatives, fpr, side="right")) - 1
        tpr = int((self.positives <= self.edges[edge]).sum()) / self.num_positives
        threshold = float(self._distance(self.edges[edge]))
        return VerificationPoint(fpr, threshold, int(accepted[edge]) / negatives, tpr, negatives)

    def _distance(self, edges: np.ndarray) -> np.ndarray:
        # Below 0 stands −infinity alone: the edge that accepts nothing.
        return np.where(edges < 0, edges, np.sqrt(np.maximum(edges, 0))) if self.squared else edges
