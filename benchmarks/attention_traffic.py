"""Bytes that the CUDA launches of self-attention move, and their tensor-core instructions, from the shapes.

    python benchmarks/attention_traffic.py [--batch 64] [--stages 1 2 3 4]

`distinct` counts every byte once that a launch reads or writes. `floor` leaves out what only its cutting into blocks
costs: of the weights' gradients one partial sum is written. `read again` comes on top of distinct, from L2. `mma` are
the m16n8k16 instructions issued, `least` those that the products' sizes need. Beyond 128 positions the logits and
their slopes are found twice for the attention's gradients, once by the owners of queries and once by those of keys,
for no sum is atomic: 7 products where 5 are the least. The one-pass floor is that of the whole operation: x in and y
out; x, grad_y in and grad_x out. `µs` is the least time on an H100 at its highest rates, the longest of three: bytes
(3.35 TB/s), mma (989 TFLOP/s), exponentials (16 a cycle of each of 132 multiprocessors); the last two on as many of
these as there are blocks.

Under such a table stands what 5 products would take there: blocks that own keys, as many an image as it takes to hold
the sums of theirs in shared memory, one to a multiprocessor, in rounds; they have a part each of every query's
gradient, in float32, to be written and added up by another launch.
"""

import argparse
from dataclasses import dataclass

from traffic_table import print_launches

ELEMENT = 2  # bytes of bfloat16 and float16
FLOAT = 4
MMA = 16 * 8 * 16  # multiplications of one instruction

# csrc/attention/*_kernels.cuh and attention_backward_cuda.cu
SIDE, DEPTH = 128, 32  # of the products' blocks and slices
WANTED_BLOCKS, PART_CHANNELS = 256, 256  # attention_forward_cuda.cu
BACKWARD_SIDE = BACKWARD_PANEL = 64
SHARED = 227 << 10  # of a block on sm_90
BLOCK_POSITIONS = 128  # up to which one block makes all gradients of an image
ROW_POSITIONS = 32
WEIGHT_BLOCKS = 128

# ResNet-50 at 256 × 128, last stride 1: stage → channels, positions, width
STAGES = {1: (256, 2048, 32), 2: (512, 512, 64), 3: (1024, 128, 128), 4: (2048, 128, 256)}


@dataclass
class Launch:
    distinct: int  # bytes
    floor: int
    read_again: int
    mma: int
    least: int
    exponentials: int = 0
    blocks: int = 132

    @property
    def microseconds(self) -> float:
        share = min(self.blocks / 132, 1)
        busy = max(self.mma * 2 * MMA / 989e6, self.exponentials / (132 * 16 * 1755))
        return max(self.distinct / 3.35e6, busy / share)


