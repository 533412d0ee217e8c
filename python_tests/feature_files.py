"""Files of features for the tests of ``python -m sabmn_ext.evaluate``."""

from functools import partial
from pathlib import Path
from typing import Any

import command_errors
import numpy as np

from sabmn_ext.evaluate import main

error_of = partial(command_errors.error_of, main)
LABELS = ("query_pids", "gallery_pids", "query_camids", "gallery_camids")


def draw(seed: int, noise: float = 0.0) -> dict[str, np.ndarray]:
    """Six queries, the last without a match, and thirty gallery items; ``noise`` is added to their features."""
    rng, more = np.random.default_rng(seed), np.random.default_rng(seed + 1000)
    arrays: dict[str, np.ndarray] = {}
    for side, count in (("query", 6), ("gallery", 30)):
        arrays[f"{side}_pids"] = rng.integers(0 if side == "query" else -1, 4, count)
        arrays[f"{side}_camids"] = rng.integers(1, 4, count).astype(np.int8)
        arrays[f"{side}_pids"][:4] = np.arange(4)
        if side == "gallery":
            arrays["gallery_camids"][:4] = 9  # where no query was taken: everybody has a match
        features = arrays[f"{side}_pids"][:, None] + rng.standard_normal((count, 3))
        arrays[f"{side}_features"] = (features + noise * more.standard_normal((count, 3))).astype(np.float32)
    arrays["query_pids"][5] = 99
    return arrays


def write(folder: Path, seed: int = 0, *, name: str = "features", noise: float = 0.0, **changes: Any) -> Path:
    """``folder/name.npz`` with ``changes``; None leaves an array out."""
    file = folder / f"{name}.npz"
    arrays = draw(seed, noise) | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file
