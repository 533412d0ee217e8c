"""The specification of every operation in plain torch, in any floating dtype and on any device.

The kernels are tested against these functions in float64, and an operation falls back to them where no kernel serves.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# ---- self-attention over a feature map ----
#
# Three functions. `self_attention2d` is the definition, a few lines that autograd and torch.func can differentiate any
# number of times; it holds the N×N map. `self_attention2d_forward` and `_backward` compute the same in blocks of
# queries, the gradients written out, and hold no N×N map: they are what the operation falls back to.

# Elements of the map held at once by the blockwise functions: 32 MB in float32.
_MAP_ELEMENTS = 2**23


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, softmax and sums: float32 for bfloat16 and float16, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def out_parts(dtype: torch.dtype) -> int:
    """In how many parts ``self_attention2d_forward`` keeps out."""
    return 2 if wide(dtype) != dtype else 1


def project(x: Tensor, weight: Tensor | None, bias: Tensor | None = None) -> Tensor:
    """A 1×1 convolution on flattened positions, ``[B, C, N] → [B, d, N]``.

    A matrix product, so that fp32 obeys the precision switch of torch's matmul. ``weight`` is ``[d, C]`` or
    ``[d, C, 1, 1]``; None is the identity.
    """
    if weight is not None:
        x = weight.flatten(1) @ x
    return x if bias is None else x + bias[:, None]


def attention_map(
    x: Tensor, w_query: Tensor, w_key: Tensor, *, b_query: Tensor | None = None, b_key: Tensor | None = None
) -> Tensor:
    """The attention map ``[B, N, N]`` of ``x`` ``[B, C, H, W]``: ``[b, j, i]`` is what output position j takes from i.

    Rows sum to 1: softmax over i of ``key_i · query_j``, unscaled (Zhang et al., SAGAN, 2019, eq. 1). At least float32.
    """
    flat = x.flatten(2)
    query = project(flat, w_query, b_query).to(wide(x.dtype))  # [B, d, N]
    key = project(flat, w_key, b_key).to(wide(x.dtype))  # [B, d, N]
    return (query.mT @ key).softmax(-1)


def self_attention2d(
    x: Tensor,  # [B, C, H, W]
    w_query: Tensor,  # [d, C] or [d, C, 1, 1]; so are all weights
    w_key: Tensor,  # [d, C]
    w_value: Tensor,  # [value width, C]
    w_out: Tensor | None,  # [C, value width]; None: the identity
    gamma: Tensor,  # [] or [1]
    *,
    b_query: Tensor | None = None,
    b_key: Tensor | None = None,
    b_value: Tensor | None = None,
    b_out: Tensor | None = None,
) -> Tensor:
    """``y = gamma · (w_out · out + b_out) + x`` with ``out_j = Σ_i map[j, i] value_i``, in x's dtype: ``[B, C, H, W]``.

    The definition, differentiable any number of times. It holds the map: O(B·N²) memory.
    """
    flat = x.flatten(2)  # [B, C, N]
    beta = attention_map(x, w_query, w_key, b_query=b_query, b_key=b_key)  # [B, N, N]
    out = project(flat, w_value, b_value).to(beta.dtype) @ beta.mT  # [B, value width, N]
    a = project(out.to(x.dtype), w_out, b_out)
    return (gamma.reshape(()) * a.to(beta.dtype) + flat).to(x.dtype).reshape(x.shape)


def self_attention2d_forward(
    x: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    w_out: Tensor | None,
    gamma: Tensor,
    *,
    b_query: Tensor | None = None,
    b_key: Tensor | None = None,
    b_value: Tensor | None = None,
    b_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same in blocks of queries: y; for the backward query, key, value ``[B, d, N]``, out and lse ``[B, 2, N]``.

    out, ``[parts, B, value width, N]`` in x's dtype, is a sum: of 16 bits what rounding left is the second part, since
    a softmax's gradient is a difference from ``context · out``. lse, at least float32, is
    ``log Σ_i exp(key_i · query_j)`` in two parts, the logits' maximum m and ``log Σ_i exp(key_i · query_j − m)``: their
    sum would lose the second beside logits of 10³.
    """
    dtype = wide(x.dtype)
    flat = x.flatten(2)
    query, key = project(flat, w_query, b_query), project(flat, w_key, b_key)
    value = project(flat, w_value, b_value)
    out = torch.empty_like(value, dtype=dtype)
    lse = query.new_empty(query.shape[0], 2, query.shape[2], dtype=dtype)
    for block in _query_blocks(query):
        logits = query[..., block].mT.to(dtype) @ key.to(dtype)  # [B, block, N]
        maximum = logits.amax(-1)
        powers = (logits - maximum[..., None]).exp()
        total = powers.sum(-1)
        lse[..., block] = torch.stack((maximum, total.log()), 1)
        out[..., block] = value.to(dtype) @ (powers / total[..., None]).mT
    rounded = out.to(x.dtype)
    a = project(rounded, w_out, b_out)
    y = (gamma.reshape(()) * a.to(dtype) + flat).to(x.dtype).reshape(x.shape)
    parts = [rounded, (out - rounded).to(x.dtype)][: out_parts(x.dtype)]
    return y, query, key, value, torch.stack(parts), lse


