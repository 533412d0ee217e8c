"""The options of the benchmarks that measure the layers of ResNet-50 one by one."""

import argparse
from collections.abc import Iterable

import torch


def layer_parser(description: str | None, dtypes: Iterable[str]) -> argparse.ArgumentParser:
    """Threads, batch, size of the images, dtypes (of the given ones) and rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128], help="height and width of the images")
    parser.add_argument("--dtypes", choices=list(dtypes), nargs="+", default=["fp32"])
    parser.add_argument("--rounds", type=int, default=15)
    return parser
