"""Bytes that the CUDA launches of the spectral normalisation move for the network's 58 weights, from the shapes.

    python benchmarks/spectral_norm_traffic.py [--weights float32] [--normalized float32]

`distinct` counts every byte once that a launch reads or writes. `floor` leaves out what only its cutting into blocks
costs: the weight's operands, and one vector where partial sums of it are written. `read again` comes on top of
distinct, from L1 and L2. The one-pass floor is that of the operation: W is read and written once in the forward pass,
and G, W and dW are passed once in the backward pass.
"""

import argparse
from dataclasses import dataclass

BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}

# csrc/spectral_norm/spectral_norm_kernels.cuh and spectral_norm_cuda.cu
WARPS = 8
MAX_ROWS_PER_BLOCK = 32
COLUMNS_PER_BLOCK = 32
VALUES_BYTES = 64 * 32 * WARPS
ROW_BLOCK_BYTES = 64 << 10
STAGED_BYTES = 18 << 10


@dataclass
class Launch:
    distinct: int = 0
    floor: int = 0
    read_again: int = 0

    def add(self, distinct: int, floor: int, read_again: int) -> None:
        self.distinct += distinct
        self.floor += floor
        self.read_again += read_again


def rows_per_block(columns: int, element: int) -> int:
    row = columns * element
    return WARPS * min(max((ROW_BLOCK_BYTES // WARPS + row // 2) // row, 1), MAX_ROWS_PER_BLOCK // WARPS)


def blocks(size: int, per_block: int) -> int:
    return -(-size // per_block)


def traffic(
    shapes: list[tuple[int, int, int]], weights: str = "float32", normalized: str = "float32"
) -> dict[str, Launch]:
    """Bytes of each launch, of one power iteration and of the backward pass, for matrices (rows, columns, inner)."""
    t, o = BYTES[weights], BYTES[normalized]
    s = max(t, 4)
    names = ("forward rows", "forward columns", "forward scale", "backward dot", "backward rows")
    launches = {name: Launch() for name in names}
    for rows, columns, inner in shapes:
        size = rows * columns
        row_blocks = blocks(rows, rows_per_block(columns, t))
        column_blocks, value_blocks = blocks(columns, COLUMNS_PER_BLOCK), blocks(size, VALUES_BYTES // t)
        sums, partials, both = 8 * row_blocks, s * row_blocks * columns, rows + columns
        # Where the order of v is not that of memory, every part that is staged is picked from all of v.
        staged = blocks(columns * s, STAGED_BYTES) if inner != columns else 1
        v_again = (row_blocks * staged - 1) * columns * t
        launches["forward rows"].add(
            size * t + columns * t + rows * s + 2 * sums + partials,
            size * t + columns * t + both * s,
            size * t + v_again,
        )
        launches["forward columns"].add(
            partials + 2 * sums + both * s + rows * t + 8 * column_blocks,
            partials + both * s + rows * t,
            (2 * column_blocks - 2) * sums,
        )
        operands = columns * (s + t) + s
        launches["forward scale"].add(
            size * (t + o) + operands + 8 * column_blocks,
            size * (t + o) + operands,
            (value_blocks - 1) * 8 * column_blocks,
        )
        launches["backward dot"].add(size * (t + o) + 8 * value_blocks, size * (t + o), 0)
        operands = both * t + s
        launches["backward rows"].add(
            size * (t + o) + operands + 8 * value_blocks,
            size * (t + o) + operands,
            (row_blocks - 1) * (8 * value_blocks + s) + v_again,
        )
    return launches


def workspace(shapes: list[tuple[int, int, int]], weights: str = "float32") -> tuple[int, int]:
    """Bytes of the forward and the backward workspace."""
    t = BYTES[weights]
    s = max(t, 4)
    forward = backward = 0
    for rows, columns, _ in shapes:
        row_blocks = blocks(rows, rows_per_block(columns, t))
        pieces = [8 * row_blocks, 8 * row_blocks, 8 * blocks(columns, COLUMNS_PER_BLOCK)]
        pieces += [rows * s, columns * s, row_blocks * columns * s]
        forward += sum(256 * blocks(piece, 256) for piece in pieces)
        backward += 256 * blocks(8 * blocks(rows * columns, VALUES_BYTES // t), 256)
    return forward, backward


def network_shapes() -> list[tuple[int, int, int]]:
    """(rows, columns, inner) of the convolutions of SABMN with their weights in channels_last."""
    from torch import nn

    import sabmn_ext

    network = sabmn_ext.SABMN(751, weights="none", spectral_norm=False)
    layers = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    return [(w.shape[0], w[0].numel(), w.shape[1]) for w in layers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=BYTES, default="float32")
    parser.add_argument("--normalized", choices=BYTES)
    options = parser.parse_args()
    options.normalized = options.normalized or options.weights
    shapes = network_shapes()
    values = sum(rows * columns for rows, columns, _ in shapes)
    t, o = BYTES[options.weights], BYTES[options.normalized]
    print(f"{len(shapes)} weights, {values / 1e6:.1f} M values, {options.weights} → {options.normalized}")
    print(f"{'launch':<17} {'distinct':>9} {'floor':>8} {'ratio':>6} {'read again':>11}  in MB")
    launches = traffic(shapes, options.weights, options.normalized)
    for name, launch in launches.items():
        print(
            f"{name:<17} {launch.distinct / 1e6:9.1f} {launch.floor / 1e6:8.1f} {launch.distinct / launch.floor:6.2f} "
            f"{launch.read_again / 1e6:11.1f}"
        )
    for way, floor in (("forward", values * (t + o)), ("backward", values * (2 * t + o))):
        total = sum(launch.distinct for name, launch in launches.items() if name.startswith(way))
        print(f"{way}: launches {total / 1e6:.0f} MB, one-pass floor {floor / 1e6:.0f} MB, ratio {total / floor:.2f}")


if __name__ == "__main__":
    main()
