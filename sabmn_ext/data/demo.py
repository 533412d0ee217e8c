"""The built-in demo data set: drawn pedestrians in Market-1501's folders and file names, cached at first use.

160 people × 4 of 6 cameras × 3 images. Every fourth person is for testing (40, the others 120 train); the
first image of a test person in each camera is a query. The gallery also holds 48 strangers (pid 0) and 32
junk boxes (pid −1).
    bounding_box_train/ 1,440 images, query/ 160, bounding_box_test/ 400; 64 × 128 pixels, JPEG
Every image has a generator of its own, seeded by (seed, person, camera, index), so that no order matters.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .market1501 import FOLDERS, read_market_style
from .records import ImageRecord, ReidData

DRAWING_VERSION = 1  # raise it when a picture changes: the cache is keyed by it
NUM_PEOPLE, NUM_CAMERAS, CAMERAS_PER_PERSON, IMAGES_PER_CAMERA = 160, 6, 4, 3
NUM_STRANGERS, NUM_JUNK = 48, 32


def _plan(seed: int) -> Iterator[tuple[str, int, int, int, int, np.random.Generator]]:
    """Every image: (folder, pid, camera 0-5, number, facing, generator)."""
    train, query, gallery = FOLDERS
    for pid in range(1, NUM_PEOPLE + 1):
        visits = np.random.default_rng([seed, 2, pid])
        for camera in sorted(visits.choice(NUM_CAMERAS, CAMERAS_PER_PERSON, replace=False).tolist()):
            usual = int(visits.integers(4))  # a person mostly crosses a camera's view in one direction
            for i in range(IMAGES_PER_CAMERA):
                rng = np.random.default_rng([seed, 3, pid, camera, i])
                facing = usual if rng.random() < 0.7 else int(rng.integers(4))
                yield train if pid % 4 else gallery if i else query, pid, camera, i, facing, rng
    for i in range(NUM_STRANGERS + NUM_JUNK):
        rng = np.random.default_rng([seed, 4, i])
        yield gallery, -(i >= NUM_STRANGERS), int(rng.integers(NUM_CAMERAS)), i, int(rng.integers(4)), rng


def write_demo(root: str | os.PathLike[str], seed: int = 0) -> None:
    """Draws the data set into `root`: for a seed always the same bytes (with one Pillow and numpy)."""
    from tqdm import tqdm

    from .pedestrians import draw_image, draw_person

    for folder in FOLDERS:
        (Path(root) / folder).mkdir(parents=True, exist_ok=True)
    people = [draw_person(np.random.default_rng([seed, 1, pid])) for pid in range(NUM_PEOPLE + 1)]
    total = NUM_PEOPLE * CAMERAS_PER_PERSON * IMAGES_PER_CAMERA + NUM_STRANGERS + NUM_JUNK
    bar = tqdm(_plan(seed), "drawing the demo data set", total, unit="image", disable=None)
    for folder, pid, camera, i, facing, rng in bar:
        person = people[pid] if pid > 0 else draw_person(rng) if pid == 0 else None
        image = draw_image(person, camera, facing, rng)
        number = "-1" if pid < 0 else f"{pid:04d}"
        name = f"{number}_c{camera + 1}s1_{int(rng.integers(10**6)):06d}_{i:02d}.jpg"
        image.save(Path(root) / folder / name, quality=int(rng.integers(70, 93)))


def cache_folder() -> Path:
    """Where it is kept: $SABMN_CACHE, else $XDG_CACHE_HOME/sabmn_ext, else ~/.cache/sabmn_ext."""
    if os.environ.get("SABMN_CACHE"):
        return Path(os.environ["SABMN_CACHE"]).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "sabmn_ext"


def demo_root(seed: int = 0) -> Path:
    """The folder of the demo data set of this seed, drawn at first use (about 10 seconds).

    It is drawn into a temporary folder and renamed, so that a killed run leaves nothing that looks whole and
    two processes may do it at once.
    """
    root = cache_folder() / f"demo-v{DRAWING_VERSION}-seed{seed}"
    if root.is_dir():
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".drawing-", dir=root.parent))
    try:
        write_demo(temporary, seed)
        temporary.chmod(0o755)  # mkdtemp keeps others out
        temporary.rename(root)
    except OSError:
        if not root.is_dir():  # else another process was faster, with the same pictures
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def load(path: str = "demo") -> ReidData:
    """path: "demo" (seed 0) or "demo:SEED"."""
    name, _, seed = path.partition(":")
    if name != "demo" or not (seed or "0").isdecimal():
        raise ValueError(f"{path!r} is not 'demo' or 'demo:SEED' with a whole SEED from 0, such as 'demo:1'")
    return read_market_style(demo_root(int(seed or 0)), path, None)


def mean_colour_features(records: Sequence[ImageRecord]) -> np.ndarray:
    """The baseline that knows colour only: each image's mean red, green and blue, [n, 3] float32 in 0-255."""
    from .images import load_image

    return np.stack([load_image(record.path, 128, 64).float().mean(dim=(1, 2)).numpy() for record in records])
