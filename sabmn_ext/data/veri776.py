"""VeRi-776: Liu et al., "Large-scale vehicle re-identification in urban surveillance videos", ICME 2016.

    image_train/  37,778 images,  576 vehicles
    image_query/   1,678 images,  200 vehicles
    image_test/   11,579 images,  200 vehicles
    0002_c002_00030600_0.jpg = vehicle, camera (20 of them, three digits), time, number
"""

from __future__ import annotations

from pathlib import Path

from .market1501 import read_market_style
from .records import Published, ReidData

FOLDERS = ("image_train", "image_query", "image_test")
PUBLISHED = Published((37_778, 576), (1_678, 200), (11_579, 200))


def load(path: Path) -> ReidData:
    return read_market_style(path, "veri776", PUBLISHED, FOLDERS)
