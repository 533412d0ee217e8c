"""Cases for the retrieval ops: labels, features that are hard to rank, and the call of the ops for them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.ops import retrieval

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Case:
    """Both sides' codes, and every other item with the query's pid as its true matches."""

    query_pids: Tensor
    gallery_pids: Tensor  # with junk
    query_camids: Tensor | None
    gallery_camids: Tensor | None
    offsets: Tensor
    matches: Tensor

    def part(self, first: int, last: int) -> "Case":
        """The queries first … last − 1."""
        begin, end = self.offsets[first], self.offsets[last]
        offsets = self.offsets[first : last + 1] - begin
        camids = None if self.query_camids is None else self.query_camids[first:last]
        pids = self.query_pids[first:last]
        return Case(pids, self.gallery_pids, camids, self.gallery_camids, offsets, self.matches[begin:end])


def draw_case(num_queries: int, num_gallery: int, seed: int, pids: int = 6, cameras: bool = True) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def draw(lowest: int, highest: int, count: int) -> Tensor:
        return torch.randint(lowest, highest, (count,), generator=generator, dtype=torch.int32)

    query_pids, gallery_pids = draw(-1, pids, num_queries), draw(-1, pids, num_gallery)
    camids = (draw(0, 3, num_queries), draw(0, 3, num_gallery)) if cameras else (None, None)
    lists = [((gallery_pids == pid) & (pid != -1)).nonzero()[::2, 0] for pid in query_pids]
    offsets = torch.tensor([0, *(len(items) for items in lists)]).cumsum(0)
    return Case(query_pids, gallery_pids, *camids, offsets, torch.cat(lists))


def rank(
    query: Tensor | None,
    gallery: Tensor,
    case: Case,
    metric: str = "euclidean",
    backend: str | None = None,
    first: int = 0,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The ranks of the matches, and the histogram of the non-matches; made on ``device``, returned on the CPU."""
    query, gallery = None if query is None else query.to(device), gallery.to(device)
    query_of = torch.repeat_interleave(torch.arange(len(case.query_pids)), case.offsets.diff())
    if query is None:
        distances, exponent = gallery.cpu()[query_of, case.matches].double(), 64
    else:
        norms = [torch.ops.sabmn_ext.squared_norms(x, backend).max() for x in (query, gallery)]
        exponent = retrieval.distance_exponent(float(max(norms)), metric)
        pairs = query_of.to(device), case.matches.to(device)
        distances = torch.ops.sabmn_ext.pair_distances(query, gallery, *pairs, metric, backend).cpu()
    order = np.lexsort((case.matches, distances, query_of))
    labels = case.query_pids, case.gallery_pids, case.query_camids, case.gallery_camids, case.offsets
    matches = distances[order], case.matches[order] + first
    codes = (None if x is None else x.to(device) for x in (*labels, *matches))
    counts, histogram = torch.ops.sabmn_ext.count_nonmatches(query, gallery, *codes, first, metric, exponent, backend)
    return counts.cpu() + torch.arange(1, len(order) + 1) - case.offsets[query_of], histogram.cpu()


def assert_same(ours: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], message: object = None) -> None:
    assert torch.equal(ours[0], expected[0]), message
    assert torch.equal(ours[1], expected[1]), message


def draw_features(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    features = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    features[rows // 2 :] = features[: rows - rows // 2].clone()  # every item has a duplicate: exact ties
    return features


def near_duplicates(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Raw features of little spread, far from 0: ‖q‖² + ‖g‖² − 2qg has no correct digit left."""
    generator = torch.Generator().manual_seed(seed)
    base = 30 * torch.randn(1, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    return (base + 1e-3 * torch.randn(rows, dim, generator=generator, dtype=torch.float64)).to(dtype)


def small_integers(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-2, 3, (rows, dim), generator=generator) + 5 * (torch.arange(dim) == 0)).to(dtype)


def next_to_ties(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """All at one distance from the origin but for the last bit of a coordinate or two."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (rows, dim), generator=generator) * 2 - 1
    wobble = torch.randint(-1, 2, (rows, dim), generator=generator) * (torch.rand(rows, dim, generator=generator) < 0.1)
    return (signs * (1 + torch.finfo(dtype).eps * wobble)).to(dtype)


def one_point(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """A collapsed model."""
    return torch.linspace(0.1, 0.9, dim).repeat(rows, 1).to(dtype)


def almost_one_point(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Apart by the last bits: a cosine's own rounding error is larger than its distance from 1."""
    generator = torch.Generator().manual_seed(seed)
    noise = 1 + 3 * torch.finfo(dtype).eps * torch.randn(rows, dim, dtype=torch.float64, generator=generator)
    return (torch.linspace(0.1, 0.9, dim, dtype=torch.float64) * noise).to(dtype)


def huge_and_tiny(rows: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of very different length: most vanish in float32 at the scale of the longest."""
    exponents = torch.linspace(-1, 1, rows, dtype=torch.float64)[torch.randperm(rows)]
    scale = 2.0 ** (exponents * {torch.float16: 3, torch.float32: 40, torch.bfloat16: 40, torch.float64: 300}[dtype])
    return (scale[:, None] * torch.randn(rows, dim, dtype=torch.float64)).to(dtype)


DRAWS = (draw_features, near_duplicates, small_integers, next_to_ties, one_point, almost_one_point, huge_and_tiny)


def one_sided_rounding(dim: int, seed: int) -> float:
    """A number whose square, summed ``dim`` times in float32, is rounded almost always in the same direction."""
    candidates = np.random.default_rng(seed).uniform(1, 2, 4000).astype(np.float32)
    squares = candidates.astype(np.float64) ** 2
    chunk, total = np.zeros_like(candidates), np.zeros_like(candidates)
    for k in range(1, dim + 1):
        chunk = (chunk + squares).astype(np.float32)
        if k % 64 == 0:  # csrc/retrieval/count_cpu.cpp
            chunk, total = np.zeros_like(candidates), total + chunk
    error = np.abs(total / (dim * squares) - 1)
    assert error.max() > 15 * 2**-24
    return float(candidates[error.argmax()])
