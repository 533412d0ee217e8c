"""Bootstrap intervals: they cover known truths as often as they say, and resampling anything else does not."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sabmn_ext.retrieval import evaluate_retrieval, statistics
from sabmn_ext.retrieval.statistics import FIGURES, Interval, QueryScores, bootstrap, bootstrap_difference

# What the simulated identities' figures are in truth: with u uniform in 0 … 1 an identity has 1 + 7u queries on average
# and a score of 0.2 + 0.6u, so the mean over queries is E[(1 + 7u)(0.2 + 0.6u)] / E[1 + 7u] = 2.6 / 4.5.
TRUTH = {"map": 2.6 / 4.5, "map_trapezoid": 2.6 / 4.5 - 0.1, "minp": 1.3 / 4.5, "rank1": 2.6 / 4.5}
TRIALS, IDENTITIES, REPLICATES = 400, 100, 1000
# Percentile limits are a little narrow, so 94.5 % of the 400, 378, are expected, with a standard deviation of 4.6.
ENOUGH, TOO_MANY = 350, 398


def simulate(rng: np.random.Generator, spread: float = 0.0) -> QueryScores:
    """Identities that are hard or easy; the easy ones have more queries. ``spread``: a run's own luck by identity."""
    u = rng.random(IDENTITIES)
    return score_identities(rng, u, 1 + 7 * (rng.random(IDENTITIES) < u), rng.random(IDENTITIES), spread)


def score_identities(
    rng: np.random.Generator, u: np.ndarray, sizes: np.ndarray, luck: np.ndarray, spread: float
) -> QueryScores:
    score = 0.2 + 0.6 * u + spread * rng.uniform(-1, 1, len(u))
    identity = np.repeat(np.arange(len(u)), sizes)
    ap = score[identity] + rng.uniform(-0.1, 0.1, len(identity))
    first = np.where(luck < score, 1, 3)[identity]  # all queries of an identity alike
    return QueryScores(identity + 5, np.full(len(identity), 4), first, ap, ap - 0.1, ap / 2)


def by_query(scores: QueryScores) -> QueryScores:
    """The same, each query an identity of its own: what resampling queries amounts to."""
    return QueryScores(np.arange(len(scores.pids)), *list(vars(scores).values())[1:])


def one_query_each(scores: QueryScores) -> QueryScores:
    """One query an identity: what averaging over identities amounts to."""
    first = np.unique(scores.pids, return_index=True)[1]
    return QueryScores(*(column[first] for column in vars(scores).values()))


