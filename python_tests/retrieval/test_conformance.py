"""The conformance suite: the files are what exact arithmetic gives, this evaluator agrees, and wrong ones do not."""

import json
import re
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import conformance_cases
import exact_retrieval
import numpy as np
import pytest

from sabmn_ext.evaluate import main
from sabmn_ext.retrieval import conformance

VECTORS = conformance.load_vectors()
SCORED = [vector for vector in VECTORS if "expected" in vector]
DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "evaluation.md"


def test_the_files_are_what_exact_arithmetic_gives() -> None:
    files = {file.name: file.read_text() for file in conformance.VECTORS.glob("*.json")}
    expected = conformance_cases.files()
    assert files.keys() == expected.keys()
    for name, text in expected.items():
        assert files[name] == text, f"{name}: run python python_tests/conformance_cases.py"


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["name"])
def test_this_evaluator_agrees(vector: dict[str, Any], dtype: type, backend: str | None) -> None:
    assert conformance.compare(vector, conformance.answer(vector, dtype, backend)) == []


def test_features_are_exact_in_float32() -> None:
    for vector in VECTORS:
        for rows in (vector["input"]["query_features"], vector["input"]["gallery_features"]):
            for x in (x for row in rows for x in row if not isinstance(x, str)):
                assert Fraction(float(np.float32(x))) == Fraction(x), vector["name"]


def test_a_vector_by_hand() -> None:
    (vector,) = (vector for vector in VECTORS if vector["name"] == "two_rules_of_ap")
    expected = vector["expected"]
    assert expected["match_ranks"] == [[2, 3, 6]]
    assert expected["ap"][0] == pytest.approx((1 / 2 + 2 / 3 + 3 / 6) / 3)
    assert expected["ap_trapezoid"][0] == pytest.approx(((0 / 1 + 1 / 2) + (1 / 2 + 2 / 3) + (2 / 5 + 3 / 6)) / 6)
    assert (expected["inp"], expected["first_match_rank"]) == ([3 / 6], [2])
    assert expected["over_valid_queries"]["cmc"] == [0, 1, 1, 1, 1]
    (two,) = (vector["expected"] for vector in VECTORS if vector["name"] == "query_without_a_match")
    assert two["over_all_queries"]["map"] == two["over_valid_queries"]["map"] / 2
    assert two["first_match_rank"].count(None) == 2


# ---- evaluators that are wrong in one point each, made of the exact one ----


def keeps(drop: Callable[[dict[str, Any], int, int], bool]) -> dict[str, Any]:
    return {"keeps": lambda case, q, g: not drop(case, q, g)}


def is_junk(case: dict[str, Any], q: int, g: int) -> bool:
    return case["gallery_pids"][g] == -1


def is_self(case: dict[str, Any], q: int, g: int) -> bool:
    return case["exclude_self"] and g == q


def same_camera(case: dict[str, Any], q: int, g: int) -> bool:
    return bool(case["query_camids"]) and case["query_camids"][q] == case["gallery_camids"][g]


def same_pid(case: dict[str, Any], q: int, g: int) -> bool:
    return case["query_pids"][q] == case["gallery_pids"][g]


def twin(case: dict[str, Any], q: int, g: int) -> bool:
    return case["exclude_self"] and case["query_features"][q] == case["gallery_features"][g]


def dropped(case: dict[str, Any], q: int, g: int) -> bool:
    return is_junk(case, q, g) or is_self(case, q, g) or (same_pid(case, q, g) and same_camera(case, q, g))


def sorted_by(key: Callable[[tuple[Fraction, int]], Any]) -> dict[str, Any]:
    right = exact_retrieval.ranking
    return {"ranking": lambda case, q: sorted(right(case, q), key=key)}


def matches(first: bool) -> dict[str, Any]:
    """Ties in favour of the matches, or against them."""
    right = exact_retrieval.ranking

    def ranking(case: dict[str, Any], q: int) -> list[tuple[Fraction, int]]:
        return sorted(right(case, q), key=lambda item: (item[0], same_pid(case, q, item[1]) != first))

    return {"ranking": ranking}


def euclidean(dtype: type, expanded: bool) -> dict[str, Any]:
    """Squared distances in floating point, as Σ (q − g)² or as ‖q‖² + ‖g‖² − 2 q·g."""

    def distance(query: list[Fraction], gallery: list[Fraction]) -> float:
        q, g = (np.array([float(x) for x in row], dtype) for row in (query, gallery))
        with np.errstate(over="ignore"):
            return float((q * q).sum() + (g * g).sum() - 2 * (q * g).sum() if expanded else ((q - g) ** 2).sum())

    return {"DISTANCES": exact_retrieval.DISTANCES | {"euclidean": distance}}


