"""Evaluation against a brute force written from the rules, as loops over Python lists."""

import doctest
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from sabmn_ext.ops import dispatch
from sabmn_ext.retrieval import RetrievalResult, evaluate_distances, evaluate_retrieval, labels
from sabmn_ext.retrieval.result import chance_ap


@dataclass
class Case:
    """Plain lists: features, pids, cameras (None: none) of both sides."""

    query: list[list[float]]
    gallery: list[list[float]]
    query_pids: list[int]
    gallery_pids: list[int]
    query_camids: list[int] | None
    gallery_camids: list[int] | None
    exclude_self: bool = False

    def labels(self) -> tuple[Any, ...]:
        return self.query_pids, self.gallery_pids, self.query_camids, self.gallery_camids


def distance(a: list[float], b: list[float], metric: str) -> float:
    if metric == "euclidean":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / (math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b)))


def brute_force(distances: list[list[float]], case: Case) -> dict[str, Any]:
    """The rules: junk and the query's own camera leave the gallery; then walk down the sorted list."""
    aps, trapezoids, inps, first_ranks = [], [], [], []
    for q, row in enumerate(distances):
        kept = []
        for g, value in enumerate(row):
            same_pid = case.gallery_pids[g] == case.query_pids[q]
            same_camera = case.query_camids is not None and case.gallery_camids[g] == case.query_camids[q]
            if case.gallery_pids[g] == -1 or (same_pid and same_camera) or (case.exclude_self and g == q):
                continue
            kept.append((value, g, same_pid))
        kept.sort(key=lambda item: item[:2])
        found, ap, trapezoid = 0, Fraction(0), Fraction(0)
        first = last = 0
        for rank, (_, _, match) in enumerate(kept, start=1):
            if match:
                before = Fraction(found, rank - 1) if rank > 1 else Fraction(1)
                found += 1
                ap += Fraction(found, rank)
                trapezoid += (before + Fraction(found, rank)) / 2
                first, last = first or rank, rank
        aps.append(ap / found if found else None)
        trapezoids.append(trapezoid / found if found else None)
        inps.append(Fraction(found, last) if found else None)
        first_ranks.append(first)
    valid = [q for q, first in enumerate(first_ranks) if first]

    def mean(values: list[Fraction | None]) -> float:
        return float(sum(values[q] for q in valid) / len(valid))

    return {
        "ap": [math.nan if ap is None else float(ap) for ap in aps],
        "first_match_rank": first_ranks,
        "map": mean(aps),
        "map_trapezoid": mean(trapezoids),
        "minp": mean(inps),
        "cmc": [sum(first_ranks[q] <= k for q in valid) / len(valid) for k in range(1, 51)],
        "invalid_queries": [q for q, first in enumerate(first_ranks) if not first],
    }


def assert_equal(result: RetrievalResult, expected: dict[str, Any]) -> None:
    np.testing.assert_array_equal(result.first_match_rank, expected["first_match_rank"])
    np.testing.assert_allclose(result.ap, expected["ap"], rtol=1e-12, atol=0)
    np.testing.assert_allclose(result.cmc, expected["cmc"], rtol=1e-15)
    for name in ("map", "map_trapezoid", "minp"):
        assert getattr(result, name) == pytest.approx(expected[name], rel=1e-12), name
    assert result.invalid_queries == expected["invalid_queries"]
    assert result.num_valid_queries == result.num_queries - len(expected["invalid_queries"])


def draw(seed: int, *, num_queries: int = 9, num_gallery: int = 60, pids: int = 7, dim: int = 5) -> Case:
    rng = random.Random(seed)

    def side(n: int, lowest_pid: int) -> tuple[list[list[float]], list[int], list[int]]:
        features = [[float(np.float32(rng.gauss(0, 1))) for _ in range(dim)] for _ in range(n)]
        return features, [rng.randint(lowest_pid, pids) for _ in range(n)], [rng.randint(1, 3) for _ in range(n)]

    query, gallery = side(num_queries, 0), side(num_gallery, -1)  # pid 0 is asked for; −1 is junk
    return Case(query[0], gallery[0], query[1], gallery[1], query[2], gallery[2])


