"""All images of a data set decoded once and kept in memory as uint8."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from .images import ImageDataset

CACHES = ("auto", "ram", "off")
_BATCH = 64
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


def cache_images(
    dataset: ImageDataset, cache: str = "auto", *, workers: int = 0, sharers: int = 1, progress: bool = False
) -> str | None:
    """Decodes all images of `dataset` into its memory.

    cache: "ram"; "auto", which does it where the images take at most half of the memory that is available; "off".
    workers: processes that decode; 0: this one.
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
    loader = DataLoader(dataset, batch_size=_BATCH, num_workers=workers, generator=torch.Generator())
    done = 0
    shown = progress and sys.stderr.isatty()
    with tqdm(total=len(dataset), desc="decoding", unit="image", leave=False, disable=not shown) as bar:
        for images, _, indices in loader:
            pixels[done : done + len(images)], sources[done : done + len(images)] = images, indices
            done += len(images)
            bar.update(len(images))
    dataset.pixels, dataset.sources = pixels, sources
    return None
