"""k-reciprocal re-ranking and exact search, against the usual forms with matrices of all pairs.

    python benchmarks/rerank_bench.py [--labels FILE.npz] [--dim 1024] [--threads 2] [--rounds 3] [--scale 1]
    python benchmarks/rerank_bench.py --memory          # peak memory of ours, in a process of its own

At Market-1501's size without junk (3,368 queries, 15,913 gallery images; times --scale): ours, features in, mAP of the
re-ranked lists out; the re-ranking alone; and the dense NumPy form in float32 as it is published (argsort of every row,
N × N weights, an inverted index), with the same mAP at its end. It needs some 9 GB and minutes at the full size, and
runs once. Then the search: topk against product, and product with argsort. Labels: as in retrieval_bench.py.
"""

import argparse
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from retrieval_bench import MARKET, Labels, distance_matrix, draw_labels, read_labels, resident_bytes
from timing import interleaved, wall_clock

import sabmn_ext

K1, K2, LAMBDA = 20, 6, 0.3


def reciprocal(order: np.ndarray, item: int, k: int) -> np.ndarray:
    forward = order[item, : k + 1]
    return forward[(order[forward, : k + 1] == item).any(axis=1)]


def dense_rerank(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """[Q, G] float32, by matrices of all pairs."""
    items = np.concatenate((query, gallery))
    num_queries, count = len(query), len(items)
    distances = distance_matrix(items, items)
    np.fill_diagonal(distances, 0)
    distances /= distances.max(axis=1, keepdims=True)
    order = np.argsort(distances, axis=1).astype(np.int32)
    weights = np.zeros((count, count), np.float32)
    for i in range(count):
        first = reciprocal(order, i, K1)
        parts = [first]
        for j in first:
            second = reciprocal(order, j, round(K1 / 2))
            if len(np.intersect1d(second, first)) > 2 / 3 * len(second):
                parts.append(second)
        members = np.unique(np.concatenate(parts))
        values = np.exp(-distances[i, members])
        weights[i, members] = values / values.sum()
    distances = distances[:num_queries].copy()
    weights = np.stack([weights[order[i, :K2]].mean(axis=0) for i in range(count)])
    del order
    having = [np.flatnonzero(column) for column in weights.T]
    result = np.empty((num_queries, count - num_queries), np.float32)
    for q in range(num_queries):
        shared = np.zeros(count, np.float32)
        for column in np.flatnonzero(weights[q]):
            others = having[column]
            shared[others] += np.minimum(weights[q, column], weights[others, column])
        jaccard = 1 - shared / (2 - shared)
        result[q] = ((1 - LAMBDA) * jaccard + LAMBDA * distances[q])[num_queries:]
    return result


def draw_people(query_pids: np.ndarray, gallery_pids: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A direction for each person and 2.5 times as much noise: mAP is that of a trained network, about 0.8."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(2000, dim, generator=generator)
    sides = []
    for pids in (query_pids, gallery_pids):
        noise = 2.5 * torch.randn(len(pids), dim, generator=generator)
        sides.append((people[torch.from_numpy(np.maximum(pids, 0) % 2000)] + noise).numpy())
    return sides[0], sides[1]


def make(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, Labels]:
    """Features and labels without junk."""
    query_pids, gallery_pids, query_camids, gallery_camids = (
        read_labels(options.labels) if options.labels else draw_labels(*MARKET)
    )
    kept = np.flatnonzero(gallery_pids != -1)
    step = round(1 / options.scale)
    queries, kept = slice(None, None, step), kept[::step]
    labels = query_pids[queries], gallery_pids[kept], query_camids[queries], gallery_camids[kept]
    return *draw_people(labels[0], labels[1], options.dim), labels


def compare_reranking(options: argparse.Namespace) -> None:
    query, gallery, labels = make(options)
    items = torch.from_numpy(np.concatenate((query, gallery)))

    def ours() -> float:
        return sabmn_ext.evaluate_distances(sabmn_ext.rerank(query, gallery), *labels).map

    found: dict[str, float] = {}

    def dense() -> None:
        found["dense"] = sabmn_ext.evaluate_distances(dense_rerank(query, gallery), *labels).map

    candidates: dict[str, Callable[[], object]] = {
        "ours, mAP included": ours,
        "ours, the lists alone": lambda: sabmn_ext.rerank(query, gallery),
        "product of all pairs": lambda: items @ items.T,
    }
    seconds = interleaved(candidates, options.rounds)
    if not options.no_dense:
        seconds["dense NumPy, mAP included"] = wall_clock(dense)
    plain = sabmn_ext.evaluate_retrieval(query, gallery, *labels).map
    print(
        f"{len(query)} × {len(gallery)} × {options.dim}, {options.threads} threads; "
        f"mAP {plain:.4f}, re-ranked {ours():.4f}"
        + (f", by the dense form {found['dense']:.4f}" if found else "")
    )
    print(f"{'':28}{'seconds':>9}{'/ ours':>9}")
    for name, value in seconds.items():
        print(f"{name:28}{value:9.2f}{value / seconds['ours, mAP included']:9.2f}")


def compare_search(options: argparse.Namespace) -> None:
    query, gallery, _ = make(options)
    a, b = torch.from_numpy(query), torch.from_numpy(gallery)
    lengths = [min(k, len(gallery)) for k in (10, 100, 1000)]

    def by_product(k: int) -> object:
        return torch.from_numpy(distance_matrix(query, gallery)).topk(k, largest=False)

    candidates: dict[str, Callable[[], object]] = {
        f"ours, k = {k}": (lambda k=k: sabmn_ext.topk(query, gallery, k)) for k in lengths
    }
    candidates |= {f"product, torch.topk, k = {k}": (lambda k=k: by_product(k)) for k in lengths}
    candidates |= {
        "product alone": lambda: a @ b.T,
        "product, argsort": lambda: np.argsort(distance_matrix(query, gallery), axis=1),
    }
    seconds = interleaved(candidates, options.rounds)
    print(f"search, {len(query)} × {len(gallery)} × {options.dim}, {options.threads} threads")
    print(f"{'':28}{'seconds':>9}{'/ product':>11}")
    for name, value in seconds.items():
        print(f"{name:28}{value:9.3f}{value / seconds['product alone']:11.2f}")


def measure_memory(options: argparse.Namespace) -> None:
    query, gallery, labels = make(options)
    before = resident_bytes()
    value = sabmn_ext.evaluate_distances(sabmn_ext.rerank(query, gallery), *labels).map
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{len(query)} × {len(gallery)} × {options.dim}: resident before {before / 2**20:.0f} MiB, features "
        f"({(query.nbytes + gallery.nbytes) / 2**20:.0f} MiB), Python and torch included; at the most "
        f"{peak / 2**20:.0f} MiB; mAP {value:.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, metavar="FILE.npz")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1, help="share of queries and gallery: 1, 0.5, 0.25")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense form out")
    parser.add_argument("--only", choices=("rerank", "search"))
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_here:
        measure_memory(options)
    elif options.memory:
        command = [sys.executable, __file__, "--memory-here", *(x for x in sys.argv[1:] if x != "--memory")]
        subprocess.run(command, check=True)
    else:
        if options.only != "search":
            compare_reranking(options)
        if options.only != "rerank":
            compare_search(options)


if __name__ == "__main__":
    main()
