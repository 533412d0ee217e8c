"""Exact evaluation of a retrieval: mAP, CMC, mINP by the rules of Market-1501, from features or from distances.

The rank of every true match comes from counting (``sabmn_ext.ops.retrieval``) in float64 with ties by gallery index:
the result depends on the features alone, not on tiles, threads, backend, processor, or on how many processes share it.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.ops import reference
from sabmn_ext.ops.retrieval import METRICS, bins, distance_exponent
from sabmn_ext.retrieval.inputs import Array, as_labels, as_matrix, check_features
from sabmn_ext.retrieval.labels import Labels, MatchLists, query_blocks
from sabmn_ext.retrieval.result import RetrievalResult, score_ranks
from sabmn_ext.retrieval.shards import Alone, Shards
from sabmn_ext.retrieval.verification import VerificationPairs

_ROW_BLOCK_ELEMENTS = 1 << 22
_GIVEN_EXPONENT = 64  # given distances beyond ±2^64 share the outermost bins of the histogram


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
    group: Any = None,
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
        backend: ``"triton"``, ``"cpu"`` (C++), ``"torch"`` or None: the first that can serve. The result is the same.
        query_names, gallery_names: names of the items (image paths), for error messages.
        group: a ``torch.distributed`` group (``torch.distributed.group.WORLD``) whose processes each hold a part of the
            gallery: the gallery arguments are this process's part, the parts follow each other in rank order, and any
            may be empty. All other arguments are the same in every process, and so is the result: that of one process
            with the whole gallery. Only the matches' distances, counts and histograms are exchanged.

    Raises:
        TypeError, ValueError: input that cannot be evaluated; NaN or infinite features (names the row), zero features
            with the cosine metric, no query with a valid match (says why).
        RuntimeError: with a group: another process has failed (says why) or ended.

    Memory: at most 64 MB beyond the features, some 40 bytes for each gallery item and 100 for each true match. The
    features are read in tiles and may be memory-mapped (``numpy.load(file, mmap_mode="r")``) and larger than memory.

    >>> query, gallery = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.5], [0.0, 2.0], [0.0, 9.0]])
    >>> evaluate_retrieval(query, gallery, [7], [8, 7, 7], [1], [1, 2, 2]).map  # matches at ranks 2 and 3
    0.5833333333333333
    """
    exchange = Alone() if group is None else Shards(group)

    def matrices() -> tuple[Tensor, Tensor]:
        query, gallery = as_matrix("query_features", query_features), as_matrix("gallery_features", gallery_features)
        _check_sides(query, gallery, metric)
        _check_max_rank(max_rank)
        return query, gallery

    query, gallery = exchange.run(matrices)
    parts = [int(part[0]) for part in exchange.gather(np.array([len(gallery)]))]
    first = sum(parts[: exchange.rank])

    def checked() -> tuple[Labels, float]:
        arguments = query_pids, gallery_pids, query_camids, gallery_camids
        labels = _labels(len(query), len(gallery), *arguments, exclude_self, first=first, total=sum(parts))
        largest = check_features("query_features", query, metric, query_names, backend)
        return labels, max(largest, check_features("gallery_features", gallery, metric, gallery_names, backend))

    labels, largest = exchange.run(checked)
    if group is not None:
        settings = f"{metric} {max_rank} {exclude_self} {labels.query_camids is None} {query.dtype} {query.shape[1]}"
        _check_agreement(exchange, settings, query, labels)
    exponent = distance_exponent(max(float(part[0]) for part in exchange.gather(np.array([largest]))), metric)
    num_bins = bins(exponent, signed=False)

    def blocks() -> Iterator[tuple[Ranked, np.ndarray]]:
        for queries in query_blocks(exchange.add(labels.group_sizes())):
            yield _rank(
                exchange, labels, labels.match_lists(queries), query[queries], gallery, metric, exponent, backend
            )

    return _result(exchange, labels, metric, max_rank, sum(parts), num_bins, blocks())


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
    arguments = query_pids, gallery_pids, query_camids, gallery_camids
    labels = _labels(num_queries, num_gallery, *arguments, exclude_self, first=0, total=num_gallery)
    _check_max_rank(max_rank)
    exchange = Alone()

    def blocks() -> Iterator[tuple[Ranked, np.ndarray]]:
        done = 0
        for block in [distances] if isinstance(distances, Tensor | np.ndarray) else distances:
            rows = as_matrix("distances", block, integers=True)
            if rows.shape[1] != num_gallery or done + len(rows) > num_queries:
                raise ValueError(
                    f"distances {list(rows.shape)} from row {done} on do not fit [Q, G] = {[num_queries, num_gallery]}"
                )
            for part in rows.split(max(1, _ROW_BLOCK_ELEMENTS // num_gallery)):
                missing = part.isnan()
                if bool(missing.any()):
                    row, column = missing.nonzero()[0].tolist()
                    raise ValueError(f"distances hold NaN at row {done + row}, column {column}")
                for few in query_blocks(labels.group_sizes()[done : done + len(part)]):
                    lists = labels.match_lists(slice(done + few.start, done + few.stop))
                    yield _rank(exchange, labels, lists, None, part[few], METRICS[0], _GIVEN_EXPONENT, backend)
                done += len(part)
        if done != num_queries:
            raise ValueError(f"distances have {done} rows, but there are {num_queries} queries")

    num_bins = bins(_GIVEN_EXPONENT, signed=True)
    return _result(exchange, labels, "given", max_rank, num_gallery, num_bins, blocks())


# ---- checks ----


def _check_sides(query: Tensor, gallery: Tensor, metric: str) -> None:
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


def _check_max_rank(max_rank: int) -> None:
    if not isinstance(max_rank, int) or max_rank < 1:
        raise ValueError(f"max_rank is {max_rank!r}; expected an integer of at least 1")


def _labels(
    num_queries: int,
    num_gallery: int,
    query_pids: Any,
    gallery_pids: Any,
    query_camids: Any,
    gallery_camids: Any,
    exclude_self: bool,
    *,
    first: int,
    total: int,
) -> Labels:
    if num_queries == 0 or total == 0:
        raise ValueError(f"there are no {'gallery items' if num_queries else 'queries'}")
    if exclude_self and num_queries != total:
        raise ValueError(
            f"exclude_self: query i must be gallery item i, but there are {num_queries} queries and {total} items"
        )
    return Labels(
        as_labels("query_pids", query_pids, num_queries),
        as_labels("gallery_pids", gallery_pids, num_gallery),
        None if query_camids is None else as_labels("query_camids", query_camids, num_queries),
        None if gallery_camids is None else as_labels("gallery_camids", gallery_camids, num_gallery),
        exclude_self,
        first,
    )


def _check_agreement(exchange: Alone, settings: str, query: Tensor, labels: Labels) -> None:
    """The processes of a group must have been called with the same queries and options."""
    sums = [zlib.crc32(x.tobytes()) for x in (labels.query_pids, labels.query_camids) if x is not None]
    features = 0
    for rows in query.split(1024):
        features = zlib.crc32(rows.contiguous().cpu().view(torch.uint8).numpy().tobytes(), features)
    all_settings = exchange.gather(np.frombuffer(settings.encode(), np.uint8).copy())
    all_sums = exchange.gather(np.array([len(query), *sums, features]))
    for rank, (text, numbers) in enumerate(zip(all_settings, all_sums, strict=True)):
        if text.tobytes() != all_settings[0].tobytes():
            given = " and ".join(f"({x.tobytes().decode()})" for x in (all_settings[0], text))
            raise ValueError(
                f"processes 0 and {rank} of the group differ in metric, max_rank, exclude_self, absence of cameras, "
                f"dtype or dimension: {given}"
            )
        if not np.array_equal(numbers, all_sums[0]):
            raise ValueError(f"processes 0 and {rank} of the group were given different queries")


# ---- ranks ----


@dataclass(frozen=True)
class Ranked:
    """Some queries' true matches in the order of their ranks."""

    num_matches: np.ndarray  # [queries]
    num_valid: np.ndarray  # [queries]
    ranks: np.ndarray  # [M]
    distances: np.ndarray  # [M]
    camids: np.ndarray  # [M]; all 0 without cameras


def _rank(
    exchange: Alone,
    labels: Labels,
    lists: MatchLists,
    query: Tensor | None,
    gallery: Tensor,
    metric: str,
    exponent: int,
    backend: str | None,
) -> tuple[Ranked, np.ndarray]:
    """The ranks, and the histogram of the non-matches. ``query`` None: ``gallery`` holds these queries' distances."""
    device = gallery.device

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    query_of = np.repeat(np.arange(len(lists.num_matches)), lists.num_matches)

    def match_distances() -> np.ndarray:
        pairs = tensor(query_of), tensor(lists.indices)
        if query is None:
            return gallery[pairs].double().cpu().numpy()
        return torch.ops.sabmn_ext.pair_distances(query, gallery, *pairs, metric, backend).cpu().numpy()

    # The matches of all processes, sorted for each query by (distance, gallery index).
    own = exchange.run(match_distances)
    distances, indices, query_of = (
        np.concatenate(exchange.gather(x)) for x in (own, labels.first + lists.indices, query_of)
    )
    order = np.lexsort((indices, distances, query_of))
    distances, indices, query_of = distances[order], indices[order], query_of[order]
    num_matches = exchange.add(lists.num_matches)
    offsets = np.append(0, np.cumsum(num_matches))
    own_camids = np.zeros_like(lists.indices) if labels.gallery_camids is None else labels.gallery_camids[lists.indices]
    camids = np.concatenate(exchange.gather(own_camids))[order]

    def counts() -> tuple[np.ndarray, np.ndarray]:
        codes: list[Tensor | None] = []
        for query_codes, gallery_codes in (labels.pid_codes, labels.camera_codes):
            if query_codes is None or gallery_codes is None:
                codes += [None, None]
            else:
                codes += [tensor(query_codes[lists.queries]), tensor(gallery_codes)]
        matches = (tensor(x) for x in (offsets, distances, indices))
        arguments = (*codes, *matches, labels.first, metric, exponent, backend)
        found = torch.ops.sabmn_ext.count_nonmatches(query, gallery, *arguments)
        return found[0].cpu().numpy(), found[1].cpu().numpy()

    before, histogram = (exchange.add(x) for x in exchange.run(counts))
    ranks = before + np.arange(1, len(query_of) + 1) - offsets[query_of]
    return Ranked(num_matches, exchange.add(lists.num_valid), ranks, distances, camids), histogram


def _result(
    exchange: Alone,
    labels: Labels,
    metric: str,
    max_rank: int,
    num_gallery: int,
    num_bins: tuple[int, int, int],
    blocks: Iterable[tuple[Ranked, np.ndarray]],
) -> RetrievalResult:
    histogram = np.zeros(num_bins[2], np.int64)
    ranked = []
    for block, block_histogram in blocks:
        histogram += block_histogram
        ranked.append(block)
    num_matches, num_valid, ranks, distances, camids = (
        np.concatenate([getattr(block, field.name) for block in ranked]) for field in fields(Ranked)
    )
    if not num_matches.any():
        raise ValueError(f"no query has a valid match in the gallery: {labels.why_no_match(exchange)}")
    edges, filled = reference.bin_edges(*num_bins).numpy(), np.flatnonzero(histogram)
    pairs = VerificationPairs(
        positives=distances,
        edges=np.append(edges[filled], edges[filled[-1:] + 1]),
        counts=histogram[filled],
        squared=metric == "euclidean",
    )
    return RetrievalResult(
        **score_ranks(ranks, num_matches, num_valid),
        query_pids=labels.query_pids.copy(),
        query_camids=None if labels.query_camids is None else labels.query_camids.copy(),
        match_camids=None if labels.gallery_camids is None else camids,
        pairs=pairs,
        metric=metric,
        camera_rule=labels.query_camids is not None,
        num_gallery=num_gallery,
        num_junk=int(exchange.add(np.array([len(labels.gallery_pids) - labels.num_kept]))[0]),
        max_rank=max_rank,
    )
