"""Exact evaluation, against the bare product and against the usual evaluation by sorting.

    python benchmarks/retrieval_bench.py [--labels FILE.npz] [--dim 1024] [--threads 2] [--rounds 3]
    python benchmarks/retrieval_bench.py --memory           # peak memory at MSMT17's size, in a process of its own
    python benchmarks/retrieval_bench.py --plot FILE.png    # time over queries × gallery

The first form takes the candidates in turns at Market-1501's size: ours (features in, all figures out, the checks
included); torch.mm, with and without an output that is there already; product + argsort of every row + a compiled loop
(one thread as in the published codes; and with rows shared among the threads), both left out where numba is not
installed; and the same with a Python loop, on every 40th query, times 40. Labels: the arrays query_pids, query_camids,
gallery_pids, gallery_camids of a file, or made-up ones of Market-1501's proportions.
"""

import argparse
import importlib.util
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from timing import interleaved

import sabmn_ext

MARKET, MSMT17 = (3368, 19732), (11659, 82161)
PYTHON_SHARE = 40
Labels = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def draw_labels(num_queries: int, num_gallery: int) -> Labels:
    """pids and cameras of both sides: of the gallery 19.4 % junk and 14.2 % distractors, 750 people, 6 cameras."""
    rng = np.random.default_rng(0)
    gallery_pids = rng.integers(1, 751, size=num_gallery)
    kind = rng.random(num_gallery)
    gallery_pids[kind < 3819 / 19732] = -1
    gallery_pids[kind > 1 - 2798 / 19732] = 0
    query_pids = rng.integers(1, 751, size=num_queries)
    return query_pids, gallery_pids, rng.integers(6, size=num_queries), rng.integers(6, size=num_gallery)


def read_labels(file: Path) -> Labels:
    with np.load(file) as arrays:
        names = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")
        return tuple(arrays[name].astype(np.int64) for name in names)  # type: ignore[return-value]


