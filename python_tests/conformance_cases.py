"""The cases of the conformance suite, and the program that writes them with their exact answers.

    python python_tests/conformance_cases.py          # writes sabmn_ext/retrieval/vectors/*.json

An item is (feature, pid, camid); a feature is a number or a tuple of them. docs/evaluation.md describes the format.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exact_retrieval import keeps, score

FOLDER = Path(__file__).resolve().parent.parent / "sabmn_ext" / "retrieval" / "vectors"
Item = tuple[Any, int, int]


def case(
    name: str,
    purpose: str,
    query: list[Item],
    gallery: list[Item],
    *,
    metric: str = "euclidean",
    cameras: bool = True,
    exclude_self: bool = False,
    max_rank: int | None = None,
    error: tuple[Any, ...] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A vector without its answer.

    max_rank: None, for a CMC no longer than the shortest ranking (at most 5), which asks for nothing special.
    error: (kind, side, row) of the refusal that is expected instead of an answer.
    """
    columns: dict[str, Any] = {"metric": metric, "exclude_self": exclude_self, "max_rank": max_rank or 5}
    for side, items in (("query", query), ("gallery", gallery)):
        features = [list(x) if isinstance(x, tuple) else [x] for x, _, _ in items]
        columns[f"{side}_features"] = features
        columns[f"{side}_pids"] = [pid for _, pid, _ in items]
        columns[f"{side}_camids"] = [camid for _, _, camid in items] if cameras else None
    columns |= changes
    vector = {"format": 1, "name": name, "purpose": purpose, "input": columns}
    if max_rank is None and not error:
        shortest = min(sum(keeps(columns, q, g) for g in range(len(gallery))) for q in range(len(query)))
        columns["max_rank"] = min(5, shortest)
    if error:
        vector["expected_error"] = dict(zip(("kind", "side", "row"), (*error, None, None), strict=False))
    return vector