def small_integers(seed: int) -> Case:
    case = draw(seed)
    for side in (case.query, case.gallery):
        side[:] = [[float(round(x)) for x in row] for row in side]
    return case


def signs(seed: int) -> Case:
    case = draw(seed, dim=16)  # every norm is 4: the cosine is exact, and mostly tied
    for side in (case.query, case.gallery):
        side[:] = [[math.copysign(1.0, x) for x in row] for row in side]
    return case


def collapsed(seed: int) -> Case:
    case = draw(seed)
    for side in (case.query, case.gallery):
        side[:] = [[0.1, 0.7, 0.3, 0.1, 0.9] for _ in side]
    return case


def duplicates(seed: int) -> Case:
    case = draw(seed)
    rng = random.Random(seed)
    for g in range(0, len(case.gallery), 2):
        case.gallery[g] = list(case.gallery[rng.randrange(len(case.gallery))])
    for q in range(0, len(case.query), 2):
        case.query[q] = list(case.gallery[rng.randrange(len(case.gallery))])
    return case


def single_match(seed: int) -> Case:
    case = draw(seed, num_gallery=40)
    case.gallery_pids = random.Random(seed).sample(range(100, 140), 40)
    case.query_pids = [case.gallery_pids[q * 3] for q in range(len(case.query))]
    case.query_camids = [9] * len(case.query)
    return case


def tiny_gallery(seed: int) -> Case:
    case = draw(seed, num_gallery=2, num_queries=3)
    case.query_pids, case.gallery_pids = [1, 2, 0], [1, 2] if seed % 2 else [1, 1]
    case.query_camids = [9, 9, 9]
    return case


def no_cameras(seed: int) -> Case:
    case = draw(seed)
    case.query_camids = case.gallery_camids = None
    return case


def leave_one_out(seed: int, cameras: bool = False) -> Case:
    case = draw(seed, num_gallery=40, pids=12)
    camids = case.gallery_camids if cameras else None
    return Case(case.gallery, case.gallery, case.gallery_pids, case.gallery_pids, camids, camids, exclude_self=True)


def leave_one_out_with_cameras(seed: int) -> Case:
    return leave_one_out(seed, cameras=True)


def negative_cameras(seed: int) -> Case:
    case = draw(seed)
    shift: Callable[[list[int]], list[int]] = lambda camids: [c - 2 for c in camids]  # noqa: E731
    case.query_camids, case.gallery_camids = shift(case.query_camids or []), shift(case.gallery_camids or [])
    return case


