"""The conformance suite: small retrievals with exact answers, ``vectors/*.json``, and this evaluator's answers to them.

docs/evaluation.md describes the format and how another package runs the same vectors.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sabmn_ext.retrieval.evaluation import evaluate_retrieval

VECTORS = Path(__file__).parent / "vectors"
TOLERANCE = 1e-12  # relative; the answers are exact fractions, rounded once

# This package's messages → the kinds of error in the vectors.
_MESSAGES = {
    "no_valid_match": r"no query has a valid match",
    "not_finite": r"(?P<side>query|gallery)_features row (?P<row>\d+) .*NaN or infinite",
    "zero_feature": r"(?P<side>query|gallery)_features row (?P<row>\d+) .*is zero",
    "empty_query": r"there are no queries",
    "empty_gallery": r"there are no gallery items",
    "length_mismatch": r"(?P<side>query|gallery)_(pids|camids) has shape",
    "missing_camids": r"one of query_camids and gallery_camids is missing",
    "dimension_mismatch": r"with one D ≥ 1",
    "not_one_set": r"exclude_self: query i must be gallery item i",
}


def load_vectors(folder: str | Path = VECTORS) -> list[dict[str, Any]]:
    """The vectors in ``folder``, by name. A ValueError names a file that is not a vector of format 1."""
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no vectors (*.json) there")
    vectors = []
    for file in files:
        try:
            vector = json.loads(file.read_text())
            name, answers = vector["name"], ("expected" in vector) + ("expected_error" in vector)
            whole = vector["format"] == 1 and isinstance(vector["input"], dict) and answers == 1
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is not a conformance vector: {error!r}") from None
        if not whole:
            raise ValueError(f"{file} ({name}) is not a conformance vector of format 1: input, and one answer")
        vectors.append(vector)
    return vectors


def arguments(vector: dict[str, Any], dtype: Any = np.float64) -> dict[str, Any]:
    """The vector's input as keyword arguments of ``evaluate_retrieval``, features as ``dtype`` arrays [n, D]."""
    given = dict(vector["input"])
    for name in ("query_features", "gallery_features"):
        rows = given[name]
        given[name] = np.array(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 1)
    return given


def answer(vector: dict[str, Any], dtype: Any = np.float64, backend: str | None = None) -> dict[str, Any]:
    """This evaluator's ``expected`` or ``expected_error`` for the vector's input."""
    try:
        result = evaluate_retrieval(**arguments(vector, dtype), backend=backend)
    except (ValueError, TypeError) as error:
        return {"expected_error": _kind(str(error))}
    valid = result.num_matches > 0
    figures = {"map": result.map, "map_trapezoid": result.map_trapezoid, "minp": result.minp}
    share = result.num_valid_queries / result.num_queries

    def per_query(values: np.ndarray) -> list[Any]:
        return [value if has_match else None for value, has_match in zip(values.tolist(), valid, strict=True)]

    return {
        "expected": {
            "num_queries": result.num_queries,
            "num_valid_queries": result.num_valid_queries,
            "match_ranks": [ranks.tolist() for ranks in np.split(result.ranks, np.cumsum(result.num_matches)[:-1])],
            **{name: per_query(getattr(result, name)) for name in ("first_match_rank", "ap", "ap_trapezoid", "inp")},
            "over_valid_queries": figures | {"cmc": result.cmc.tolist()},
            "over_all_queries": {k: x * share for k, x in figures.items()} | {"cmc": (result.cmc * share).tolist()},
        }
    }


def _kind(message: str) -> dict[str, Any]:
    for kind, pattern in _MESSAGES.items():
        if found := re.search(pattern, message):
            named = found.groupdict()
            return {"kind": kind, "side": named.get("side"), "row": int(named["row"]) if "row" in named else None}
    return {"kind": message, "side": None, "row": None}


def compare(vector: dict[str, Any], given: dict[str, Any], tolerance: float = TOLERANCE) -> list[str]:
    """Where an answer, ``{"expected": …}`` or ``{"expected_error": …}``, differs from the vector's, a line each.

    An answer may leave figures out; what it leaves out is not compared. Integers and missing values (null) must be
    equal, other numbers agree within the relative ``tolerance``.
    """
    kind = "expected" if "expected" in vector else "expected_error"
    if kind not in given:
        return [f"{next(iter(given.values()))} instead of {kind.replace('_', ' ')} {vector[kind]}"]
    return list(_differences("", vector[kind], given[kind], tolerance))


def _differences(name: str, expected: Any, given: Any, tolerance: float) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(given, dict):
        shared = expected.keys() & given.keys()
        if not shared or given.keys() - expected.keys():
            yield f"{name or 'the answer'} has {', '.join(given) or 'nothing'}; expected some of {', '.join(expected)}"
        for key in expected:  # in the vector's order
            if key in shared:
                yield from _differences(f"{name}.{key}".lstrip("."), expected[key], given[key], tolerance)
    elif isinstance(expected, list) and isinstance(given, list):
        if len(expected) != len(given):
            yield f"{name} has length {len(given)}; expected {len(expected)}"
        for i, (one, other) in enumerate(zip(expected, given, strict=False)):
            yield from _differences(f"{name}[{i}]", one, other, tolerance)
    elif isinstance(expected, float) and isinstance(given, int | float):
        if not math.isclose(expected, given, rel_tol=tolerance, abs_tol=0):
            yield f"{name} is {given!r}; expected {expected!r}"
    elif expected != given:
        yield f"{name} is {given!r}; expected {expected!r}"


def check(folder: str | Path = VECTORS) -> Iterator[tuple[str, list[str]]]:
    """Every vector's name, and where this evaluator differs from it in float32 or float64."""
    for vector in load_vectors(folder):
        found = []
        for dtype in ("float32", "float64"):
            found += [f"{dtype}: {line}" for line in compare(vector, answer(vector, dtype))]
        yield vector["name"], found
