"""Exact evaluation of a retrieval: mAP, CMC, mINP by the rules of Market-1501, from features or from distances.

The rank of every true match comes from counting (``sabmn_ext.ops.retrieval``) in float64 with ties by gallery index:
the result depends on the features alone, not on tiles, threads, backend or processor.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.ops.retrieval import METRICS, rank_matches
from sabmn_ext.retrieval.inputs import Array, as_labels, as_matrix, check_features
from sabmn_ext.retrieval.labels import Labels, MatchLists
from sabmn_ext.retrieval.result import RetrievalResult, score_ranks

_ROW_BLOCK_ELEMENTS = 1 << 22

# Some queries' matches; and their ranks, distances and gallery indices, in the order of the ranks.
Ranked = tuple[MatchLists, tuple[np.ndarray, ...]]


def evaluate_retrieval(
    query_features: Array,
    gallery_features: Array,
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any = None,
    gallery_camids: Any = None,
    *,
    metric: str = "euclidean",
    max_rank: int = 50,
    exclude_self: bool = False,
    backend: str | None = None,
    query_names: Sequence[str] | None = None,
    gallery_names: Sequence[str] | None = None,
) -> RetrievalResult:
    """Rank the gallery for every query and score the ranking.

    For a query the gallery drops the items with its pid and its camera, and those with pid −1 (junk). pid 0 is a person
    like any other. Queries without a valid match (those with pid −1 among them) are left out of the means and listed in
    the result's ``invalid_queries``.

    Args:
        query_features: [Q, D] torch (any device, any strides) or numpy, float16, bfloat16, float32 or float64.
        gallery_features: [G, D] in the same dtype on the same device.
        query_pids, gallery_pids: [Q], [G] integers.
        query_camids, gallery_camids: [Q], [G] integers; None for both switches the camera rule off.
        metric: ``"euclidean"`` or ``"cosine"`` (1 − cos), on the features as they are.
        max_rank: length of the result's ``cmc``; beyond the gallery's size the curve is flat.
        exclude_self: query i is gallery item i, and is dropped for itself (leave-one-out on one set).
        backend: ``"cpu"`` (C++), ``"torch"``, or None for the first that can serve; the result is the same.
        query_names, gallery_names: names of the items (image paths), for error messages.

    Raises:
        TypeError, ValueError: input that cannot be evaluated; NaN or infinite features (names the row), zero features
            with the cosine metric, no query with a valid match (says why).

    >>> query, gallery = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.5], [0.0, 2.0], [0.0, 9.0]])
    >>> evaluate_retrieval(query, gallery, [7], [8, 7, 7], [1], [1, 2, 2]).map  # matches at ranks 2 and 3
    0.5833333333333333
    """
    query, gallery = as_matrix("query_features", query_features), as_matrix("gallery_features", gallery_features)
    if query.dtype != gallery.dtype or query.device != gallery.device:
        both = " and ".join(f"{x.dtype} on {x.device}" for x in (query, gallery))
        raise TypeError(f"query_features and gallery_features must have one dtype and device, but are {both}")
    if query.shape[1] != gallery.shape[1] or query.shape[1] == 0:
        both = " and ".join(str(list(x.shape)) for x in (query, gallery))
        raise ValueError(
            f"query_features and gallery_features must be [Q, D] and [G, D] with one D ≥ 1, but are {both}"
        )
    if metric not in METRICS:
        raise ValueError(f"metric '{metric}' is unknown; expected one of {', '.join(METRICS)}")
    sizes = len(query), len(gallery)
    labels = _labels(sizes, query_pids, gallery_pids, query_camids, gallery_camids, exclude_self)
    check_features("query_features", query, metric, query_names)
    check_features("gallery_features", gallery, metric, gallery_names)
    lists = labels.match_lists(0, len(query))
    ranks = ((m, _ranks(labels, m, query[m.queries], gallery, metric, backend)) for m in lists)
    return _result(labels, metric, max_rank, ranks)


def evaluate_distances(
    distances: Array | Iterable[Array],
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any = None,
    gallery_camids: Any = None,
    *,
    max_rank: int = 50,
    exclude_self: bool = False,
    backend: str | None = None,
) -> RetrievalResult:
    """Score anyone's distances (smaller is nearer) by the rules of ``evaluate_retrieval``.

    Args:
        distances: [Q, G], or an iterable of consecutive row blocks [rows, G], so that the whole matrix need not exist.
            Floating or integer; ±infinity is ranked like any value.

    The other arguments are those of ``evaluate_retrieval``.

    Raises:
        TypeError, ValueError: as there; NaN (names row and column); rows that are too few, too many or too long.

    >>> evaluate_distances(np.array([[0.5, 1.0, 8.0]]), [7], [8, 7, 7], [1], [1, 2, 2]).rank(2)
    1.0
    """
    num_queries, num_gallery = len(query_pids), len(gallery_pids)
    sizes = num_queries, num_gallery
    labels = _labels(sizes, query_pids, gallery_pids, query_camids, gallery_camids, exclude_self)

    def ranks() -> Iterator[Ranked]:
        done = 0
        for block in [distances] if isinstance(distances, Tensor | np.ndarray) else distances:
            rows = as_matrix("distances", block, integers=True)
            if rows.shape[1] != num_gallery or done + len(rows) > num_queries:
                raise ValueError(f"distances {list(rows.shape)} from row {done} on do not fit [Q, G] = {list(sizes)}")
            for part in rows.split(max(1, _ROW_BLOCK_ELEMENTS // num_gallery)):
                missing = part.isnan()
                if bool(missing.any()):
                    row, column = missing.nonzero()[0].tolist()
                    raise ValueError(f"distances hold NaN at row {done + row}, column {column}")
                for m in labels.match_lists(done, done + len(part)):
                    few = part[m.queries.start - done : m.queries.stop - done]
                    yield m, _ranks(labels, m, None, few, METRICS[0], backend)
                done += len(part)
        if done != num_queries:
            raise ValueError(f"distances have {done} rows, but there are {num_queries} queries")

    return _result(labels, "given", max_rank, ranks())


def _labels(
    sizes: tuple[int, int],
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any,
    gallery_camids: Any,
    exclude_self: bool,
) -> Labels:
    return Labels(
        as_labels("query_pids", query_pids, sizes[0]),
        as_labels("gallery_pids", gallery_pids, sizes[1]),
        None if query_camids is None else as_labels("query_camids", query_camids, sizes[0]),
        None if gallery_camids is None else as_labels("gallery_camids", gallery_camids, sizes[1]),
        exclude_self,
    )


def _ranks(
    labels: Labels, lists: MatchLists, query: Tensor | None, gallery: Tensor, metric: str, backend: str | None
) -> tuple[np.ndarray, ...]:
    """Ranks, distances and gallery indices of the matches; ``query`` None: ``gallery`` holds these queries' distances."""
    offsets = np.append(0, np.cumsum(lists.num_matches))
    arrays = (labels.query_pids[lists.queries], labels.gallery_pids, offsets, lists.indices)
    tensors = (torch.from_numpy(array).to(gallery.device) for array in arrays)
    return tuple(x.cpu().numpy() for x in rank_matches(query, gallery, *tensors, metric=metric, backend=backend))


def _result(labels: Labels, metric: str, max_rank: int, ranks_of: Iterable[Ranked]) -> RetrievalResult:
    if not isinstance(max_rank, int) or max_rank < 1:
        raise ValueError(f"max_rank is {max_rank!r}; expected an integer of at least 1")
    lists, ranked = zip(*ranks_of, strict=True)
    ranks, _, indices = (np.concatenate(parts) for parts in zip(*ranked, strict=True))
    num_matches = np.concatenate([m.num_matches for m in lists])
    if not num_matches.any():
        raise ValueError(f"no query has a valid match in the gallery: {labels.why_no_match()}")
    return RetrievalResult(
        **score_ranks(ranks, num_matches, np.concatenate([m.num_valid for m in lists])),
        query_pids=labels.query_pids,
        query_camids=labels.query_camids,
        match_camids=None if labels.gallery_camids is None else labels.gallery_camids[indices],
        metric=metric,
        camera_rule=labels.query_camids is not None,
        num_gallery=len(labels.gallery_pids),
        num_junk=int((labels.gallery_pids == -1).sum()),
        max_rank=max_rank,
    )