def market_like(seed: int) -> Case:
    """Market-1501's test labels, one identity in twenty: its shares of true, distractor and junk images, six cameras of
    unequal use, 17.5 gallery images an identity, one query for each camera that saw it."""
    rng = random.Random(seed)
    identities = 750 // 20
    labels_of: dict[str, list[tuple[int, int]]] = {"query": [], "gallery": []}
    weights = [3, 2, 4, 1, 2, 3]
    for pid in rng.sample(range(1, 1502), identities):
        count = max(2, round(rng.expovariate(1 / 17.5)))
        cameras = [rng.choices(range(1, 7), weights)[0] for _ in range(count)]
        labels_of["gallery"] += [(pid, camera) for camera in cameras]
        labels_of["query"] += [(pid, camera) for camera in sorted(set(cameras))]
    true = len(labels_of["gallery"])
    labels_of["gallery"] += [(0, rng.randint(1, 6)) for _ in range(true * 2798 // 13115)]
    labels_of["gallery"] += [(-1, rng.randint(1, 6)) for _ in range(true * 3819 // 13115)]
    rng.shuffle(labels_of["gallery"])
    centres: dict[int, list[float]] = {}

    def features(side: str) -> list[list[float]]:
        rows = []
        for pid, camera in labels_of[side]:
            centre = centres.setdefault(pid, [rng.gauss(0, 1) for _ in range(4)])
            noise = 2.0 if pid in (0, -1) else 0.9
            rows.append([float(np.float32(c + rng.gauss(0, noise) + camera / 9)) for c in centre])
        return rows

    (query_pids, query_camids), (gallery_pids, gallery_camids) = (
        map(list, zip(*labels_of[side], strict=True)) for side in ("query", "gallery")
    )
    return Case(features("query"), features("gallery"), query_pids, gallery_pids, query_camids, gallery_camids)


CASES = [draw, signs, collapsed, duplicates, single_match, tiny_gallery, no_cameras, leave_one_out]
CASES += [leave_one_out_with_cameras, negative_cameras]


EXACT_CASES = [(make, metric) for make in CASES for metric in ("euclidean", "cosine")]
EXACT_CASES += [(small_integers, "euclidean")]  # whose cosines tie in exact arithmetic only


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("make", "metric"), EXACT_CASES)
def test_features_against_the_brute_force(make: Callable[[int], Case], metric: str, number: int, seed: int) -> None:
    case = make(100 * seed + number)
    for dtype in (np.float32, np.float64):
        query, gallery = np.array(case.query, dtype), np.array(case.gallery, dtype)
        expected = brute_force([[distance(q, g, metric) for g in gallery.tolist()] for q in query.tolist()], case)
        result = evaluate_retrieval(query, gallery, *case.labels(), metric=metric, exclude_self=case.exclude_self)
        assert_equal(result, expected)
        assert (result.num_queries, result.num_gallery) == (len(case.query), len(case.gallery))
        assert result.num_junk == case.gallery_pids.count(-1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int32"])
@pytest.mark.parametrize("blocks", [None, 1, 4])
@pytest.mark.parametrize("make", [*CASES, small_integers])
def test_distances_against_the_brute_force(
    make: Callable[[int], Case], blocks: int | None, dtype: str, seed: int
) -> None:
    case = make(100 * seed + 11)
    exact = torch.tensor([[distance(q, g, "euclidean") for g in case.gallery] for q in case.query])
    rows = (4 * exact).to(getattr(torch, dtype))  # coarse: many ties
    expected = brute_force(rows.double().tolist(), case)
    given: Any = rows if blocks is None else (part for part in rows.split(blocks))
    assert_equal(evaluate_distances(given, *case.labels(), exclude_self=case.exclude_self), expected)


@pytest.mark.parametrize("number", range(2))
def test_market_like_labels_against_the_brute_force(number: int, seed: int) -> None:
    case = market_like(100 * seed + number)
    rows = [[distance(q, g, "euclidean") for g in case.gallery] for q in case.query]
    expected = brute_force(rows, case)
    assert 0.05 < expected["map"] < 0.95
    assert_equal(evaluate_retrieval(np.array(case.query), np.array(case.gallery), *case.labels()), expected)
    rounded = [[round(x, 1) for x in row] for row in rows]
    assert_equal(evaluate_distances(np.array(rounded), *case.labels()), brute_force(rounded, case))


def test_both_backends_any_input_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = duplicates(5)
    query, gallery = torch.tensor(case.query), torch.tensor(case.gallery)
    expected = evaluate_retrieval(query, gallery, *case.labels()).to_dict()
    with dispatch.record() as calls:
        assert evaluate_retrieval(query, gallery, *case.labels(), backend="torch").to_dict() == expected
    assert {backend for _, backend in calls} == {"torch"}
    as_tensors = [torch.tensor(column, dtype=torch.int16) for column in case.labels()]
    wide = torch.zeros(5, 200)
    wide[:, ::2][:, : len(gallery)] = gallery.T
    strided = wide[:, ::2][:, : len(gallery)].T
    backwards = np.array(case.query, np.float32)[::-1].copy()[::-1]  # a negative stride
    swapped = gallery.numpy().astype(">f4")
    frozen = query.numpy().copy()
    frozen.flags.writeable = False
    grad = query.clone().requires_grad_()
    for q, g in ((query, strided), (backwards, gallery), (query, swapped), (frozen, gallery), (grad, gallery.numpy())):
        assert evaluate_retrieval(q, g, *as_tensors).to_dict() == expected
    half = evaluate_retrieval(query.half(), gallery.half(), *case.labels()).to_dict()
    assert half == evaluate_retrieval(query.half().double(), gallery.half().double(), *case.labels()).to_dict()
    monkeypatch.setattr(labels, "_BLOCK_MATCHES", 3)  # many blocks of queries
    assert evaluate_retrieval(query, gallery, *case.labels()).to_dict() == expected


def test_examples_of_the_docstrings() -> None:
    module = sys.modules[evaluate_retrieval.__module__]
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=3)


def test_counts_labels_and_curve() -> None:
    gallery = np.array([[0.0], [1.0], [2.0], [3.0], [4.0]])
    result = evaluate_retrieval(
        np.array([[0.0], [0.0], [9.0]]), gallery, [1, -1, 0], [-1, 0, 1, 1, -1], [1, 1, 1], [2, 2, 2, 2, 2], max_rank=8
    )
    # Query 0 keeps gallery 1, 2, 3, with matches at ranks 2 and 3; query 1 has pid −1, no match; pid 0 is a person.
    assert result.ap[0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert result.ap_trapezoid[0] == pytest.approx(((0 / 1 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)
    assert result.inp[0] == pytest.approx(2 / 3)
    assert math.isnan(result.ap[1])
    assert result.ap[2] == pytest.approx(1 / 3)
    assert result.invalid_queries == [1]
    assert result.first_match_rank.tolist() == [2, 0, 3]
    assert result.cmc.tolist() == [0, 0.5, 1, 1, 1, 1, 1, 1]  # flat beyond the gallery
    assert result.rank(1000) == 1
    keys = "map map_trapezoid minp rank1 rank5 rank10 chance_map num_queries num_valid_queries num_gallery"
    assert list(json.loads(json.dumps(result.to_dict()))) == keys.split()
    assert (result.num_queries, result.num_valid_queries, result.num_gallery, result.num_junk) == (3, 2, 5, 2)
    for text in (
        "mAP (trapezoid)",
        "chance",
        f"{100 * result.map:.2f}",
        f"{100 * result.chance_map:.2f}",
        "camera rule on",
    ):
        assert text in result.table()


@pytest.mark.parametrize(("matches", "items"), [(1, 1), (1, 7), (3, 10), (10, 10), (2, 300), (40, 120)])
def test_chance_level_by_simulation(matches: int, items: int) -> None:
    rng = np.random.default_rng(matches * 1000 + items)
    trials = 4000
    ranks = np.sort(np.argsort(rng.random((trials, items)), axis=1)[:, :matches], axis=1) + 1
    ap = (np.arange(1, matches + 1) / ranks).mean(axis=1)
    expected = float(chance_ap(np.array([matches]), np.array([items]))[0])
    assert abs(ap.mean() - expected) <= 5 * ap.std() / math.sqrt(trials) + 1e-12


def test_chance_level_of_a_result() -> None:
    case = draw(3, num_queries=30)
    shuffled = [random.Random(seed) for seed in range(300)]
    values, level = [], 0.0
    for rng in shuffled:
        noise = np.array([[rng.random() for _ in case.gallery] for _ in case.query])
        result = evaluate_distances(noise, *case.labels())
        values.append(result.map)
        level = result.chance_map
    assert abs(np.mean(values) - level) <= 5 * np.std(values) / math.sqrt(len(values))


FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3) + 1


def evaluate(**changes: Any) -> RetrievalResult:
    arguments: dict[str, Any] = {
        "query_features": FEATURES,
        "gallery_features": FEATURES,
        "query_pids": [1, 2, 1, 2],
        "gallery_pids": [1, 2, 1, 2],
        "query_camids": [1, 1, 2, 2],
        "gallery_camids": [1, 1, 2, 2],
    }
    return evaluate_retrieval(**(arguments | changes))


def with_value(row: int, value: float) -> np.ndarray:
    features = FEATURES.astype(np.float64)
    features[row] = value
    return features


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query_features": FEATURES[:0], "query_pids": [], "query_camids": []}, ValueError, "no queries"),
        ({"gallery_features": FEATURES[:0], "gallery_pids": [], "gallery_camids": []}, ValueError, "no gallery items"),
        ({"query_pids": [1, 2, 1]}, ValueError, r"query_pids has shape \[3\]; expected \[4\], one for each query item"),
        ({"gallery_camids": [[1, 1, 2, 2]]}, ValueError, r"gallery_camids has shape \[1, 4\]"),
        ({"gallery_camids": None}, ValueError, "one of query_camids and gallery_camids is missing"),
        ({"query_features": FEATURES[:, :2]}, ValueError, r"one D ≥ 1, but are \[4, 2\] and \[4, 3\]"),
        ({"query_features": FEATURES[0]}, ValueError, r"query_features has shape \[3\]; expected two dimensions"),
        ({"query_features": FEATURES.astype(np.float64)}, TypeError, "one dtype and device"),
        ({"query_features": FEATURES.astype(np.int64)}, TypeError, "query_features: expected .* not dtype torch.int64"),
        ({"query_features": FEATURES.astype(complex)}, TypeError, "not dtype complex128"),
        ({"query_features": FEATURES.tolist()}, TypeError, "not a list"),
        ({"query_pids": [1.0, 2.0, 1.0, 2.0]}, TypeError, "query_pids must be integers, but has dtype float64"),
        ({"query_pids": ["1", "2", "1", "2"]}, TypeError, "query_pids must be integers"),
        ({"metric": "manhattan"}, ValueError, "'manhattan' is unknown; expected one of euclidean, cosine"),
        ({"max_rank": 0}, ValueError, "max_rank is 0"),
        ({"exclude_self": True, "gallery_pids": [1, 1, 2, 2]}, ValueError, "exclude_self"),
        ({"backend": "cuda"}, RuntimeError, "cuda"),
        (
            {"query_features": with_value(2, math.nan), "gallery_features": with_value(0, 1)},
            ValueError,
            "query_features row 2 holds NaN or infinite values",
        ),
        (
            {
                "query_features": with_value(0, 1),
                "gallery_features": with_value(3, -math.inf),
                "gallery_names": ["a.jpg", "b.jpg", "c.jpg", "d.jpg"],
            },
            ValueError,
            r"gallery_features row 3 \(d.jpg\) holds NaN or infinite",
        ),
        (
            {"query_features": with_value(1, 1e200), "gallery_features": with_value(0, 1)},
            ValueError,
            "query_features row 1 holds values too large",
        ),
        (
            {"query_features": with_value(0, 1), "gallery_features": with_value(1, 0.0), "metric": "cosine"},
            ValueError,
            "gallery_features row 1 is zero",
        ),
        (
            {"query_camids": [1] * 4, "gallery_camids": [1] * 4},
            ValueError,
            r"4 of 4 queries are .* only under the query's own camera \(there is one\).*--no-camera-rule",
        ),
        ({"query_pids": [5, 6, 7, 8]}, ValueError, r"pids do not meet \(queries: 5, 6, 7 …; gallery: 1, 2 …\)"),
        ({"gallery_pids": [-1] * 4}, ValueError, "every gallery item has pid −1"),
        (
            {
                "query_pids": [1, 2, 3, 4],
                "gallery_pids": [1, 2, 3, 4],
                "query_camids": None,
                "gallery_camids": None,
                "exclude_self": True,
            },
            ValueError,
            "every pid has one item only",
        ),
    ],
)
def test_bad_input_gets_a_clear_error(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    assert evaluate().num_valid_queries == 4
    with pytest.raises(error, match=message):
        evaluate(**changes)


def test_bad_distances_get_a_clear_error() -> None:
    pids = [1, 2, 1]
    good = np.arange(9.0).reshape(3, 3)
    assert evaluate_distances(good, pids, pids).num_valid_queries == 3
    bad = good.copy()
    bad[2, 1] = math.nan
    with pytest.raises(ValueError, match="NaN at row 2, column 1"):
        evaluate_distances([bad[:1], bad[1:]], pids, pids)
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_distances(good[:, :2], pids, pids)
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_distances([good, good], pids, pids)
    with pytest.raises(ValueError, match="have 2 rows, but there are 3 queries"):
        evaluate_distances(good[:2], pids, pids)
    with pytest.raises(ValueError, match="two dimensions"):
        evaluate_distances(iter(good), pids, pids)
    with pytest.raises(TypeError, match="bool"):
        evaluate_distances(good > 3, pids, pids)
    infinite = np.array([[math.inf, 0, math.inf]] * 3)
    assert evaluate_distances(infinite, pids, pids).ap.tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1, 7 / 12])
