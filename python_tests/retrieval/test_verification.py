"""Verification and camera pairs, against plain loops over all pairs; memory, and features in a file."""

import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sabmn_ext.retrieval import RetrievalResult, evaluate_distances, evaluate_retrieval
from sabmn_ext.retrieval.verification import VerificationPairs


def draw(seed: int, *, cameras: bool = True, dim: int = 4) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    pids = rng.integers(-1, 9, 40), rng.integers(-1, 9, 230)
    people = rng.normal(size=(10, dim))
    query, gallery = (people[p] + 0.7 * rng.normal(size=(len(p), dim)) for p in pids)
    camids = (rng.integers(-1, 3, 40), rng.integers(-1, 3, 230)) if cameras else (None, None)
    return {
        "query_features": query,
        "gallery_features": gallery,
        "query_pids": pids[0],
        "gallery_pids": pids[1],
        "query_camids": camids[0],
        "gallery_camids": camids[1],
    }


def distances_of(case: dict[str, Any], metric: str) -> np.ndarray:
    query, gallery = case["query_features"], case["gallery_features"]
    if metric == "cosine":
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (query, gallery)]
        return 1 - unit[0] @ unit[1].T
    return np.sqrt(((query[:, None] - gallery[None]) ** 2).sum(axis=2))


def pools(case: dict[str, Any], distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distances of all positive and of all negative pairs."""
    positives: list[float] = []
    negatives: list[float] = []
    for q, pid in enumerate(case["query_pids"]):
        for g, other in enumerate(case["gallery_pids"]):
            cross = case["query_camids"] is None or case["query_camids"][q] != case["gallery_camids"][g]
            if pid != -1 and other != -1 and cross:
                (positives if pid == other else negatives).append(distances[q, g])
    return np.array(positives), np.array(negatives)


@pytest.mark.parametrize("cameras", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "given", "negated"])
def test_rates_and_thresholds_are_exact(metric: str, cameras: bool, seed: int) -> None:
    case = draw(seed, cameras=cameras)
    distances = distances_of(case, "cosine" if metric == "cosine" else "euclidean")
    if metric in ("euclidean", "cosine"):
        result = evaluate_retrieval(**case, metric=metric)
    else:
        distances = distances if metric == "given" else distances - 4
        result = evaluate_distances(distances, *list(case.values())[2:])
    positives, negatives = pools(case, distances)
    assert result.pairs.num_positives == len(positives) == result.num_matches.sum()
    assert result.pairs.num_negatives == len(negatives)
    thresholds, fpr, tpr = result.pairs.curve()
    for threshold, false, true in zip(thresholds, fpr, tpr, strict=True):
        assert false == (negatives <= threshold).mean()
        assert true == (positives <= threshold).mean()
    assert (fpr[0], fpr[-1]) == (0, 1)
    for rate in (0.01, 0.03, 0.1, 0.5, 1.0):
        point = result.verification(rate)
        assert point.measurable
        assert point.fpr == (negatives <= point.threshold).mean() <= rate
        assert point.tpr == (positives <= point.threshold).mean()
        # No threshold that is a tenth of a percent higher would do: a bin is at most that wide.
        higher = point.threshold + 1e-3 * max(abs(point.threshold), 1e-3)
        assert rate == 1 or (negatives <= higher).mean() > rate or point.threshold < negatives.min()


def test_a_rate_with_too_few_negatives_is_not_measurable() -> None:
    pairs = VerificationPairs(np.array([0.5, 2.0]), np.array([1.0, 2.0, 4.0]), np.array([40, 60]), squared=True)
    assert pairs.num_negatives == 100
    low, enough = pairs.at(0.0999), pairs.at(0.4)
    assert not low.measurable
    assert all(math.isnan(x) for x in (low.threshold, low.fpr, low.tpr))
    assert (enough.measurable, enough.threshold, enough.fpr, enough.tpr) == (True, math.sqrt(2), 0.4, 1.0)
    assert (pairs.at(0.39).threshold, pairs.at(0.39).fpr, pairs.at(0.39).tpr) == (1.0, 0.0, 0.5)
    for rate in (0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="expected a rate above 0 and up to 1"):
            pairs.at(rate)


def test_no_negatives_at_all() -> None:
    result = evaluate_retrieval(np.eye(2), np.eye(2), [1, 1], [1, 1])
    assert result.pairs.num_negatives == 0
    assert not result.verification(1.0).measurable


def camera_pairs(case: dict[str, Any], distances: np.ndarray) -> dict[tuple[int, int], tuple[int, float, float]]:
    found: dict[tuple[int, int], list[tuple[Fraction, bool]]] = {}
    for q, pid in enumerate(case["query_pids"]):
        for wanted in np.unique(case["gallery_camids"]).tolist():
            kept = []
            for g, other in enumerate(case["gallery_pids"]):
                match, camera = other == pid, case["gallery_camids"][g]
                if other == -1 or (match and (camera == case["query_camids"][q] or camera != wanted)):
                    continue
                kept.append((distances[q, g], g, match))
            hits = [match for _, _, match in sorted(kept)]
            ranks = [rank for rank, match in enumerate(hits, start=1) if match]
            if pid != -1 and ranks:
                ap = sum(Fraction(i, rank) for i, rank in enumerate(ranks, start=1)) / len(ranks)
                found.setdefault((int(case["query_camids"][q]), wanted), []).append((ap, hits[0]))
    return {
        pair: (
            len(values),
            float(sum(ap for ap, _ in values) / len(values)),
            sum(hit for _, hit in values) / len(values),
        )
        for pair, values in found.items()
    }


def test_camera_pairs(seed: int) -> None:
    case = draw(seed)
    expected = camera_pairs(case, distances_of(case, "euclidean"))
    result = evaluate_retrieval(**case)
    ours = {(p.query_camid, p.gallery_camid): (p.num_queries, p.map, p.rank1) for p in result.camera_pairs()}
    assert ours.keys() == expected.keys()
    for pair, values in expected.items():
        assert ours[pair] == pytest.approx(values, rel=1e-12), pair
    assert evaluate_retrieval(**draw(seed, cameras=False)).camera_pairs() == []


def test_ranks_of_all_matches(seed: int) -> None:
    case = draw(seed)
    result = evaluate_retrieval(**case)
    query_of = np.repeat(np.arange(40), result.num_matches)
    for q in np.flatnonzero(result.num_matches):
        ranks = result.ranks[query_of == q]
        assert (np.diff(ranks) > 0).all()
        assert ranks[0] == result.first_match_rank[q]
        assert np.mean(np.arange(1, len(ranks) + 1) / ranks) == pytest.approx(result.ap[q], rel=1e-12)
        positives = result.pairs.positives[query_of == q]
        assert (np.diff(positives) >= 0).all()
    np.testing.assert_array_equal(result.query_pids, case["query_pids"])


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<f8"])
def test_memory_mapped_features(dtype: str, tmp_path: Path, seed: int) -> None:
    case = draw(seed)
    for name in ("query_features", "gallery_features"):
        np.save(tmp_path / name, case[name].astype(dtype))
    in_memory = case | {name: np.load(tmp_path / f"{name}.npy") for name in ("query_features", "gallery_features")}
    mapped = case | {name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in in_memory if "features" in name}
    expected: RetrievalResult = evaluate_retrieval(**in_memory)
    np.testing.assert_array_equal(evaluate_retrieval(**mapped).ap, expected.ap)


MEMORY = """
import resource, sys
import numpy as np
import torch
from sabmn_ext.retrieval import evaluate_retrieval
torch.set_num_threads(2)
rows = int(sys.argv[2])
gallery = np.memmap(sys.argv[1], np.float16, "r", shape=(rows, 512))
query = np.array(gallery[:1500]) + np.float16(0.25)
pids = np.arange(rows, dtype=np.int64) % 5000
evaluate_retrieval(query[:50], gallery[:2000], pids[:50], pids[:2000])  # the libraries' own memory
def anonymous():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024
import threading, time
peak, running = [anonymous()], True
def watch():
    while running:
        peak.append(anonymous())
        time.sleep(0.001)
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
evaluate_retrieval(query, gallery, pids[:1500], pids)
running = False; thread.join()
print(max(peak) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_beyond_the_features(tmp_path: Path) -> None:
    """200 MB of features in a file; float64 or centred copies of them would not fit."""
    rows = 200_000
    file = tmp_path / "features"
    values = torch.randn(1000, 512, generator=torch.Generator().manual_seed(0)).half().numpy()
    with file.open("wb") as out:
        for _ in range(rows // 1000):
            out.write(values.tobytes())
    done = subprocess.run([sys.executable, "-c", MEMORY, file, str(rows)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 64
