"""A data set as lists of (path, identity, camera), and how one is found on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

FORMATS = ("auto", "market1501", "dukemtmc", "msmt17", "cuhk03-np", "veri776", "market", "csv", "demo")
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
)
NO_CAMERA_HINT = "switch the camera rule off with --no-camera-rule (in Python: cameras=False)"


class ImageRecord(NamedTuple):
    """One image: absolute path, identity (−1: junk) and camera (−1: unknown)."""

    path: str
    pid: int
    camid: int


@dataclass(frozen=True)
class ReidData:
    """A data set: images to train on, queries, and the gallery that is searched.

    Junk (pid −1) stays in the gallery, where evaluation drops it; it never occurs in train or query.
    `notes` are for the user: differences from the published counts, files that were left out. None is fatal.
    """

    name: str
    root: str
    train: list[ImageRecord]
    query: list[ImageRecord]
    gallery: list[ImageRecord]
    notes: list[str] = field(default_factory=list)

    @property
    def has_cameras(self) -> bool:
        """Whether evaluation can apply the camera rule: every query and gallery image has a known camera."""
        return all(record.camid >= 0 for record in (*self.query, *self.gallery))

    @property
    def num_train_identities(self) -> int:
        return len({record.pid for record in self.train})

    def train_labels(self) -> list[int]:
        """Each training image's class, 0 … num_train_identities − 1, in the order of sorted pids."""
        labels = {pid: label for label, pid in enumerate(sorted({record.pid for record in self.train}))}
        return [labels[record.pid] for record in self.train]


class Published(NamedTuple):
    """Published counts of a data set as (images, identities) a split; None: not published."""

    train: tuple[int, int | None]
    query: tuple[int, int | None]
    gallery: tuple[int, int | None]

    def differences(self, data: ReidData) -> list[str]:
        notes = []
        for split, (images, identities) in zip(("train", "query", "gallery"), self, strict=True):
            records: list[ImageRecord] = getattr(data, split)
            found = len(records), len({record.pid for record in records})
            if found[0] != images:
                notes.append(f"{split} has {found[0]:,} images, {data.name} was published with {images:,}")
            if identities is not None and found[1] != identities:
                notes.append(
                    f"{split} has {found[1]:,} identities, {data.name} was published with {identities:,}"
                )
        return notes


def image_files(folder: Path) -> list[str]:
    """Sorted names of the images in a folder, without hidden files and what is no image (Thumbs.db)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"missing folder {folder}")
    names = (entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
    return sorted(name for name in names if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES)


def shared_identity_notes(train: Iterable[ImageRecord], test: Iterable[ImageRecord]) -> list[str]:
    """A note if people of the training set are queries too: the result is not about unseen people then."""
    both = {record.pid for record in train} & {record.pid for record in test}
    return [f"{len(both):,} identities are in train and in query, pid {min(both)} first"] if both else []


def find_root(path: Path, folders: Iterable[str]) -> Path | None:
    """`path` or the one folder in it that holds all `folders` (archives unpack to Market-1501-v15.09.15/)."""
    folders = tuple(folders)

    def holds(candidate: Path) -> bool:
        return all((candidate / folder).exists() for folder in folders)

    if holds(path):
        return path
    inside = sorted(child for child in path.iterdir() if child.is_dir() and holds(child))
    if len(inside) > 1:
        names = ", ".join(child.name for child in inside)
        raise ValueError(f"{path} holds several data sets ({names}): give the path of one of them")
    return inside[0] if inside else None


def load_data(path: str, *, format: str = "auto", cameras: bool = True, with_val: bool = False) -> ReidData:
    """Reads a data set's file lists; no image is opened.

    path: "demo" or "demo:SEED" for the built-in demo data set, drawn and cached at first use (a folder
        of that name is "./demo"); a CSV file; or the data set's folder or the folder around it.
    format: one of FORMATS. "auto" goes by what is on disk; "market" is anything in Market-1501's folders.
    cameras: False is for data with one camera or none: every camid becomes −1, has_cameras is False and
        evaluation runs without the camera rule. With True such data is an error: no query would keep a match.
    with_val: MSMT17 only: train on list_val.txt too.

    FileNotFoundError names what is missing; ValueError says what is wrong with the data or the argument.

    >>> data = load_data("demo")                                     # doctest: +SKIP
    >>> len(data.train), data.num_train_identities                   # doctest: +SKIP
    (1440, 120)
    """
    from . import csv_data, demo, dukemtmc, market1501, msmt17, veri776

    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: give one of {', '.join(FORMATS)}")
    if format == "demo" or (format == "auto" and (path == "demo" or path.startswith("demo:"))):
        data = demo.load(path)
    else:
        place = Path(path).expanduser().absolute()
        if not place.exists():
            raise FileNotFoundError(f"no such file or folder: {place}")
        found = _detect(place) if format == "auto" else format
        if found == "csv":
            data = csv_data.load(place)
        elif not place.is_dir():
            market1501.refuse_raw_cuhk03(place)
            raise ValueError(f"{place} is a file, and format {found!r} is read from a folder")
        elif found == "msmt17":
            data = msmt17.load(place, with_val=with_val)
        elif found == "veri776":
            data = veri776.load(place)
        elif found == "dukemtmc":
            data = dukemtmc.load(place)
        else:
            data = market1501.load(place, found)
    if not cameras:
        unknown = [[record._replace(camid=-1) for record in records]
                   for records in (data.train, data.query, data.gallery)]  # fmt: skip
        return replace(data, train=unknown[0], query=unknown[1], gallery=unknown[2])
    if not data.has_cameras:
        first = next(record.path for record in (*data.query, *data.gallery) if record.camid < 0)
        raise ValueError(f"the camera of {first} is unknown, so no camera rule; {NO_CAMERA_HINT}")
    if len({record.camid for record in (*data.query, *data.gallery)}) == 1:
        raise ValueError(f"{data.root} has one camera for testing: no match is left; {NO_CAMERA_HINT}")
    return data


def _detect(place: Path) -> str:
    """The format of what lies at `place`, or a ValueError that lists what was looked for."""
    from . import market1501, msmt17, veri776

    if place.suffix.lower() == ".csv":
        return "csv"
    if not place.is_dir():
        market1501.refuse_raw_cuhk03(place)
        raise ValueError(f"{place} is no data set: give a folder, a .csv file or 'demo'")
    if find_root(place, msmt17.LISTS) is not None:
        return "msmt17"
    if find_root(place, veri776.FOLDERS) is not None:
        return "veri776"
    root = find_root(place, market1501.FOLDERS)
    if root is not None:
        return market1501.recognise(root)
    market1501.refuse_raw_cuhk03(place)
    missing = ", ".join(f"{place / name}" for name in market1501.FOLDERS if not (place / name).is_dir())
    raise FileNotFoundError(
        f"no data set in {place} (nor one folder below): missing {missing}. Also looked for: "
        "MSMT17's list_*.txt, VeRi-776's image_train/image_query/image_test. "
        "Any other data can be given as a CSV file with the columns path, pid, camid, split"
    )
