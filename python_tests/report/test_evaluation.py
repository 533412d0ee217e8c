"""Verification rates as text and as JSON, also where there is nothing to measure."""

import json
import math
from dataclasses import replace

import numpy as np

from sabmn_ext.report.evaluation import counterfactual_report, verification_report
from sabmn_ext.retrieval import evaluate_retrieval
from sabmn_ext.retrieval.statistics import QueryScores, bootstrap_difference
from sabmn_ext.retrieval.verification import VerificationPairs

PEOPLE = [1, 1, 2, 2]


def report(pairs: VerificationPairs | None) -> tuple[dict | None, str]:
    result = evaluate_retrieval(np.eye(4), np.eye(4), PEOPLE, PEOPLE)
    report, text = verification_report(replace(result, pairs=pairs))
    return json.loads(json.dumps(report, allow_nan=False)), text


def test_rates_and_thresholds() -> None:
    pairs = VerificationPairs(
        positives=np.array([1.0, 2.0, 4.0, 16.0, 26.0]),
        edges=np.array([0.0, 4.0, 9.0, 25.0]),
        counts=np.array([30, 170, 49_800]),
        squared=True,
    )
    found, text = report(pairs)
    assert found is not None
    assert (found["num_positives"], found["num_negatives"]) == (5, 50_000)
    nothing, *measured = found["points"]
    assert nothing == {"requested_fpr": 1e-4, "threshold": None, "fpr": None, "tpr": None}  # 5 pairs stand behind it
    assert [(p["requested_fpr"], p["threshold"], p["fpr"], p["tpr"]) for p in measured] == [
        (1e-3, 2.0, 30 / 50_000, 3 / 5),
        (1e-2, 3.0, 200 / 50_000, 3 / 5),
        (1e-1, 3.0, 200 / 50_000, 3 / 5),
    ]
    lines = text.splitlines()
    assert "5 pairs of one person, 50,000 of two" in lines[0]
    assert lines[2].split(maxsplit=1) == ["0.01", "not measurable: too few pairs of two people"]
    assert lines[3].split() == ["0.1", "60.00", "0.0600", "2"]


def test_a_collapsed_model_accepts_nothing() -> None:
    edges = np.array([-math.inf, 0.0])
    found, text = report(VerificationPairs(np.zeros(3), edges, np.array([1000]), squared=True))
    assert found is not None
    assert found["points"][3] == {"requested_fpr": 0.1, "threshold": None, "fpr": 0.0, "tpr": 0.0}
    assert "-inf" in text


def test_without_pairs() -> None:
    assert report(None) == (None, "no verification pairs")


def test_the_drop_without_each_part(seed: int) -> None:
    rng, pids = np.random.default_rng(seed), np.repeat(np.arange(8), 3)
    features = pids[:, None] + rng.normal(size=(24, 2))
    results = {
        name: evaluate_retrieval(x, x, pids, pids, exclude_self=True)
        for name, x in {"trained": features, "uniform": -features, "shuffled": rng.normal(size=(24, 2))}.items()
    }
    found, text = counterfactual_report(results, 0.9)
    assert found is not None
    json.dumps(found, allow_nan=False)
    assert list(found) == ["confidence", "num_identities", "uniform", "shuffled"]
    assert (found["confidence"], found["num_identities"]) == (0.9, 8)
    for name, title in (("uniform", "attention rows uniform"), ("shuffled", "attention rows shuffled")):
        pair = QueryScores.of(results["trained"]), QueryScores.of(results[name])
        for figure, x in bootstrap_difference(*pair, confidence=0.9).items():
            expected = {"value": pair[1].means()[figure], "drop": x.value, "low": x.low, "high": x.high}
            assert found[name][figure] == expected
        (line,) = [line for line in text.splitlines() if line.startswith(title)]
        assert f"{100 * results[name].map:8.2f}" in line
        assert f"{100 * (results['trained'].map - results[name].map):+8.2f}" in line
    assert found["uniform"]["map"]["drop"] == 0  # mirrored features have the same distances
    assert found["shuffled"]["map"]["drop"] > 0.1
    assert counterfactual_report({"trained": results["trained"]}, 0.9) == (None, "")
    one = evaluate_retrieval(np.eye(4), np.eye(4), [1] * 4, [1, 2, 3, 4])
    assert counterfactual_report({"trained": one, "uniform": one}, 0.9) == (None, "")
