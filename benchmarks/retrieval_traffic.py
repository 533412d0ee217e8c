"""Bytes that the CUDA launches of the ranking move, and their tensor-core instructions, from the sizes.

    python benchmarks/retrieval_traffic.py [--queries 3368] [--gallery 19732] [--dim 1024] [--matches 14.7]

The default is Market-1501's test set. `distinct` counts every byte once that a launch reads or writes. `floor` leaves
out what only the plan costs: rows and features that fill a block up, and the list of open pairs. `read again` comes on
top of distinct, from L2. `mma` are the m16n8k8 instructions issued, three for a product of float32, and `least` those
that the sizes need. The launches of all tiles of the gallery are added up. `µs` is the least time on an H100 at its
highest rates, the longest of four: bytes (3.35 TB/s), bytes of L2 (5.5 TB/s), mma (495 TFLOP/s), float64 (64 a cycle of
each of 132 multiprocessors: no multiply-add, the exact distances have none).

How many pairs the filter leaves open depends on the features. Counted here is what the bound leaves open of the bins of
the histogram where the rows of both sides, less the centre, are of one length and at right angles; those near a true
match's distance come on top.

Under the table stands what the other plan would move: products to a matrix in L2, and from there to the counters.
"""

import argparse
import math
from dataclasses import dataclass

from traffic_table import print_launches

from sabmn_ext.ops import gpu_ranking, reference

FLOAT, DOUBLE, INDEX, LABEL = 4, 8, 8, 4  # bytes
MMA = 16 * 8 * 8  # multiplications of one instruction

# csrc/retrieval/retrieval_cuda.h and retrieval_filter_kernels.cuh
SIDE, DEPTH, WARP_SIDE = 128, 32, 32
CHUNK, STEP = 64, 8
LISTED = 4  # bytes of a pair
UNIT_ROUNDOFF = 2.0**-24


@dataclass
class Launch:
    distinct: float = 0  # bytes
    floor: float = 0
    read_again: float = 0
    mma: float = 0
    least: float = 0
    double: float = 0  # operations

    def add(self, other: "Launch") -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def microseconds(self) -> float:
        moved = max(self.distinct / 3.35e6, (self.distinct + self.read_again) / 5.5e6)
        return max(moved, self.mma * 2 * MMA / 495e6, self.double / (132 * 64 * 1755))


def blocks(size: int, unit: int) -> int:
    return -(-size // unit)


def ceil_to(size: int, unit: int) -> int:
    return blocks(size, unit) * unit


def product_error(dim: int) -> float:
    """``tensor_product_error`` of csrc/retrieval/retrieval_cuda.cu."""
    sums = (CHUNK // STEP + blocks(dim, CHUNK) + 1) * UNIT_ROUNDOFF
    return 46 * UNIT_ROUNDOFF + 1.01 * sums / (1 - sums)


def open_share(dim: int) -> float:
    """Of the pairs, where A = B and a·b = 0: the enclosing interval over the mean width of a bin, both of x = A + B."""
    u = UNIT_ROUNDOFF
    error = product_error(dim) * (1 + u) ** 2 + 2 * u + u * u + 8 * u  # of x; csrc/retrieval/bound.h
    bins = 2**reference.BIN_BITS / math.log(2)  # x over the width, for mantissas that are as Benford has them
    return min(2 * error * bins, 1.0)


def traffic(queries: int, gallery: int, dim: int, matches: int) -> dict[str, Launch]:
    """Every launch for squared Euclidean distances of float32 features; no item is junk."""
    deep = ceil_to(dim, DEPTH)
    rows = FLOAT * dim
    share = open_share(dim)
    launches = {name: Launch() for name in ("true matches", "pack queries", "pack gallery", "filter", "refine")}
    distinct = min(queries + matches, queries + gallery) * rows + matches * (2 * INDEX + DOUBLE)
    launches["true matches"].add(
        Launch(distinct, distinct, max(2 * matches * rows - distinct, 0), double=3 * matches * dim)
    )

    def pack(count: int) -> Launch:
        read, center = count * rows + count * INDEX, DOUBLE * dim
        written = ceil_to(count, SIDE) * (FLOAT * deep + 3 * FLOAT)
        return Launch(
            read + center + written, read + center + count * (rows + 3 * FLOAT), (blocks(count, 16) - 1) * center,
            double=5 * count * dim,
        )  # fmt: skip

    launches["pack queries"].add(pack(queries))
    tile = min(gpu_ranking._TILE_ROWS, max(SIDE, gpu_ranking._TILE_PAIRS // queries))
    for first in range(0, gallery, tile):
        items = min(tile, gallery - first)
        launches["pack gallery"].add(pack(items))
        of_query, of_item = 3 * FLOAT + 2 * LABEL + INDEX, 3 * FLOAT + 2 * LABEL + INDEX
        labels = queries * of_query + items * of_item + matches * 2 * FLOAT
        counters = 2 * INDEX * (matches + 2**16)
        listed = share * queries * items
        a, b = (ceil_to(count, SIDE) * FLOAT * deep for count in (queries, items))
        issued = ceil_to(queries, WARP_SIDE) * ceil_to(items, WARP_SIDE) * deep * 3 / MMA
        launches["filter"].add(
            Launch(
                a + b + labels + counters + LISTED * listed,
                (queries + items) * rows + labels + counters,
                (blocks(items, SIDE) - 1) * a + (blocks(queries, SIDE) - 1) * b,
                issued,
                queries * items * dim * 3 / MMA,
            )
        )
        both = (queries + items) * rows
        launches["refine"].add(
            Launch(
                both + LISTED * listed + counters,
                both + counters,
                # pairs of a query follow one another: its row comes from L1 for most of them
                max(listed * rows - items * rows, 0),
                double=3 * listed * dim,
            )
        )
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=3368)
    parser.add_argument("--gallery", type=int, default=19732)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--matches", type=float, default=14.7, help="of a query, on average")
    options = parser.parse_args()
    sizes = options.queries, options.gallery, options.dim, round(options.queries * options.matches)
    launches = traffic(*sizes)
    print(f"{sizes[0]} × {sizes[1]} × {sizes[2]}, {sizes[3]} true matches; MB, millions of mma")
    print(f"open pairs: {open_share(options.dim):.2%}, {open_share(options.dim) * options.gallery:.0f} a query")
    print_launches(launches)
    pairs = options.queries * options.gallery
    one_pass = FLOAT * options.dim * (options.queries + options.gallery)
    total = sum(one.distinct for one in launches.values())
    print(f"all: {total / 1e6:.0f} MB, one-pass floor (both sides once) {one_pass / 1e6:.0f} MB")
    print(f"products through L2 instead: {2 * FLOAT * pairs / 1e6:.0f} MB more to write and read")


if __name__ == "__main__":
    main()
