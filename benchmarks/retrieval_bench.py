"""Exact evaluation at Market-1501's gallery size, against the bare product and against sorting each row with numpy.

    python benchmarks/retrieval_bench.py [--queries 500] [--gallery 19732] [--dim 1024] [--threads N]

Labels are made up with Market-1501's proportions: 15 % distractors, 20 % junk, the rest of 750 identities, 6 cameras.
"""

import argparse

import numpy as np
import torch
from timing import interleaved

import sabmn_ext


def argsort_map(query: np.ndarray, gallery: np.ndarray, labels: tuple[np.ndarray, ...]) -> float:
    """The usual evaluation: a distance matrix, an argsort of every row, a loop over the queries."""
    query_pids, gallery_pids, query_camids, gallery_camids = labels
    distances = (query**2).sum(1)[:, None] + (gallery**2).sum(1) - 2 * query @ gallery.T
    order = np.argsort(distances, axis=1)
    precisions = []
    for q in range(len(query)):
        pids, camids = gallery_pids[order[q]], gallery_camids[order[q]]
        keep = (pids != -1) & ~((pids == query_pids[q]) & (camids == query_camids[q]))
        matches = pids[keep] == query_pids[q]
        if matches.any():
            ranks = np.flatnonzero(matches) + 1
            precisions.append((np.arange(1, len(ranks) + 1) / ranks).mean())
    return float(np.mean(precisions))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--gallery", type=int, default=19732)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rng = np.random.default_rng(0)
    people = rng.normal(size=(751, options.dim)).astype(np.float32)
    gallery_pids = rng.choice([-1, 0, 1], p=[0.20, 0.15, 0.65], size=options.gallery)
    gallery_pids[gallery_pids == 1] = rng.integers(1, 751, size=(gallery_pids == 1).sum())
    query_pids = rng.integers(1, 751, size=options.queries)
    camids = rng.integers(6, size=options.queries), rng.integers(6, size=options.gallery)

    def features(pids: np.ndarray) -> np.ndarray:
        return people[np.maximum(pids, 0)] + 4 * rng.normal(size=(len(pids), options.dim)).astype(np.float32)

    query, gallery = features(query_pids), features(gallery_pids)
    labels = (query_pids, gallery_pids, *camids)
    a, b = torch.from_numpy(query), torch.from_numpy(gallery)
    found = sabmn_ext.evaluate_retrieval(query, gallery, *labels).map
    assert abs(found - argsort_map(query, gallery, labels)) < 1e-4
    seconds = interleaved(
        {
            "ours": lambda: sabmn_ext.evaluate_retrieval(query, gallery, *labels),
            "product": lambda: a @ b.T,
            "argsort": lambda: argsort_map(query, gallery, labels),
        },
        options.rounds,
    )
    print(f"{options.queries} × {options.gallery} × {options.dim}, {options.threads} threads, mAP {found:.4f}")
    print(f"ours {seconds['ours']:.2f} s, the product alone {seconds['product']:.2f} s, product + argsort + loop "
          f"{seconds['argsort']:.2f} s; argsort / ours {seconds['argsort'] / seconds['ours']:.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