def other_metric() -> dict[str, Any]:
    names = ("euclidean", "cosine")
    return {"DISTANCES": {a: exact_retrieval.DISTANCES[b] for a, b in (names, names[::-1])}}


def trapezoid_from_zero(ranks: list[int]) -> Fraction:
    before = [Fraction(found, max(rank - 1, 1)) for found, rank in enumerate(ranks)]
    at = [Fraction(found, rank) for found, rank in enumerate(ranks, start=1)]
    return sum(map(sum, zip(before, at, strict=True))) / 2 / len(ranks)  # type: ignore[arg-type]


def interpolated(ranks: list[int]) -> Fraction:
    precision = [Fraction(found, rank) for found, rank in enumerate(ranks, start=1)]
    return sum(max(precision[i:]) for i in range(len(ranks))) / len(ranks)


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "junk is kept": (lambda: keeps(lambda *a: dropped(*a) and not is_junk(*a)), "junk"),
    "pid 0 is junk": (lambda: keeps(lambda c, q, g: dropped(c, q, g) or c["gallery_pids"][g] == 0), "distractors"),
    "pid 0 cannot be asked for": (
        lambda: keeps(lambda c, q, g: dropped(c, q, g) or c["query_pids"][q] == 0),
        "pid_zero_is_a_person",
    ),
    "negative pids are junk": (
        lambda: keeps(lambda c, q, g: dropped(c, q, g) or c["gallery_pids"][g] < 0),
        "negative_labels",
    ),
    "no camera rule": (lambda: keeps(lambda *a: is_junk(*a) or is_self(*a)), "same_camera"),
    "the camera rule drops everybody": (lambda: keeps(lambda *a: dropped(*a) or same_camera(*a)), "same_camera"),
    "the query stays in its gallery": (lambda: keeps(lambda *a: dropped(*a) and not is_self(*a)), "leave_one_out"),
    "twins of the query are left out": (lambda: keeps(lambda *a: dropped(*a) or twin(*a)), "leave_one_out"),
    "ties to the higher index": (lambda: sorted_by(lambda item: (item[0], -item[1])), "ties"),
    "ties to the match": (lambda: matches(first=True), "ties"),
    "ties to the non-match": (lambda: matches(first=False), "ties"),
    "expanded float32": (lambda: euclidean(np.float32, expanded=True), "offset_float32"),
    "expanded float64": (lambda: euclidean(np.float64, expanded=True), "offset_float64"),
    "float32 loses a near tie": (lambda: euclidean(np.float32, expanded=False), "near_tie"),
    "float32 underflows": (lambda: euclidean(np.float32, expanded=False), "tiny_scale"),
    "float32 overflows": (lambda: euclidean(np.float32, expanded=False), "huge_scale"),
    "cosine for Euclidean": (other_metric, "metric_euclidean"),
    "Euclidean for cosine": (other_metric, "metric_cosine"),
    "the trapezoid rule as AP": (
        lambda: {"average_precision": exact_retrieval.trapezoid_average_precision},
        "two_rules_of_ap",
    ),
    "interpolated AP": (lambda: {"average_precision": interpolated}, "two_rules_of_ap"),
    "trapezoid from 0": (lambda: {"trapezoid_average_precision": trapezoid_from_zero}, "match_at_rank_1"),
}


def found_out(name: str) -> set[str]:
    """The vectors that a wrong evaluator does not answer as it should."""
    found = set()
    with pytest.MonkeyPatch.context() as patch:
        for target, replacement in WRONG[name][0]().items():
            patch.setattr(exact_retrieval, target, replacement)
        for vector in SCORED:
            try:
                given = {"expected": exact_retrieval.score(vector["input"])[0]}
            except ZeroDivisionError:  # no query is left, or a zero feature has no direction
                given = {"expected_error": {"kind": "no_valid_match"}}
            if conformance.compare(vector, given):
                found.add(vector["name"])
    return found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_evaluator_is_found_out(name: str) -> None:
    assert WRONG[name][1] in found_out(name)


def test_the_flag_covers_what_ties_can_change_and_nothing_else() -> None:
    flagged = {vector["name"] for vector in SCORED if vector["depends_on_ties"]}
    assert found_out("ties to the match") | found_out("ties to the non-match") == flagged
    assert found_out("ties to the higher index") <= flagged


def altered(vector: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"expected": vector["expected"] | changes}