def rule_cases() -> Iterator[dict[str, Any]]:
    """The rules of average precision, junk, cameras and denominators."""
    one = [(0, 7, 1)]
    yield case(
        "two_rules_of_ap",
        "Matches at ranks 2, 3 and 6: the non-interpolated AP is (1/2 + 2/3 + 3/6)/3, the trapezoid one is lower.",
        one,
        [(1, 8, 2), (2, 7, 2), (3, 7, 3), (4, 9, 2), (5, 8, 3), (6, 7, 4), (7, 9, 4)],
    )
    yield case(
        "match_at_rank_1",
        "Trapezoid AP: the precision just before a match at rank 1 is taken as 1. Query 1 has no other match.",
        [(0, 7, 1), (9, 8, 1)],
        [(1, 7, 2), (2, 9, 2), (3, 7, 2), (8, 8, 2)],
    )
    yield case("all_are_matches", "Every gallery item is a match.", one, [(3, 7, 2), (1, 7, 3), (2, 7, 4)])
    yield case(
        "matches_come_last",
        "The worst ranking: mINP is matches / rank of the last match; CMC is 0 until rank 4.",
        one,
        [(5, 7, 2), (6, 7, 2), (1, 8, 2), (2, 9, 2), (3, 8, 3)],
    )
    yield case(
        "junk",
        "Items with pid -1 are nearest; they leave the ranking and do not count in ranks.",
        [(0, 7, 1), (20, 8, 1)],
        [(0, -1, 2), (1, -1, 1), (2, 7, 2), (3, -1, 3), (4, 8, 2), (5, 7, 3), (19, 8, 3), (20, -1, 3)],
    )
    yield case(
        "distractors",
        "pid 0, which no query has here, stays: a negative like any other.",
        one,
        [(1, 0, 2), (2, 7, 2), (3, 0, 1), (4, 7, 3), (5, 8, 2)],
    )
    yield case(
        "pid_zero_is_a_person",
        "pid 0 is asked for and found; nothing about it is special.",
        [(0, 0, 1), (10, 7, 1)],
        [(1, 7, 2), (2, 0, 2), (3, 0, 1), (4, 0, 3), (9, 7, 3)],
    )
    yield case(
        "same_camera",
        "Items with the query's pid and camera leave the ranking; other people under that camera stay.",
        [(0, 7, 1), (10, 7, 2)],
        [(0, 7, 1), (1, 8, 1), (2, 7, 2), (3, 7, 1), (4, 8, 2), (5, 7, 3), (10, 7, 2), (11, 9, 2)],
    )
    yield case(
        "no_cameras",
        "The same items as in same_camera without camera numbers: nothing leaves.",
        [(0, 7, 1), (10, 7, 2)],
        [(0, 7, 1), (1, 8, 1), (2, 7, 2), (3, 7, 1), (4, 8, 2), (5, 7, 3), (10, 7, 2), (11, 9, 2)],
        cameras=False,
    )
    yield case(
        "one_camera_without_the_rule",
        "Data from one camera can be scored once its camera numbers are left out.",
        [(0, 7, 1), (9, 8, 1)],
        [(2, 7, 1), (1, 8, 1), (5, 8, 1), (7, 7, 1)],
        cameras=False,
    )
    yield case(
        "query_without_a_match",
        "Query 1 is nowhere in the gallery, query 2 only under its own camera: the two denominators differ (2 and 4).",
        [(0, 7, 1), (1, 99, 1), (5, 8, 2), (6, 9, 1)],
        [(1, 8, 2), (2, 7, 2), (5, 8, 2), (8, 9, 3), (9, 7, 3)],
    )
    yield case(
        "query_with_pid_minus_1",
        "A query with pid -1 has no match, since every gallery item with its pid is junk.",
        [(0, -1, 1), (0, 7, 1)],
        [(0, -1, 2), (1, 8, 2), (2, 7, 2)],
    )
    yield case(
        "negative_labels",
        "Only pid -1 is junk; other negative pids and camera numbers are numbers.",
        [(0, -2, -1), (9, 7, 0)],
        [(1, -1, -2), (2, 7, -2), (3, -2, -1), (4, -2, -2), (5, -3, 0), (8, 7, -1)],
    )
    yield case(
        "large_labels",
        "pids that float32 or int32 cannot tell apart are different people.",
        [(0, 2**24 + 1, 1), (9, 2**40, 1)],
        [(1, 2**24, 2), (2, 2**24 + 1, 2), (3, 0, 2), (7, 2**40, 3), (8, 2**40 + 2**32, 2)],
    )
    yield case(
        "same_person_twice_as_query",
        "Two equal queries count twice.",
        [(0, 7, 1), (0, 7, 1), (9, 8, 1)],
        [(1, 8, 2), (2, 7, 2), (8, 8, 2)],
    )


def size_cases() -> Iterator[dict[str, Any]]:
    """Small galleries, long CMC curves, leave-one-out."""
    yield case("one_item", "One query, one gallery item.", [(0, 7, 1)], [(1, 7, 2)], max_rank=3)
    yield case(
        "rank_beyond_the_gallery",
        "max_rank is larger than the gallery, and the queries keep different numbers of items: CMC is flat from there.",
        [(0, 7, 1), (9, 8, 1)],
        [(1, 7, 1), (2, 7, 1), (3, 8, 2), (4, 7, 2), (5, -1, 2)],
        max_rank=20,
    )
    people = [(0, 7, 1), (0, 8, 1), (1, 7, 2), (1, 7, 1), (2, 8, 2), (3, 9, 3), (0, 7, 1)]
    yield case(
        "leave_one_out",
        "Query i is gallery item i and is left out for itself only: items with the same feature stay. pid 9 is alone.",
        people,
        people,
        cameras=False,
        exclude_self=True,
    )
    yield case("leave_one_out_with_cameras", "The same under the camera rule.", people, people, exclude_self=True)