def self_attention2d_backward(
    grad_y: Tensor,  # [B, C, H, W]
    x: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    w_out: Tensor | None,
    gamma: Tensor,
    query: Tensor,  # [B, d, N], as key; value [B, value width, N], out [parts, B, value width, N]
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,  # [B, 2, N]
    *,
    b_out: Tensor | None = None,
    needs: Sequence[bool] = (True,) * 10,
) -> list[Tensor | None]:
    """The gradients of x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out, in blocks of queries.

    None where ``needs`` says that one is not wanted. With ``context = w_outᵀ grad_y`` gamma's gradient is
    ``Σ context · out + Σ grad_y · b_out``: there is no division by gamma, which is 0 at the start. A key bias cancels
    in the softmax: its gradient is 0.
    """
    need_x, need_query, need_key, need_value, need_out, need_gamma, *need_bias = needs
    dtype = wide(x.dtype)
    flat, grad = x.flatten(2), grad_y.flatten(2)  # [B, C, N]
    gamma = gamma.reshape(()).to(dtype)
    context = (grad if w_out is None else w_out.flatten(1).mT @ grad).to(dtype)  # [B, value width, N]
    grad_query = torch.empty_like(query, dtype=dtype)
    grad_key = torch.zeros_like(key, dtype=dtype)
    grad_value = torch.zeros_like(value, dtype=dtype)
    through_map = need_x or need_query or need_key or need_value or any(need_bias[:3])
    for block in _query_blocks(query) if through_map else []:
        part = context[..., block]
        maximum, log_total = lse[:, 0, block, None], lse[:, 1, block, None]
        beta = (query[..., block].mT.to(dtype) @ key.to(dtype) - maximum - log_total).exp()  # [B, block, N]
        grad_value += gamma * (part @ beta)
        grad_beta = part.mT @ value.to(dtype)
        grad_logits = gamma * beta * (grad_beta - (beta * grad_beta).sum(-1, keepdim=True))
        grad_query[..., block] = key.to(dtype) @ grad_logits.mT
        grad_key += query[..., block].to(dtype) @ grad_logits

    def weight_gradient(grad_part: Tensor, weight: Tensor) -> Tensor:
        return (grad_part.to(x.dtype) @ flat.mT).sum(0).view(weight.shape)

    def input_gradient() -> Tensor:
        total = grad
        for grad_part, weight in ((grad_query, w_query), (grad_key, w_key), (grad_value, w_value)):
            total = total + weight.flatten(1).mT @ grad_part.to(x.dtype)
        return total.reshape(x.shape)

    def bias_gradient(grad_part: Tensor) -> Tensor:
        return grad_part.sum((0, 2), dtype=dtype).to(x.dtype)

    grad_gamma = (context * out.sum(0, dtype=dtype)).sum()
    if b_out is not None:
        grad_gamma = grad_gamma + (grad.sum((0, 2), dtype=dtype) * b_out).sum()
    return [
        input_gradient() if need_x else None,
        weight_gradient(grad_query, w_query) if need_query else None,
        weight_gradient(grad_key, w_key) if need_key else None,
        weight_gradient(grad_value, w_value) if need_value else None,
        (gamma * (grad @ out[0].mT).sum(0)).to(x.dtype).view_as(w_out) if need_out and w_out is not None else None,
        grad_gamma if need_gamma else None,
        bias_gradient(grad_query) if need_bias[0] else None,
        x.new_zeros(key.shape[1]) if need_bias[1] else None,
        bias_gradient(grad_value) if need_bias[2] else None,
        bias_gradient(gamma * grad) if need_bias[3] else None,
    ]


