"""All images of a data set decoded once and kept in memory as uint8."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .images import ImageDataset

CACHES = ("auto", "ram", "off")
_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container


def available_memory() -> int:
    """Bytes that can be taken without swapping, within the limit of a container; 0 where that cannot be found out."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        try:
            available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, OSError, ValueError):
            return 0
    try:
        return min(available, int(_LIMIT.read_text()))
    except (OSError, ValueError):  # no such limit, or "max"
        return available


def cache_images(dataset: ImageDataset, cache: str = "auto", *, sharers: int = 1, progress: bool = False) -> str | None:
    """Decodes all images of `dataset` into its memory, with as many threads as torch uses.

    cache: "ram"; "auto", which does it where the images take at most half of the memory that is available; "off".
    sharers: processes of this machine that do the same.

    Returns a note for the user if "auto" decided against it. Raises UnreadableImageError as the data set does.
    """
    if cache not in CACHES:
        raise ValueError(f"cache must be one of {', '.join(CACHES)}, got {cache!r}")
    needed = len(dataset) * 3 * dataset.height * dataset.width
    if cache == "off":
        return None
    if cache == "auto" and 2 * sharers * needed > (available := available_memory()):
        return (
            f"images are decoded anew in every epoch: {needed / 2**30:.1f} GiB of them"
            + f" in each of {sharers} processes" * (sharers > 1)
            + f" would take more than half of the {available / 2**30:.1f} GiB of memory that is available"
            " (--cache ram does it all the same; --workers decodes in parallel)"
        )
    from tqdm import tqdm

    pixels = torch.empty((len(dataset), 3, dataset.height, dataset.width), dtype=torch.uint8)
    sources = torch.empty(len(dataset), dtype=torch.int64)

    def decode(i: int) -> None:
        image, _, sources[i] = dataset[i]
        pixels.numpy()[i] = image.numpy()  # numpy's copy, for the reason that load_image has

    threads = ThreadPoolExecutor(torch.get_num_threads())  # Pillow decodes and resizes outside of Python's lock
    try:
        shown = progress and sys.stderr.isatty()
        for _ in tqdm(threads.map(decode, range(len(dataset))), "decoding", len(dataset), unit="image", leave=False,
                      disable=not shown):  # fmt: skip
            pass
    finally:
        threads.shutdown(cancel_futures=True)
    dataset.pixels, dataset.sources = pixels, sources
    return None