def tie_cases() -> Iterator[dict[str, Any]]:
    """Equal distances: the lower gallery index comes first."""
    yield case(
        "ties",
        "A match stands after (query 0) and before (query 1) a non-match at its own distance.",
        [(0, 7, 1), (0, 8, 1)],
        [(1, 8, 2), (-1, 7, 2), (3, 9, 2), (-3, 7, 3), (3, 8, 3)],
    )
    yield case(
        "collapsed",
        "All features are equal: the ranking is the gallery's order, and the score is no better than that.",
        [((1, 2), 7, 1), ((1, 2), 8, 1), ((1, 2), 9, 1)],
        [((1, 2), pid, camid) for pid, camid in ((8, 2), (9, 1), (7, 2), (-1, 2), (9, 2), (7, 3), (8, 3), (8, 1))],
    )
    yield case(
        "duplicates",
        "The same feature with different pids, at distance 0 and elsewhere.",
        [((3, 4), 7, 1), ((0, 1), 8, 1)],
        [((3, 4), 8, 2), ((3, 4), 7, 2), ((0, 1), 7, 3), ((0, 1), 8, 3), ((3, 4), 9, 2), ((3, 4), 7, 3)],
    )
    yield case(
        "cosine_ties",
        "Features that are multiples of each other by a power of two have one direction, and tie.",
        [((1, 1), 7, 1)],
        [((6, 8), 8, 2), ((3, 4), 7, 2), ((1, 1), 9, 2), ((8, 6), 7, 3), ((4, 3), 8, 3), ((2, 2), 7, 4)],
        metric="cosine",
    )


def distance_cases() -> Iterator[dict[str, Any]]:
    """Which distance, and how exactly it is computed."""
    query = [((1, 0), 7, 1), ((0, 2), 8, 1)]
    gallery = [((9, 1), 7, 2), ((1, 1), 8, 2), ((0, 16), 8, 3), ((-1, 0), 7, 3), ((2, 3), 9, 2), ((-4, -1), 9, 3)]
    for metric in ("euclidean", "cosine"):
        yield case(
            f"metric_{metric}",
            "The same items under both distances: the rankings differ. Cosine sees directions, opposite ones last.",
            query,
            gallery,
            metric=metric,
        )
    offsets = ((1, 8, 2), (0.5, 7, 2), (0.75, 9, 2), (-0.25, 7, 3), (1.625, 8, 3))
    yield case(
        "offset_float32",
        "A common offset of 4096: the sum of (q - g)^2 is exact in float32, |q|^2 + |g|^2 - 2qg in float32 is not.",
        [((4096, 4096), 7, 1), ((4097, 4096), 8, 1)],
        [((4096 + x, 4096), pid, camid) for x, pid, camid in offsets],
    )
    yield case(
        "offset_float64",
        "One coordinate is 2^30 for all: |q|^2 + |g|^2 - 2qg loses the others even in float64.",
        [((2**30, 0), 7, 1), ((2**30, 4), 8, 1)],
        [((2**30, x), pid, camid) for x, pid, camid in ((3, 8, 2), (2, 7, 2), (1, 9, 2), (-4, 7, 3), (5, 8, 3))],
    )
    yield case(
        "near_tie",
        "Squared distances of 1 + 2^-40 and 1: equal in float32, where any rule for ties is wrong once.",
        [((0, 0), 7, 1)],
        [((1, 2**-20), 8, 2), ((1, 0), 7, 2), ((2, 0), 8, 3), ((2, 2**-20), 7, 3)],
    )
    yield case(
        "tiny_scale",
        "Features near 2^-80, whose squares vanish in float32.",
        [(0, 7, 1)],
        [(3 * 2.0**-80, 8, 2), (2.0**-80, 7, 2), (2.0**-79, 9, 2), (5 * 2.0**-80, 7, 3)],
    )
    yield case(
        "huge_scale",
        "Features near 2^70, whose squares overflow float32.",
        [(0, 7, 1)],
        [(3 * 2.0**70, 8, 2), (2.0**70, 7, 2), (2.0**71, 9, 2), (5 * 2.0**70, 7, 3)],
    )


def drawn_cases() -> Iterator[dict[str, Any]]:
    """Integers from a fixed seed, with everything at once."""
    for seed, metric, dim in ((1, "euclidean", 2), (2, "euclidean", 4), (3, "cosine", 5)):
        uniform = random.Random(seed).random  # the same in every version of Python

        def draw(count: int, lowest_pid: int, dim: int = dim, uniform: Any = uniform) -> list[Item]:
            def feature() -> tuple[int, ...]:  # never zero, which has no cosine
                return (1 + int(uniform() * 7), *(int(uniform() * 15) - 7 for _ in range(dim - 1)))

            return [(feature(), lowest_pid + int(uniform() * 8), 1 + int(uniform() * 3)) for _ in range(count)]

        yield case(
            f"drawn_{seed}",
            "Random small integers: ties, junk, distractors, cameras, queries without a match.",
            [*draw(10, 0), ((1,) * dim, 99, 1)],
            draw(50, -1),
            metric=metric,
            max_rank=20,
        )