def ceil_to(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def blocks(size: int, unit: int) -> int:
    return -(-size // unit)


def product_mma(rows: int, columns: int, *depths: int) -> int:
    """A product by blocks of 128 × 128: a warp has 32 rows and 64 columns, or 32 where there are no more."""
    return ceil_to(rows, 32) * ceil_to(columns, 32) * sum(ceil_to(depth, DEPTH) for depth in depths) // MMA


def weight_groups(batch: int, channels: int, width: int, value_width: int) -> int:
    """How many partial sums the weights' gradients have: one for each group of images."""
    stacked = 2 * width + value_width
    tiles = blocks(stacked, SIDE) * blocks(channels, SIDE) + blocks(channels, SIDE) * blocks(value_width, SIDE)
    wanted = min(max(WEIGHT_BLOCKS // tiles, 1), max(batch, 1))
    return blocks(batch, blocks(batch, wanted))


def workspace(batch: int, channels: int, positions: int, width: int, value_width: int) -> int:
    """Bytes of the backward workspace, with an output projection."""
    groups = weight_groups(batch, channels, width, value_width)
    pieces = [batch * positions, batch * blocks(positions, ROW_POSITIONS)]
    pieces += [groups * (2 * width + value_width) * channels, groups * channels * value_width]
    return FLOAT * sum(ceil_to(piece, 64) for piece in pieces)


def traffic(batch: int, channels: int, positions: int, width: int, value_width: int) -> dict[str, Launch]:
    """Every launch of a forward and a backward pass with an output projection, values of at most 256 channels."""
    stacked, n = 2 * width + value_width, positions
    image, query, value = (batch * c * n * ELEMENT for c in (channels, width, value_width))
    inner = 2 * query + value
    weights, w_out = channels * stacked * ELEMENT, channels * value_width * ELEMENT
    row_floats = batch * n * FLOAT
    groups = weight_groups(batch, channels, width, value_width)
    partial = FLOAT * channels * (stacked + value_width)
    column_tiles, x_tiles = batch * blocks(n, SIDE), blocks(channels, SIDE)

    queries = 128 if value_width <= 64 else 64
    query_tiles, own_tiles = blocks(n, queries), blocks(n, BACKWARD_SIDE)
    width16, value16, width32, value32 = (ceil_to(w, unit) for unit in (16, 32) for w in (width, value_width))
    rows = batch * query_tiles * queries
    keys, out_channels = (128 if 64 < value_width <= 128 else 64), (64 if value_width > 64 else 32)  # of the panels
    parts = min(blocks(WANTED_BLOCKS, batch * query_tiles), blocks(channels, PART_CHANNELS))  # of y's channels
    slices_a, slices_b = blocks(width, BACKWARD_PANEL), blocks(value_width, BACKWARD_PANEL)
    logits = (width16 + value16) * (slices_a + max(slices_a, slices_b))  # of queries' and of keys' owners
    sums = sum(min(ceil_to(size - first, 32), BACKWARD_PANEL)
               for size, first in [(width, 64 * i) for i in range(slices_a)] * 2
               + [(value_width, 64 * i) for i in range(slices_b)])  # fmt: skip
    all_pairs = batch * ceil_to(n, 16) * own_tiles * BACKWARD_SIDE  # a warp without positions of its own is idle
    if n <= BLOCK_POSITIONS:
        attention_blocks, attention_exponentials = batch, batch * n * n
        attention_again = 2 * query + value  # all but the values serve two products
        warps = batch * ceil_to(n, 32)
        attention_mma = warps * ceil_to(n, 64) * (width16 + value16) // MMA
        attention_mma += warps * ceil_to(n, 16) * (2 * width32 + value32) // MMA
    else:
        owners = slices_a + max(slices_a, slices_b)
        attention_blocks, attention_exponentials = batch * own_tiles * owners, batch * n * n * owners
        attention_again = (own_tiles * owners - 1) * (query + value)
        attention_mma = all_pairs * (logits + sums) // MMA
    launch = Launch
    return {
        "forward projections": launch(
            image + weights + inner, image + weights + inner,
            (column_tiles - 1) * weights + (blocks(stacked, SIDE) - 1) * image,
            batch * product_mma(stacked, n, channels), batch * stacked * n * channels // MMA,
        ),
        "forward attention": launch(
            2 * (image + value) + inner + w_out + 2 * row_floats, 2 * (image + value) + inner + w_out + 2 * row_floats,
            (query_tiles * parts - 1) * (query + value) + (parts - 1) * query + (batch * query_tiles - 1) * w_out,
            rows * (parts * ceil_to(n, keys) * (width16 + value32) + ceil_to(channels, out_channels) * value32) // MMA,
            batch * n * (n * (width + value_width) + channels * value_width) // MMA,
            batch * n * n * parts, batch * query_tiles * parts,
        ),
        "backward context": launch(
            image + w_out + value, image + w_out + value,
            (column_tiles - 1) * w_out + (blocks(value_width, SIDE) - 1) * image,
            batch * product_mma(value_width, n, channels), batch * value_width * n * channels // MMA,
        ),
        "backward row terms": launch(
            3 * value + row_floats + FLOAT * batch * blocks(n, ROW_POSITIONS), 3 * value + row_floats, 0, 0, 0
        ),
        "backward attention": launch(
            2 * inner + value + 3 * row_floats, 2 * inner + value + 3 * row_floats,
            attention_again, attention_mma,
            batch * n * n * (3 * width + 2 * value_width) // MMA,
            attention_exponentials, attention_blocks,
        ),
        "backward x": launch(
            2 * image + weights + inner, 2 * image + weights + inner,
            (column_tiles - 1) * weights + (x_tiles - 1) * inner,
            batch * product_mma(channels, n, width, width, value_width), batch * stacked * n * channels // MMA,
        ),
        "backward weights": launch(
            2 * image + inner + value + groups * partial, 2 * image + inner + value + partial,
            (x_tiles - 1) * (inner + value) + (blocks(stacked, SIDE) + blocks(value_width, SIDE) - 2) * image,
            batch * (product_mma(stacked, channels, n) + product_mma(channels, value_width, n)),
            batch * n * channels * (stacked + value_width) // MMA,
        ),
        "backward sums": launch(
            groups * partial + weights + w_out, groups * partial + weights + w_out, 0, 0, 0
        ),
    }  # fmt: skip


def five_products(batch: int, positions: int, width: int, value_width: int) -> tuple[int, int, float]:
    """Blocks an image, bytes added and µs, where owners of keys leave partial gradients of the queries."""
    parts = blocks(FLOAT * positions * (width + value_width), SHARED)
    pairs = batch * positions * positions
    added = 2 * parts * FLOAT * batch * width * positions
    work = Launch(0, 0, 0, pairs * (3 * width + 2 * value_width) // MMA, 0, pairs).microseconds
    rounds = blocks(parts * batch, 132)
    return parts, added, work * 132 * rounds / (parts * batch) + added / 3.35e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--stages", type=int, nargs="+", choices=STAGES, default=list(STAGES))
    options = parser.parse_args()
    for stage in options.stages:
        channels, positions, width = STAGES[stage]
        launches = traffic(options.batch, channels, positions, width, width)
        print(f"stage {stage}: B {options.batch}, C {channels}, N {positions}, d {width}; MB, millions of mma")
        print_launches(launches)
        if positions > BLOCK_POSITIONS:
            parts, added, time = five_products(options.batch, positions, width, width)
            now = launches["backward attention"].microseconds
            print(f"5 products: {parts} blocks an image, {added / 1e6:.0f} MB more; {time:.0f} µs, now {now:.0f} µs")
        image = options.batch * channels * positions * ELEMENT
        for way, images in (("forward", 2), ("backward", 3)):
            some = [one for name, one in launches.items() if name.startswith(way)]
            total, mma, least = (sum(getattr(one, what) for one in some) for what in ("distinct", "mma", "least"))
            print(
                f"{way}: {len(some)} launches, {total / 1e6:.0f} MB, one-pass floor {images * image / 1e6:.0f} MB, "
                f"ratio {total / (images * image):.2f}; mma {mma / least:.3f} × the least; "
                f"{sum(one.microseconds for one in some):.0f} µs"
            )
        mma, least = (sum(getattr(one, what) for one in launches.values()) for what in ("mma", "least"))
        print(f"both: mma {mma / least:.3f} × the least\n")


if __name__ == "__main__":
    main()
