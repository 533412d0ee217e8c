"""The specification of every operation in plain torch, in any floating dtype and on any device.

The kernels are tested against these functions in float64, and an operation falls back to them where no kernel serves.
"""

import itertools

import numpy as np
import torch
from torch import Tensor

# ---- spectral normalisation (Miyato et al., 2018; the order of torch's parametrization) ----


def power_iteration(matrix: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """``iterations`` times u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, without a gradient.

    Args:
        matrix: W, [rows, columns]. u: [rows]. v: [columns]. eps: the smallest length that is divided by.
    """
    with torch.no_grad():
        for _ in range(iterations):
            u = torch.nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps)
            v = torch.nn.functional.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
        return u.clone(), v.clone()


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weight`` divided by σ = uᵀWv, after ``n_power_iterations`` updates of u and v. W is ``weight.flatten(1)``.

    Returns:
        normalised weight (the shape of ``weight``), u [rows], v [columns], σ []; u and v are constants of the gradient.
    """
    matrix = weight.flatten(1)
    u, v = power_iteration(matrix.detach(), u, v, n_power_iterations, eps)
    sigma = torch.dot(u, torch.mv(matrix, v))
    return weight / sigma, u, v, sigma


def spectral_norm_backward(gradient: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """dW = (G − ⟨G, W⟩/σ · u vᵀ)/σ for the gradient G of the normalised weight; σ = uᵀWv with constant u and v."""
    matrix, g = weight.flatten(1), gradient.flatten(1)
    sigma = torch.dot(u, torch.mv(matrix, v))
    return ((g - (g * matrix).sum() / sigma * torch.outer(u, v)) / sigma).view_as(weight)


# ---- retrieval: distances in float64 in a fixed order, and ranks by counting ----

NUM_LANES = 16  # csrc/retrieval/retrieval.h
_BLOCK_ELEMENTS = 1 << 22  # bounds the temporaries below, 32 MB each in float64


def _lane_sum(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """Σ (q − g)² (``"euclidean"``) or Σ q·g (``"cosine"``) over the last dimension, in float64; the others broadcast.

    Element k goes to lane k mod 16, in the order of k; the 16 lane sums are then added in a tree. Every product and
    every sum is rounded on its own, so that any machine that keeps to this order gets the same bits.
    """
    shape = torch.broadcast_shapes(query.shape[:-1], gallery.shape[:-1])
    lanes = torch.zeros(*shape, NUM_LANES, dtype=torch.float64, device=query.device)
    for first in range(0, query.shape[-1], NUM_LANES):
        q, g = query[..., first : first + NUM_LANES].double(), gallery[..., first : first + NUM_LANES].double()
        lanes[..., : q.shape[-1]] += q * g if metric == "cosine" else (q - g).square()
    while lanes.shape[-1] > 1:
        half = lanes.shape[-1] // 2
        lanes = lanes[..., :half] + lanes[..., half:]
    return lanes[..., 0]


def _sqrt(x: Tensor) -> Tensor:
    # torch's float64 square root on the CPU is off by one unit in the last place for one value in eighty; numpy's is not.
    return torch.from_numpy(np.sqrt(x.detach().numpy())) if x.device.type == "cpu" else x.sqrt()


def _ranking_distance(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """The quantity that is ranked, over the last dimension: Σ (q − g)², or 1 − q·g / (‖q‖·‖g‖)."""
    total = _lane_sum(query, gallery, metric)
    if metric == "cosine":
        norms = [_sqrt(_lane_sum(x, x, metric)) for x in (query, gallery)]
        total = 1.0 - total / (norms[0] * norms[1])
    return total


def pair_distances(
    query: Tensor, gallery: Tensor, query_indices: Tensor, gallery_indices: Tensor, metric: str
) -> Tensor:
    """The ranking distances of listed pairs.

    Args:
        query: [Q, D] in any floating dtype.
        gallery: [G, D] in the same dtype.
        query_indices, gallery_indices: [M] int64, the pairs.
        metric: ``"euclidean"`` (squared: Σ (q − g)²) or ``"cosine"`` (1 − cos).

    Returns:
        [M] float64.
    """
    block = max(1, _BLOCK_ELEMENTS // max(NUM_LANES, query.shape[1]))
    parts = [
        _ranking_distance(query[q], gallery[g], metric)
        for q, g in zip(query_indices.split(block), gallery_indices.split(block), strict=True)
    ]
    return torch.cat(parts) if parts else query.new_empty(0, dtype=torch.float64)


def count_nonmatches(
    query: Tensor,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    metric: str,
) -> Tensor:
    """For every true match, how many valid non-matches come before it in its query's ranking.

    A non-match is valid unless its pid is −1. Item a comes before item b if (distance, gallery index) is smaller. The
    rank of a query's m-th true match (from 1) is m plus this count.

    Args:
        query: [Q, D]; gallery: [G, D].
        query_pids: [Q] int64; gallery_pids: [G] int64.
        offsets: [Q + 1] int64; query q's true matches are the entries offsets[q] … offsets[q + 1] − 1 of the next two.
        distances: [M] float64, the true matches' ranking distances (``pair_distances``), ascending within a query.
        indices: [M] int64, their gallery indices, ascending where the distances are equal.
        metric: ``"euclidean"`` or ``"cosine"``.

    Returns:
        [M] int64.
    """
    block = max(1, _BLOCK_ELEMENTS // (NUM_LANES * gallery.shape[0]))
    counts = []
    for first in range(0, query.shape[0], block):
        rows = _ranking_distance(query[first : first + block, None], gallery[None], metric)
        block_offsets = offsets[first : first + block + 1]
        begin, end = int(block_offsets[0]), int(block_offsets[-1])
        counts.append(
            count_nonmatches_in_rows(
                rows,
                query_pids[first : first + block],
                gallery_pids,
                block_offsets - begin,
                distances[begin:end],
                indices[begin:end],
            )
        )
    return torch.cat(counts) if counts else torch.empty_like(indices)


def count_nonmatches_in_rows(
    rows: Tensor, query_pids: Tensor, gallery_pids: Tensor, offsets: Tensor, distances: Tensor, indices: Tensor
) -> Tensor:
    """``count_nonmatches`` for given distances ``rows`` [Q, G] in any floating dtype; compared as float64."""
    counts = torch.empty_like(indices)
    for q, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        valid = ((gallery_pids != query_pids[q]) & (gallery_pids != -1)).nonzero()[:, 0]
        row = rows[q, valid].double()
        block = max(1, _BLOCK_ELEMENTS // max(1, len(valid)))
        for first in range(begin, end, block):
            match = slice(first, min(first + block, end))
            nearer = row < distances[match, None]
            tied = (row == distances[match, None]) & (valid < indices[match, None])
            counts[match] = (nearer | tied).sum(dim=1)
    return counts