def draw_features(query_pids: np.ndarray, gallery_pids: np.ndarray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """A direction for each person, and four times as much noise."""
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(2000, dim, generator=generator)

    def features(pids: np.ndarray) -> np.ndarray:
        noise = torch.randn(len(pids), dim, generator=generator).mul_(4)
        for first in range(0, len(pids), 4096):  # in blocks: --memory measures the peak
            noise[first : first + 4096] += people[torch.from_numpy(np.maximum(pids[first : first + 4096], 0) % 2000)]
        return noise.numpy()

    return features(query_pids), features(gallery_pids)


# ---- the usual evaluation: a distance matrix, its argsort, a loop over the queries ----


def distance_matrix(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    a, b = torch.from_numpy(query), torch.from_numpy(gallery)
    squares = a.square().sum(1)[:, None], b.square().sum(1)[None]
    return torch.addmm(squares[0] + squares[1], a, b.T, alpha=-2).numpy()


def python_loop(order: np.ndarray, labels: Labels, max_rank: int = 50) -> tuple[float, np.ndarray]:
    query_pids, gallery_pids, query_camids, gallery_camids = labels
    aps, cmcs = [], []
    for q in range(len(order)):
        pids, camids = gallery_pids[order[q]], gallery_camids[order[q]]
        keep = (pids != -1) & ~((pids == query_pids[q]) & (camids == query_camids[q]))
        matches = (pids[keep] == query_pids[q]).astype(np.int32)
        if not matches.any():
            continue
        found = matches.cumsum()
        cmcs.append(np.minimum(found, 1)[:max_rank])
        precision = [x / (i + 1.0) for i, x in enumerate(found)]
        aps.append((np.asarray(precision) * matches).sum() / matches.sum())
    return float(np.mean(aps or [np.nan])), np.mean(cmcs or [[np.nan]], axis=0)


def compiled_loops() -> tuple[Callable[..., float], Callable[..., float]]:
    """The loop over a given order; and a loop that sorts each row itself and shares the rows among the threads."""
    import numba

    @numba.njit(cache=False)
    def average_precision(order, query_pid, query_camid, gallery_pids, gallery_camids):  # type: ignore[no-untyped-def]
        rank = found = 0
        total = 0.0
        for item in order:
            pid = gallery_pids[item]
            if pid == -1 or (pid == query_pid and gallery_camids[item] == query_camid):
                continue
            rank += 1
            if pid == query_pid:
                found += 1
                total += found / rank
        return total / found if found else np.nan

    @numba.njit(cache=False)
    def loop(order, query_pids, gallery_pids, query_camids, gallery_camids):  # type: ignore[no-untyped-def]
        aps = np.empty(len(order))
        for q in range(len(order)):
            aps[q] = average_precision(order[q], query_pids[q], query_camids[q], gallery_pids, gallery_camids)
        return np.nanmean(aps)

    @numba.njit(cache=False, parallel=True)
    def sort_and_loop(distances, query_pids, gallery_pids, query_camids, gallery_camids):  # type: ignore[no-untyped-def]
        aps = np.empty(len(distances))
        for q in numba.prange(len(distances)):
            order = np.argsort(distances[q])
            aps[q] = average_precision(order, query_pids[q], query_camids[q], gallery_pids, gallery_camids)
        return np.nanmean(aps)

    return loop, sort_and_loop


def compare(labels: Labels, options: argparse.Namespace) -> None:
    query, gallery = draw_features(labels[0], labels[1], options.dim)
    a, b = torch.from_numpy(query), torch.from_numpy(gallery)
    out = torch.empty(len(query), len(gallery))
    few = query[::PYTHON_SHARE], (labels[0][::PYTHON_SHARE], labels[1], labels[2][::PYTHON_SHARE], labels[3])

    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: sabmn_ext.evaluate_retrieval(query, gallery, *labels),
        "sgemm, output there": lambda: torch.mm(a, b.T, out=out),
        "sgemm": lambda: torch.mm(a, b.T),
        "argsort, Python": lambda: python_loop(np.argsort(distance_matrix(few[0], gallery), axis=1), few[1]),
    }
    found = sabmn_ext.evaluate_retrieval(query, gallery, *labels)
    if importlib.util.find_spec("numba"):
        import numba

        numba.set_num_threads(options.threads)
        loop, sort_and_loop = compiled_loops()
        candidates |= {
            "argsort, compiled": lambda: loop(np.argsort(distance_matrix(query, gallery), axis=1), *labels),
            "argsort, compiled, threads": lambda: sort_and_loop(distance_matrix(query, gallery), *labels),
        }
        for name in ("argsort, compiled", "argsort, compiled, threads"):
            assert abs(candidates[name]() - found.map) < 1e-4, name  # type: ignore[operator]
    else:
        print("numba is not installed: no comparison with compiled code")
    seconds = interleaved(candidates, options.rounds)
    seconds["argsort, Python"] *= len(query) / len(few[0])
    print(f"{len(query)} × {len(gallery)} × {options.dim}, {options.threads} threads, mAP {found.map:.4f}")
    print(f"{'':28}{'seconds':>9}{'/ sgemm, output there':>23}{'/ ours':>9}")
    for name, value in seconds.items():
        print(f"{name:28}{value:9.3f}{value / seconds['sgemm, output there']:23.2f}{value / seconds['ours']:9.1f}")


# ---- memory and growth ----


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def measure_memory(dim: int) -> None:
    labels = draw_labels(*MSMT17)
    query, gallery = draw_features(labels[0], labels[1], dim)
    before, start = resident_bytes(), time.perf_counter()
    result = sabmn_ext.evaluate_retrieval(query, gallery, *labels)
    seconds = time.perf_counter() - start
    peak, features = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, query.nbytes + gallery.nbytes
    print(f"{len(query)} × {len(gallery)} × {dim}: {features / 2**20:.0f} MiB of features; resident before "
          f"{before / 2**20:.0f} MiB, at the most {peak / 2**20:.0f} MiB: {(peak - features) / 2**20:.0f} MiB beyond "
          f"the features, Python and torch included; {seconds:.1f} s, mAP {result.map:.4f}")  # fmt: skip


def plot_growth(file: Path, options: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = [(q, g) for q in (421, 842, 1684, 3368) for g in (2466, 4933, 9866, 19732)]
    labels = draw_labels(*MARKET)
    query, gallery = draw_features(labels[0], labels[1], options.dim)

    def run(q: int, g: int) -> Callable[[], object]:
        few = labels[0][:q], labels[1][:g], labels[2][:q], labels[3][:g]
        return lambda: sabmn_ext.evaluate_retrieval(query[:q], gallery[:g], *few)

    seconds = interleaved({f"{q} {g}": run(q, g) for q, g in sizes}, options.rounds)
    pairs = np.array([q * g for q, g in sizes], float)
    values = np.array(list(seconds.values()))
    slope, intercept = np.polyfit(pairs, values, 1)
    deviation = np.abs(values / (slope * pairs + intercept) - 1).max()
    print(f"{1e9 * slope:.2f} ns a pair and {1e3 * intercept:.0f} ms; at most {100 * deviation:.0f} % from that line")
    figure, axes = plt.subplots(figsize=(6, 4))
    for g in sorted({g for _, g in sizes}):
        chosen = [i for i, size in enumerate(sizes) if size[1] == g]
        axes.plot(pairs[chosen] / 1e6, values[chosen], "o-", label=f"gallery {g:,}")
    axes.plot(np.sort(pairs) / 1e6, slope * np.sort(pairs) + intercept, "k:", label="line")
    axes.set(xlabel="queries × gallery, millions", ylabel="seconds", xlim=0, ylim=0)
    axes.set_title(f"evaluate_retrieval, {options.dim} features, {options.threads} threads")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, metavar="FILE.npz")
    parser.add_argument("--queries", type=int, default=MARKET[0], help="number of made-up labels")
    parser.add_argument("--gallery", type=int, default=MARKET[1], help="number of made-up labels")
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--memory-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_here:
        measure_memory(options.dim)
    elif options.memory:
        command = [sys.executable, __file__, "--memory-here", f"--dim={options.dim}", f"--threads={options.threads}"]
        subprocess.run(command, check=True)
    elif options.plot:
        plot_growth(options.plot, options)
    else:
        sizes = options.queries, options.gallery
        compare(read_labels(options.labels) if options.labels else draw_labels(*sizes), options)


if __name__ == "__main__":
    main()