@pytest.mark.parametrize("resample", ["identities", "queries", "one query an identity"])
def test_coverage(resample: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    covered = dict.fromkeys(FIGURES, 0)
    alter = {"identities": lambda x: x, "queries": by_query, "one query an identity": one_query_each}[resample]
    trials = TRIALS if resample == "identities" else TRIALS // 4
    for trial in range(trials):
        intervals = bootstrap(alter(simulate(rng)), replicates=REPLICATES, seed=trial)
        for name in FIGURES:
            covered[name] += TRUTH[name] in intervals[name]
    for name, count in covered.items():
        right = ENOUGH <= count * TRIALS // trials < TOO_MANY
        assert right == (resample == "identities"), f"{name}: {count} of {trials}"


def paired(rng: np.random.Generator) -> tuple[QueryScores, QueryScores]:
    """Two runs on the same queries, with the same true scores."""
    u, luck = rng.random(IDENTITIES), rng.random(IDENTITIES)
    sizes = 1 + 7 * (rng.random(IDENTITIES) < u)
    one, two = (score_identities(rng, u, sizes, luck, spread=0.1) for _ in range(2))
    return one, two


def test_coverage_of_a_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    covered = dict.fromkeys(FIGURES, 0)
    unpaired = 0
    for trial in range(TRIALS):
        one, two = paired(rng)
        for name, interval in bootstrap_difference(one, two, replicates=REPLICATES, seed=trial).items():
            covered[name] += 0 in interval
        means = [bootstrap(x, replicates=REPLICATES, seed=trial + k)["map"] for k, x in enumerate((one, two))]
        half = math.hypot(*(x.high - x.low for x in means)) / 2  # as if the two runs had different identities
        unpaired += abs(means[0].value - means[1].value) <= half
    assert all(ENOUGH <= covered[name] < TOO_MANY for name in ("map", "map_trapezoid", "minp")), covered
    assert covered["rank1"] >= 0.83 * TRIALS, covered  # a dozen identities differ in rank-1 at all: coarse steps
    assert unpaired >= TOO_MANY


def test_limits_of_three_identities() -> None:
    """Of the 27 drawings each identity has one to itself, and 1/27 > 2.5 %: the limits are the best and the worst."""
    scores = QueryScores(
        np.array([7, 7, 8, 9, 9, 9, 4]),
        np.array([1, 2, 3, 4, 5, 6, 0]),
        np.array([1, 1, 2, 1, 5, 9, 0]),
        np.array([0.5, 0.7, 0.1, 0.2, 0.4, 0.6, math.nan]),
        np.array([0.4, 0.6, 0.0, 0.1, 0.3, 0.5, math.nan]),
        np.array([0.3, 0.5, 0.1, 0.2, 0.2, 0.2, math.nan]),
    )
    assert scores.num_identities == 3
    intervals = bootstrap(scores)
    expected = {
        "map": (2.5 / 6, 0.1, 0.6),
        "map_trapezoid": (1.9 / 6, 0.0, 0.5),
        "minp": (0.25, 0.1, 0.4),
        "rank1": (0.5, 0.0, 1.0),
    }
    for name, three in expected.items():
        assert (intervals[name].value, intervals[name].low, intervals[name].high) == pytest.approx(three), name


def test_the_width_is_that_of_the_linearised_error(seed: int) -> None:
    scores = simulate(np.random.default_rng(seed))
    residual = np.bincount(scores.pids - 5, weights=scores.ap - scores.ap.mean())
    error = math.sqrt((residual**2).sum()) / len(scores.ap)
    for confidence, z in ((0.95, 1.960), (0.8, 1.2816), (0.5, 0.6745)):
        interval = bootstrap(scores, confidence=confidence)["map"]
        assert interval.high - interval.low == pytest.approx(2 * z * error, rel=0.08)


def test_one_seed_one_interval(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    scores = simulate(np.random.default_rng(seed))
    intervals = bootstrap(scores, seed=3)
    assert bootstrap(scores, seed=3) == intervals
    assert bootstrap(scores, seed=4) != intervals
    order = np.random.default_rng(seed).permutation(len(scores.pids))
    shuffled = bootstrap(QueryScores(*(column[order] for column in vars(scores).values())), seed=3)
    monkeypatch.setattr(statistics, "_BLOCK_ELEMENTS", 700)
    in_blocks = bootstrap(scores, seed=3)
    for name, x in intervals.items():
        for other in (shuffled[name], in_blocks[name]):
            assert (other.value, other.low, other.high) == pytest.approx((x.value, x.low, x.high), rel=1e-12)


def test_a_constant_difference_has_no_width(seed: int) -> None:
    one = simulate(np.random.default_rng(seed))
    two = QueryScores(*list(vars(one).values())[:3], one.ap - 0.03, one.ap_trapezoid, one.inp * 2)
    differences = bootstrap_difference(one, two)
    x = differences["map"]
    assert (x.value, x.low, x.high) == pytest.approx((0.03, 0.03, 0.03))
    assert 0 not in x
    assert 0 in differences["rank1"]
    assert differences["map_trapezoid"] == Interval(0, 0, 0)
    assert differences["minp"].high < 0


def test_a_result_and_its_json(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query_pids, gallery_pids = np.repeat(np.arange(6), 3), rng.integers(-1, 5, 60)  # nobody has pid 5
    query, gallery = (pids[:, None] + rng.standard_normal((len(pids), 2)) for pids in (query_pids, gallery_pids))
    result = evaluate_retrieval(query, gallery, query_pids, gallery_pids)
    scores = QueryScores.of(result)
    assert scores.means() == {
        "map": result.map,
        "map_trapezoid": result.map_trapezoid,
        "minp": result.minp,
        "rank1": result.rank(1),
    }
    assert scores.num_identities == 5
    valid = query_pids != 5
    without = evaluate_retrieval(query[valid], gallery, query_pids[valid], gallery_pids)
    assert bootstrap(QueryScores.of(without)) == bootstrap(scores)
    assert bootstrap(scores)["map"].value == result.map

    read = QueryScores.from_dict(json.loads(json.dumps(scores.to_dict(), allow_nan=False)))
    for name, column in vars(scores).items():
        np.testing.assert_array_equal(getattr(read, name), column)
    zero = bootstrap_difference(scores, read)
    assert set(zero.values()) == {Interval(0, 0, 0)}


SCORES = simulate(np.random.default_rng(0))


def changed(**columns: Any) -> QueryScores:
    return QueryScores(**(vars(SCORES) | columns))


def test_results_that_cannot_be_compared() -> None:
    pids, matches = SCORES.pids.copy(), SCORES.num_matches.copy()
    pids[2], matches[4] = 99999, 0
    cases = [
        (QueryScores(*(column[:-1] for column in vars(SCORES).values())), r"have \d+ and \d+ queries"),
        (changed(pids=pids), r"query 2 has the pid \d+ in one and 99999 in the other \(1 of \d+ .* query order"),
        (changed(pids=SCORES.pids[::-1]), "expected the same query order"),
        (changed(num_matches=matches), "query 4 has the number of true matches 4 in one and 0 .* camera rule"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError, match=message):
            bootstrap_difference(SCORES, other)


def test_bad_settings_and_too_few_identities() -> None:
    for settings, message in (
        ({"confidence": 0.0}, "confidence is 0.0"),
        ({"confidence": 95}, "confidence is 95; expected a share between 0 and 1, such as 0.95"),
        ({"confidence": math.nan}, "confidence is nan"),
        ({"replicates": 0}, "replicates is 0"),
        ({"replicates": 10.0}, "replicates is 10.0"),
    ):
        with pytest.raises(ValueError, match=message):
            bootstrap(SCORES, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"1 identity has a query with a valid match; .* needs two or more"):
        bootstrap(changed(pids=np.full_like(SCORES.pids, 7)))
    with pytest.raises(ValueError, match="0 identities have"):
        bootstrap(changed(num_matches=np.zeros_like(SCORES.num_matches)))


def test_damaged_columns() -> None:
    columns = SCORES.to_dict()
    for change, message in (
        ({"ap": None}, "there is no list 'ap'"),
        ({"pids": columns["pids"][:-1]}, r"the list 'num_matches' has \d+ values for \d+ pids"),
        ({"inp": columns["inp"][1:]}, "the list 'inp' has"),
        ({"ap": ["x", *columns["ap"][1:]]}, "the list 'ap' holds something else than numbers"),
        ({"num_matches": [None, *columns["num_matches"][1:]]}, "the list 'num_matches' holds something else"),
        ({"ap": [[0.5], *columns["ap"][1:]]}, "the list 'ap' holds something else"),
        ({"pids": [2**70, *columns["pids"][1:]]}, "the list 'pids' holds something else"),
        ({"ap": [None, *columns["ap"][1:]]}, "a query with matches has no score"),
    ):
        with pytest.raises(ValueError, match=message):
            QueryScores.from_dict(columns | change)


def test_the_example_of_the_docs() -> None:
    docs = Path(__file__).resolve().parent.parent.parent / "docs" / "evaluation.md"
    _, code = re.findall(r"```python\n(.*?)```", docs.read_text(), re.DOTALL)
    pids = [1, 1, 2, 2]
    results = [evaluate_retrieval(x, x, pids, pids, exclude_self=True) for x in (np.eye(4), np.diag([1.0, 2, 3, 4]))]
    exec(compile(code, str(docs), "exec"), {"result_one": results[0], "result_two": results[1]})
