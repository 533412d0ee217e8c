"""A retrieval scored by the rules in exact rational arithmetic: slow, plain, and written apart from the package.

Every feature is a fraction, distances are compared as fractions, every figure is a fraction until it is rounded to
float64 at the end. Written from the rules in docs/evaluation.md; imports nothing of sabmn_ext.
"""

from fractions import Fraction
from typing import Any

Row = list[Fraction]


def squared_distance(query: Row, gallery: Row) -> Fraction:
    return sum(((q - g) ** 2 for q, g in zip(query, gallery, strict=True)), Fraction(0))


def cosine_order(query: Row, gallery: Row) -> Fraction:
    """−cos·|cos|, which orders as 1 − cos does and needs no square root."""
    dot = sum((q * g for q, g in zip(query, gallery, strict=True)), Fraction(0))
    norms = sum(q * q for q in query) * sum(g * g for g in gallery)
    return -dot * abs(dot) / norms


DISTANCES = {"euclidean": squared_distance, "cosine": cosine_order}


def keeps(case: dict[str, Any], q: int, g: int) -> bool:
    """Whether gallery item g stays in the ranking of query q."""
    if case["gallery_pids"][g] == -1:
        return False
    if case["exclude_self"] and g == q:
        return False
    same_pid = case["gallery_pids"][g] == case["query_pids"][q]
    return not (same_pid and case["query_camids"] and case["query_camids"][q] == case["gallery_camids"][g])


def ranking(case: dict[str, Any], q: int) -> list[tuple[Fraction, int]]:
    """(distance, gallery index) of the items that stay, nearest first, ties by gallery index."""
    query = [Fraction(x) for x in case["query_features"][q]]
    kept = []
    for g, row in enumerate(case["gallery_features"]):
        if keeps(case, q, g):
            kept.append((DISTANCES[case["metric"]](query, [Fraction(x) for x in row]), g))
    return sorted(kept)


def average_precision(ranks: list[int]) -> Fraction:
    """Non-interpolated: the mean over the matches of (matches so far) / rank."""
    return sum((Fraction(found, rank) for found, rank in enumerate(ranks, start=1)), Fraction(0)) / len(ranks)


def trapezoid_average_precision(ranks: list[int]) -> Fraction:
    """The mean over the matches of the mean of the precision at the match and just before it; 1 before rank 1."""
    total = Fraction(0)
    for found, rank in enumerate(ranks, start=1):
        before = Fraction(1) if rank == 1 else Fraction(found - 1, rank - 1)
        total += (before + Fraction(found, rank)) / 2
    return total / len(ranks)


def score(case: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The ``expected`` part of a vector, and whether the ranks of the matches depend on the rule for ties."""
    pids = case["gallery_pids"]
    match_ranks, depends_on_ties = [], False
    for q, pid in enumerate(case["query_pids"]):
        ranked = ranking(case, q)
        match_ranks.append([rank for rank, (_, g) in enumerate(ranked, start=1) if pids[g] == pid])
        at_match = {distance for distance, g in ranked if pids[g] == pid}
        depends_on_ties |= any(distance in at_match for distance, g in ranked if pids[g] != pid)
    with_match = [ranks for ranks in match_ranks if ranks]
    sums = {
        "map": sum(map(average_precision, with_match)),
        "map_trapezoid": sum(map(trapezoid_average_precision, with_match)),
        "minp": sum(Fraction(len(ranks), ranks[-1]) for ranks in with_match),
    }
    within = [sum(ranks[0] <= k for ranks in with_match) for k in range(1, case["max_rank"] + 1)]

    def means(count: int) -> dict[str, Any]:
        figures = {name: float(Fraction(total) / count) for name, total in sums.items()}
        return figures | {"cmc": [float(Fraction(number, count)) for number in within]}

    expected = {
        "num_queries": len(match_ranks),
        "num_valid_queries": len(with_match),
        "match_ranks": match_ranks,
        "first_match_rank": [ranks[0] if ranks else None for ranks in match_ranks],
        "ap": [float(average_precision(ranks)) if ranks else None for ranks in match_ranks],
        "ap_trapezoid": [float(trapezoid_average_precision(ranks)) if ranks else None for ranks in match_ranks],
        "inp": [float(Fraction(len(ranks), ranks[-1])) if ranks else None for ranks in match_ranks],
        "over_valid_queries": means(len(with_match)),
        "over_all_queries": means(len(match_ranks)),
    }
    return expected, depends_on_ties
