"""Intervals, differences and verification rates of a retrieval: what is printed (in percent) and stands in the JSON."""

import math
from typing import Any

from sabmn_ext.retrieval.counterfactuals import TRAINED
from sabmn_ext.retrieval.files import StoredResult
from sabmn_ext.retrieval.result import RetrievalResult
from sabmn_ext.retrieval.statistics import QueryScores, bootstrap, bootstrap_difference

TITLES = {"map": "mAP", "map_trapezoid": "mAP (trapezoid)", "minp": "mINP", "rank1": "rank-1"}
FALSE_POSITIVE_RATES = (1e-4, 1e-3, 1e-2, 1e-1)
COUNTERFACTUAL_TITLES = {
    "gamma_zero": "attention off (gamma = 0)",
    "uniform": "attention rows uniform",
    "shuffled": "attention rows shuffled",
    "folded": "spectral norm folded",
}


def interval_report(scores: QueryScores, confidence: float) -> tuple[dict[str, Any] | None, str]:
    """The limits of each figure, for the JSON and as text; None where one identity alone was asked for."""
    count = scores.num_identities
    if count < 2:
        return None, "no intervals: they come from resampling identities, and one alone has a valid match"
    intervals = bootstrap(scores, confidence=confidence)
    lines = [f"{100 * confidence:g} % intervals, from resampling the {count:,} query identities"]
    for name, x in intervals.items():
        lines.append(f"{TITLES[name]:16}{100 * x.value:8.2f}   {100 * x.low:6.2f} … {100 * x.high:6.2f}")
    limits = {name: [x.low, x.high] for name, x in intervals.items()}
    return {"confidence": confidence, "num_identities": count, **limits}, "\n".join(lines)


def difference_report(result: RetrievalResult, other: StoredResult, confidence: float) -> tuple[dict[str, Any], str]:
    """The differences ``result`` − ``other`` with their limits, for the JSON and as text.

    Raises:
        ValueError: the two are not results of the same queries and gallery (names the file).
    """
    pair = QueryScores.of(result), other.scores
    try:
        if (num_kept := result.num_gallery - result.num_junk) != other.num_kept:
            raise ValueError(f"without junk the galleries have {num_kept} and {other.num_kept} items")
        differences = bootstrap_difference(*pair, confidence=confidence)
    except ValueError as error:
        raise ValueError(f"cannot compare with {other.file}: {error}") from None
    count = pair[0].num_identities
    lines = [
        f"difference to {other.file}, {100 * confidence:g} % intervals, from resampling the {count:,} query identities",
        f"{'':16}{'this':>8}{'other':>8}{'difference':>12}",
    ]
    figures: dict[str, Any] = {}
    means = [each.means() for each in pair]
    for name, x in differences.items():
        this, that = (each[name] for each in means)
        verdict = "0 lies within" if 0 in x else "0 lies outside"
        limits = f"{100 * x.low:+6.2f} … {100 * x.high:+6.2f}   {verdict}"
        lines.append(f"{TITLES[name]:16}{100 * this:8.2f}{100 * that:8.2f}{100 * x.value:+12.2f}   {limits}")
        figures[name] = {"other": that, "difference": x.value, "low": x.low, "high": x.high, "zero_within": 0 in x}
    lines.append("This covers the sample of test identities, not the noise of training: that takes several seeds.")
    return {"file": str(other.file), "confidence": confidence, "num_identities": count, **figures}, "\n".join(lines)


def counterfactual_report(results: dict[str, RetrievalResult], confidence: float) -> tuple[dict[str, Any] | None, str]:
    """How far the figures drop without each part (trained − counterfactual), paired, for the JSON and as text.

    Args:
        results: of "trained" and of each counterfactual, on the same queries and gallery; with "trained" alone, or
            where one identity alone was asked for, there is nothing to report.
    """
    trained = QueryScores.of(results[TRAINED])
    count = trained.num_identities
    if len(results) < 2 or count < 2:
        return None, ""
    lines = [
        f"counterfactuals: the drop without each part, {100 * confidence:g} % intervals, paired, from resampling the "
        f"{count:,} query identities",
        f"{'':28}{'mAP':>8}{'drop in mAP':>14}{'':24}{'drop in rank-1':>17}",
    ]
    report: dict[str, Any] = {"confidence": confidence, "num_identities": count}
    for name, result in results.items():
        if name == TRAINED:
            continue
        scores = QueryScores.of(result)
        means = scores.means()
        differences = bootstrap_difference(trained, scores, confidence=confidence)
        report[name] = {
            figure: {"value": means[figure], "drop": x.value, "low": x.low, "high": x.high}
            for figure, x in differences.items()
        }
        cells = [
            f"{100 * x.value:+8.2f}  ({100 * x.low:+6.2f} … {100 * x.high:+6.2f})"
            for x in (differences["map"], differences["rank1"])
        ]
        lines.append(f"{COUNTERFACTUAL_TITLES[name]:28}{100 * means['map']:8.2f}" + "".join(f"{x:>32}" for x in cells))
    return report, "\n".join(lines)


def verification_report(result: RetrievalResult) -> tuple[dict[str, Any] | None, str]:
    """For each of the ``FALSE_POSITIVE_RATES`` the threshold, the rate it reaches and the true-positive rate."""
    if result.pairs is None:
        return None, "no verification pairs"
    pairs = result.pairs
    lines = [
        f"verification, rates in percent: {pairs.num_positives:,} pairs of one person, {pairs.num_negatives:,} of two",
        f"{'FPR at most':16}{'TPR':>8}{'FPR':>12}{'threshold':>12}",
    ]
    points = []
    for rate in FALSE_POSITIVE_RATES:
        point = result.verification(rate)
        figures = {"requested_fpr": rate, "threshold": point.threshold, "fpr": point.fpr, "tpr": point.tpr}
        points.append({name: x if math.isfinite(x) else None for name, x in figures.items()})
        row = f"{100 * point.tpr:8.2f}{100 * point.fpr:12.4f}{point.threshold:12.5g}"
        lines.append(f"{100 * rate:<16g}{row if point.measurable else '  not measurable: too few pairs of two people'}")
    counts = {"num_positives": pairs.num_positives, "num_negatives": pairs.num_negatives}
    return counts | {"points": points}, "\n".join(lines)