def error_cases() -> Iterator[dict[str, Any]]:
    """Input that must be refused, with the kind of the error and, where there is one, the row to blame."""
    query, gallery = [(0, 7, 1), (1, 8, 1)], [(1, 7, 2), (2, 8, 2), (3, 9, 2)]
    yield case(
        "no_match_at_all",
        "No pid of the queries is in the gallery.",
        [(0, 1, 1), (1, 2, 1)],
        gallery,
        error=("no_valid_match",),
    )
    yield case(
        "one_camera",
        "Everything under one camera: the camera rule drops every match.",
        query,
        [(feature, pid, 1) for feature, pid, _ in gallery],
        error=("no_valid_match",),
    )
    yield case(
        "all_junk",
        "Every gallery item has pid -1.",
        [(0, -1, 1), (1, 7, 1)],
        [(1, -1, 2), (2, -1, 3)],
        error=("no_valid_match",),
    )
    for name, value in (("nan", "NaN"), ("infinity", "Infinity"), ("minus_infinity", "-Infinity")):
        yield case(
            f"{name}_in_the_gallery",
            f"A feature is {value}: an error that names the row, and no figure.",
            query,
            [*gallery[:2], (value, 9, 2)],
            error=("not_finite", "gallery", 2),
        )
    yield case(
        "nan_in_the_query",
        "A query's feature is NaN.",
        [query[0], ("NaN", 8, 1)],
        gallery,
        error=("not_finite", "query", 1),
    )
    yield case(
        "zero_feature",
        "The cosine distance of a zero feature is undefined.",
        [((0, 1), 7, 1)],
        [((1, 1), 7, 2), ((0, 0), 8, 2)],
        metric="cosine",
        error=("zero_feature", "gallery", 1),
    )
    yield case("no_queries", "There is no query.", [], gallery, error=("empty_query",))
    yield case("no_gallery", "There is no gallery item.", query, [], error=("empty_gallery",))
    yield case(
        "too_few_pids",
        "Two gallery pids for three gallery items.",
        query,
        gallery,
        gallery_pids=[7, 8],
        error=("length_mismatch", "gallery"),
    )
    yield case(
        "too_many_camids",
        "Three camera numbers for two queries.",
        query,
        gallery,
        query_camids=[1, 1, 1],
        error=("length_mismatch", "query"),
    )
    yield case(
        "camids_of_one_side",
        "Camera numbers of the gallery only.",
        query,
        gallery,
        query_camids=None,
        error=("missing_camids",),
    )
    yield case(
        "dimensions_differ",
        "Queries have one feature dimension, gallery items two.",
        query,
        [((1, 2), 7, 2), ((3, 4), 8, 2)],
        error=("dimension_mismatch",),
    )
    yield case(
        "leave_one_out_of_two_sets",
        "exclude_self, but the pids of query and gallery differ.",
        [*query, (2, 9, 2)],
        gallery[::-1],
        exclude_self=True,
        error=("not_one_set",),
    )


def vectors() -> Iterator[dict[str, Any]]:
    for group in (rule_cases, size_cases, tie_cases, distance_cases, drawn_cases, error_cases):
        for vector in group():
            if "expected_error" not in vector:
                vector["expected"], vector["depends_on_ties"] = score(vector["input"])
            yield vector


def to_json(value: Any, indent: str = "") -> str:
    """Objects over several lines, one row of a matrix a line."""
    inner = indent + "  "
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(key)}: {to_json(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(item, list) for item in value):
        return "[\n" + ",\n".join(inner + json.dumps(item) for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)


def files() -> dict[str, str]:
    """File name → text."""
    return {f"{vector['name']}.json": to_json(vector) + "\n" for vector in vectors()}


if __name__ == "__main__":
    for old in FOLDER.glob("*.json"):
        old.unlink()
    for name, text in files().items():
        (FOLDER / name).write_text(text)