def _query_blocks(query: Tensor) -> list[slice]:
    """Blocks of positions, small enough that ``[B, block, N]`` has about ``_MAP_ELEMENTS`` elements."""
    batch, _, positions = query.shape
    rows = max(1, _MAP_ELEMENTS // max(1, batch * positions))
    return [slice(first, min(first + rows, positions)) for first in range(0, positions, rows)]


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
    weight: Tensor,
    u: Tensor,
    v: Tensor,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weight`` divided by σ = uᵀWv, after ``n_power_iterations`` updates of u and v. W is ``weight.flatten(1)``.

    Returns:
        normalised weight (the shape of ``weight``, in ``dtype`` or else its own), u [rows], v [columns], and σ [] in
        ``wide(weight.dtype)``, as all sums are; u and v are constants of the gradient.
    """
    sums = wide(weight.dtype)
    matrix = weight.flatten(1).to(sums)
    left, right = power_iteration(matrix.detach(), u.to(sums), v.to(sums), n_power_iterations, eps)
    sigma = torch.dot(left, torch.mv(matrix, right))
    normalized = (matrix / sigma).to(dtype or weight.dtype).view_as(weight)
    return normalized, left.to(u.dtype), right.to(v.dtype), sigma


def spectral_norm_backward(gradient: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """dW = (G − ⟨G, W⟩/σ · u vᵀ)/σ for the gradient G of the normalised weight; σ = uᵀWv with constant u and v."""
    matrix, g, left, right = (t.to(wide(weight.dtype)) for t in (weight.flatten(1), gradient.flatten(1), u, v))
    sigma = torch.dot(left, torch.mv(matrix, right))
    weight_gradient = (g - (g * matrix).sum() / sigma * torch.outer(left, right)) / sigma
    return weight_gradient.to(weight.dtype).view_as(weight)


# ---- batch normalisation with the batch's statistics, a residual and a ReLU ----


def batch_norm_act(
    x: Tensor,  # [B, C, H, W]
    weight: Tensor | None = None,  # [C]; None: 1
    bias: Tensor | None = None,  # [C]; None: 0
    *,
    residual: Tensor | None = None,  # [B, C, H, W]
    relu: bool = True,
    running_mean: Tensor | None = None,  # [C], moved in place, as running_var
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``act((x − mean)/√(var + eps) · weight + bias + residual)`` (Ioffe and Szegedy, 2015): mean and var are each
    channel's over batch and positions, act is max(·, 0) or nothing. The running variance is the unbiased one."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    y = y if residual is None else y + residual
    return y.relu_() if relu else y


def batch_norm_act_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, kept: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, residual, weight and bias; ``kept``: where the ReLU let through, None without one.

    With g what is kept of ``grad_y`` and x̂ the normalised x, they are
    ``weight/√(var + eps) · (g − mean(g) − x̂·mean(g·x̂))``, g, ``Σ g·x̂`` and ``Σ g``; differentiable themselves.
    """
    dims = (0, 2, 3)
    g = grad_y if kept is None else torch.where(kept, grad_y, torch.zeros((), dtype=grad_y.dtype))
    wide_g, wide_x = g.to(wide(x.dtype)), x.to(wide(x.dtype))
    centered = wide_x - wide_x.mean(dims, keepdim=True)
    inverse = (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    normalized = centered * inverse
    weighted = wide_g * normalized
    scale = inverse if weight is None else weight.reshape(1, -1, 1, 1) * inverse
    grad_x = scale * (wide_g - wide_g.mean(dims, keepdim=True) - normalized * weighted.mean(dims, keepdim=True))
    return grad_x.to(x.dtype), g, weighted.sum(dims), wide_g.sum(dims)


# ---- retrieval: distances in float64 in a fixed order, ranks by counting, the non-matches' histogram ----

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
    # torch's float64 square root on the CPU misses the nearest number for one value in eighty; numpy's does not.
    return torch.from_numpy(np.sqrt(x.detach().numpy())) if x.device.type == "cpu" else x.sqrt()


def _ranking_distance(query: Tensor, gallery: Tensor, metric: str) -> Tensor:
    """The quantity that is ranked, over the last dimension: Σ (q − g)², or 1 − q·g / (‖q‖·‖g‖)."""
    total = _lane_sum(query, gallery, metric)
    if metric == "cosine":
        norms = [_sqrt(_lane_sum(x, x, metric)) for x in (query, gallery)]
        total = 1.0 - total / (norms[0] * norms[1])
    return total


def squared_norms(features: Tensor) -> Tensor:
    """[rows] float64: the squared length of each row of ``features`` [rows, D]."""
    block = max(1, _BLOCK_ELEMENTS // max(NUM_LANES, features.shape[1]))
    return torch.cat([_lane_sum(rows, rows, "cosine") for rows in features.split(block)])


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


BIN_BITS = 10  # csrc/retrieval/retrieval.h


def bin_of(distances: Tensor, lowest: int, negative: int, count: int) -> Tensor:
    """The histogram bins of float64 distances, int64.

    A bin is (edge, next edge]; the edges are 0 and the numbers with 1 + 10 significant bits, of either sign. The
    leading bits of a double, its sign taken as that of an integer, count these edges in order. Edges up to the
    ``lowest`` such integer are left out on both sides of 0, ``negative`` bins hold what is ≤ 0, and what lies outside
    goes to the first or last of the ``count`` bins.
    """
    bits = distances.contiguous().view(torch.int64)
    order = torch.where(bits < 0, -(bits & 0x7FFFFFFFFFFFFFFF), bits)
    key = (order - 1) >> (52 - BIN_BITS)
    positive, other = (key - lowest).clamp(min=0), torch.where(key < -lowest, key + (lowest - 1), -1)
    return (torch.where(key >= 0, positive, other) + negative).clamp(0, count - 1)


def bin_edges(lowest: int, negative: int, count: int) -> Tensor:
    """[count + 1] float64: bin k of ``bin_of`` is (edges[k], edges[k + 1]]; the outermost are infinite."""
    key = torch.arange(1, count) - negative  # of the lower edge, counted from the edge at 0
    steps = torch.where(key < 0, -1 - key, key) + lowest
    magnitude = (steps << (52 - BIN_BITS)).view(torch.float64)
    inner = torch.where(key == 0, 0.0, magnitude.copysign(key.double()))
    infinite = torch.full((1,), torch.inf, dtype=torch.float64)
    return torch.cat((-infinite, inner, infinite))


def count_nonmatches(
    query: Tensor | None,
    gallery: Tensor,
    query_pids: Tensor,
    gallery_pids: Tensor,
    query_camids: Tensor | None,
    gallery_camids: Tensor | None,
    offsets: Tensor,
    distances: Tensor,
    indices: Tensor,
    first: int,
    metric: str,
    bins: tuple[int, int, int],
) -> tuple[Tensor, Tensor]:
    """For every true match, how many valid non-matches come before it in its query's ranking; and all their distances.

    A non-match is valid unless a pid is −1. Item a comes before item b if (distance, gallery index) is smaller. The
    rank of a query's m-th true match (from 1) is m plus this count. The histogram leaves out, besides, the pairs under
    one camera.

    Args:
        query: [Q, D], or None where ``gallery`` holds distances.
        gallery: [G, D] in the same dtype, or [Q, G] distances in any floating dtype, compared as float64.
        query_pids, query_camids: [Q] int32; gallery_pids, gallery_camids: [G] int32. Both camids None: no cameras.
        offsets: [Q + 1] int64; query q's true matches are the entries offsets[q] … offsets[q + 1] − 1 of the next two.
        distances: [M] float64, the true matches' ranking distances (``pair_distances``), ascending within a query.
        indices: [M] int64, their gallery indices, ascending where the distances are equal.
        first: the index of the first item of ``gallery``, which may be a part of a larger one.
        metric: ``"euclidean"`` or ``"cosine"``.
        bins: see ``bin_of``.

    Returns:
        counts [M] int64, and the histogram int64.
    """
    counts = torch.zeros_like(indices)
    histogram = torch.zeros(bins[2], dtype=torch.int64, device=gallery.device)
    for q, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        valid = ((gallery_pids != query_pids[q]) & (gallery_pids != -1) & (query_pids[q] != -1)).nonzero()[:, 0]
        for items in valid.split(_BLOCK_ELEMENTS // NUM_LANES):
            row = (
                gallery[q, items].double()
                if query is None
                else _ranking_distance(query[q : q + 1], gallery[items], metric)
            )
            block = max(1, _BLOCK_ELEMENTS // max(1, len(items)))
            for part in range(begin, end, block):
                match = slice(part, min(part + block, end))
                nearer = row < distances[match, None]
                tied = (row == distances[match, None]) & (first + items < indices[match, None])
                counts[match] += (nearer | tied).sum(dim=1)
            if query_camids is not None and gallery_camids is not None:
                row = row[gallery_camids[items] != query_camids[q]]
            histogram += torch.bincount(bin_of(row, *bins), minlength=bins[2])
    return counts, histogram


# ---- re-ranking by k-reciprocal neighbours, on sparse rows (offsets, columns, values): see retrieval/reranking.py ----


def _row(rows: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    begin, end = rows[0][index : index + 2].tolist()
    return tuple(part[begin:end] for part in rows[1:])


def _sparse_rows(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    offsets = torch.tensor([0, *(len(part[0]) for part in parts)]).cumsum(0)
    return (offsets, *(torch.cat(column) for column in zip(*parts, strict=True)))


def reciprocal_neighbors(neighbors: Tensor, k_width: int, half_width: int) -> tuple[Tensor, Tensor]:
    """R*(i), ascending, for every item: R(i, k1), and every R(j, k1/2) with j in R(i, k1) that has more than two thirds
    of its items in common with it. R(i, k): those of i's k neighbours that have i among their own k."""
    lists = neighbors.tolist()

    def reciprocal(item: int, width: int) -> set[int]:
        return {other for other in lists[item][:width] if item in lists[other][:width]}

    parts = []
    for item in range(len(lists)):
        first = reciprocal(item, k_width)
        expanded = set(first)
        for other in first:
            second = reciprocal(other, half_width)
            if 3 * len(second & first) > 2 * len(second):
                expanded |= second
        parts.append((torch.tensor(sorted(expanded), dtype=torch.int64),))
    offsets, columns = _sparse_rows(parts)
    return offsets, columns


def mean_of_rows(rows: tuple[Tensor, Tensor, Tensor], neighbors: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of ``rows`` [N, N] over the first ``k`` of each item's neighbours."""
    parts = []
    for items in neighbors[:, :k].tolist():
        total = torch.zeros(len(neighbors), dtype=torch.float64)
        for item in items:
            columns, values = _row(rows, item)
            total[columns] += values
        columns = total.nonzero()[:, 0]
        parts.append((columns, total[columns] / k))
    offsets, columns, values = _sparse_rows(parts)
    return offsets, columns, values


def reranked_distances(
    query: Tensor,
    gallery: Tensor,
    metric: str,
    largest: Tensor,
    query_rows: tuple[Tensor, Tensor, Tensor],
    columns: tuple[Tensor, Tensor, Tensor],
    lam: float,
) -> Tensor:
    """(1 − λ) (1 − m / (2 − m)) + λ d / largest, where m[q, g] = Σ_c min(query_rows[q, c], columns[c, g])."""
    items = torch.arange(len(gallery))
    result = torch.empty(len(query), len(gallery), dtype=torch.float64)
    for q in range(len(query)):
        shared = torch.zeros(len(gallery), dtype=torch.float64)
        for column, value in zip(*_row(query_rows, q), strict=True):
            others, values = _row(columns, int(column))
            shared[others] += values.minimum(value)
        distances = pair_distances(query, gallery, torch.full_like(items, q), items, metric)
        scale = lam / float(largest[q]) if largest[q] > 0 else 0.0
        result[q] = (1.0 - lam) * (1.0 - shared / (2.0 - shared)) + scale * distances
    return result