def test_wrong_means_and_curves_are_found_out() -> None:
    by_name = {vector["name"]: vector for vector in SCORED}
    vector = by_name["query_without_a_match"]
    expected = vector["expected"]
    assert conformance.compare(vector, altered(vector)) == []
    assert conformance.compare(vector, altered(vector, over_valid_queries=expected["over_all_queries"]))
    assert "num_valid_queries is 4; expected 2" in conformance.compare(vector, altered(vector, num_valid_queries=4))
    short = by_name["rank_beyond_the_gallery"]
    cmc = {"cmc": short["expected"]["over_valid_queries"]["cmc"][:4]}
    lines = conformance.compare(short, altered(short, over_valid_queries=cmc))
    assert lines == ["over_valid_queries.cmc has length 4; expected 20"]
    close = {"map": expected["over_valid_queries"]["map"] * (1 + 1e-6)}
    (line,) = conformance.compare(vector, altered(vector, over_valid_queries=close))
    assert line.startswith("over_valid_queries.map is ")
    assert conformance.compare(vector, altered(vector, over_valid_queries=close), tolerance=1e-5) == []
    assert conformance.compare(vector, altered(vector, ap=[float("nan")] * 4))
    assert conformance.compare(vector, {"expected": {}})
    assert conformance.compare(vector, {"expected": {"mAP": 0.5}})


def test_errors_that_do_not_come_or_are_others_are_found_out() -> None:
    refused = [vector for vector in VECTORS if "expected_error" in vector]
    assert len(refused) >= 10
    for vector in refused:
        assert conformance.compare(vector, altered(SCORED[0]))
        error = vector["expected_error"]
        assert conformance.compare(vector, {"expected_error": error}) == []
        assert conformance.compare(vector, {"expected_error": error | {"kind": "something"}})
        assert conformance.compare(vector, {"expected_error": error | {"row": 77}})
    assert conformance.compare(SCORED[0], {"expected_error": refused[0]["expected_error"]})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--conformance"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == f"{len(VECTORS)} vectors: {len(VECTORS)} agree, 0 differ"
    assert [line.split() for line in out[:-1]] == [["ok", vector["name"]] for vector in VECTORS]

    vector = json.loads((conformance.VECTORS / "junk.json").read_text())
    (tmp_path / "junk.json").write_text(json.dumps(vector))
    vector["name"], vector["expected"]["ap"][0] = "wrong", 0.123
    (tmp_path / "wrong.json").write_text(json.dumps(vector))
    assert main(["--conformance", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS wrong" in out
    assert re.search(r"float32: ap\[0\] is 0\.\d+; expected 0\.123", out)
    assert out.endswith("2 vectors: 1 agree, 1 differ\n")

    def error_of(text: str) -> str:
        (tmp_path / "wrong.json").write_text(text)
        assert main(["--conformance", str(tmp_path)]) == 2
        return capsys.readouterr().err

    for text in ("", "{", "[]", "{}", '{"name": "x"}', json.dumps(vector)[:-9]):
        assert "wrong.json is not a conformance vector" in error_of(text)
    assert "not a conformance vector of format 1" in error_of(json.dumps(vector | {"format": 2}))
    assert "not a conformance vector of format 1" in error_of(json.dumps(vector | {"expected_error": {}}))
    assert main(["--conformance", "--json", str(tmp_path / "a.json")]) == 2
    assert "--json does not go with --conformance" in capsys.readouterr().err
    assert main(["--conformance", str(tmp_path / "nowhere")]) == 2
    assert "no vectors (*.json) there" in capsys.readouterr().err


def evaluate(
    distances: np.ndarray, query_pids: Any, gallery_pids: Any, query_camids: Any, gallery_camids: Any, max_rank: int
) -> tuple[float, np.ndarray]:
    """A package of somebody else, with an unstable sort's rule for ties and NaN last."""
    aps = []
    for q, row in enumerate(distances):
        keep = (gallery_pids != -1) & ((gallery_pids != query_pids[q]) | (gallery_camids != query_camids[q]))
        order = np.lexsort((-np.arange(len(row)), row))
        order = order[keep[order]]
        if (hits := np.flatnonzero(gallery_pids[order] == query_pids[q])).size:
            aps.append((np.arange(1, len(hits) + 1) / (hits + 1)).mean())
    if not aps:
        raise AssertionError("no query has a match")
    return float(np.mean(aps)), np.zeros(max_rank)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # huge_scale, as it should
def test_the_loop_of_the_docs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    monkeypatch.setitem(sys.modules, "their_package", types.SimpleNamespace(evaluate=evaluate))
    monkeypatch.chdir(conformance.VECTORS.parent)
    exec(compile(code, str(DOCS), "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split()[1]: line for line in lines}
    assert verdicts["two_rules_of_ap"].startswith("ok")
    assert verdicts["ties"] == "DIFFERS ties (depends on ties)"
    assert verdicts["nan_in_the_gallery"].startswith("DIFFERS")
    assert verdicts["one_camera"].startswith("ok")
    assert {name for name, line in verdicts.items() if line.startswith("DIFFERS")} >= {"near_tie", "tiny_scale"}
