"""Made-up data sets on disk for tests: `from fake_data import make_fake_market`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, seed: int = 0, size: tuple[int, int] = (4, 8)) -> Path:
    """A small random picture; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def make_fake_market(root: str | os.PathLike[str], full: bool = False) -> str:
    """Writes Market-1501's folders with tiny 8 × 4 images and returns the path.

    full: the published counts (12,936 images of 751 people; 3,368 queries of 750; 19,732 in the gallery, of
    which 2,798 have pid 0 and 3,819 pid −1), hard links to 16 files, so that it takes a second or two.
    Otherwise 8 people × 6 images to train, 4 people with 2 queries and 6 gallery images each, 3 distractors
    and 2 junk images.
    Each query has matches in other cameras. A person's pictures are equal, one of 16.
    """
    root = Path(root)
    originals = [write_image(root / "originals" / f"{i}.png", i) for i in range(16)]
    train_people, test_people = (751, 750) if full else (8, 4)
    counts = (12_936, 3_368, 13_115, 2_798, 3_819) if full else (48, 8, 24, 3, 2)
    train = [2 * i + 1 for i in range(train_people)]  # odd pids train, even ones test: nobody is in both
    test = [2 * i + 2 for i in range(test_people)]
    parts = zip(
        ("bounding_box_train", "query", "bounding_box_test", "bounding_box_test", "bounding_box_test"),
        (train, test, test, [0], [-1]),
        counts,
        strict=True,
    )
    frame = 0
    for folder, pids, count in parts:
        (root / folder).mkdir(exist_ok=True)
        for i in range(count):
            pid, camera, frame = pids[i % len(pids)], 1 + i // len(pids) % 6, frame + 1
            number = str(pid) if pid < 0 else f"{pid:04d}"
            target = root / folder / f"{number}_c{camera}s1_{frame:06d}_01.png"
            try:
                os.link(originals[pid % 16], target)
            except OSError:  # a file system without links
                shutil.copyfile(originals[pid % 16], target)
    return str(root)
