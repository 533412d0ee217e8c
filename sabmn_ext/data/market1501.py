"""Market-1501, CUHK03-NP and any data set in Market-1501's folders and file names.

Market-1501: Zheng et al., "Scalable person re-identification: a benchmark", ICCV 2015. Six cameras.
    bounding_box_train/  12,936 images,  751 identities
    query/                3,368 images,  750 identities
    bounding_box_test/   19,732 images: 13,115 of queried people, 2,798 distractors (pid 0), 3,819 junk (−1)
    0002_c1s1_000451_03.jpg = identity, camera and sequence, frame, box
CUHK03-NP: Li et al., CVPR 2014, in the split of Zhong et al., "Re-ranking person re-identification with
k-reciprocal encoding", CVPR 2017, handed out in Market-1501's folders. Two cameras; 767 + 700 identities.
    labeled/   7,368 + 1,400 + 5,328 images          detected/   7,365 + 1,400 + 5,332 images
"""

from __future__ import annotations

import re
from pathlib import Path

from .records import ImageRecord, Published, ReidData, find_root, image_files, shared_identity_notes

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
PUBLISHED = {
    "market1501": Published((12_936, 751), (3_368, 750), (19_732, 752)),  # 750, pid 0 and pid −1
    "cuhk03-np labeled": Published((7_368, 767), (1_400, 700), (5_328, 700)),
    "cuhk03-np detected": Published((7_365, 767), (1_400, 700), (5_332, 700)),
}
# The identity, then the camera if there is one: 0002_c1s1_000451_03.jpg, 0002_c012_00030600_0.jpg, -1_c3s2_…
FILE_NAME = re.compile(r"(-?\d+)(?:_[cC](\d+))?")


def read_folder(folder: Path, *, junk: bool) -> tuple[list[ImageRecord], list[str]]:
    """The images of one folder with identity and camera from their names, sorted by name, and notes."""
    records, nameless, dropped = [], [], 0
    for name in image_files(folder):
        match = FILE_NAME.match(name)
        if match is None:
            nameless.append(name)
        elif int(match[1]) < 0 and not junk:
            dropped += 1
        else:
            records.append(ImageRecord(str(folder / name), max(int(match[1]), -1), int(match[2] or -1)))
    if not records:
        why = f"; {nameless[0]!r} does not start with an identity number" if nameless else ""
        raise ValueError(f"{folder} has no image named like 0002_c1s1_000451_03.jpg{why}")
    notes = [f"{folder.name}: left out {dropped:,} junk images (pid −1)"] if dropped else []
    if nameless:
        count = f"{folder.name}: left out {len(nameless):,} images"
        notes.append(f"{count} whose names do not start with an identity number, {nameless[0]!r} first")
    return records, notes


def read_market_style(
    path: Path, name: str, published: Published | None, folders: tuple[str, str, str] = FOLDERS
) -> ReidData:
    """A data set in three folders (train, query, gallery) of images named pid_cCAMERA…"""
    root = find_root(path, folders)
    if root is None:
        missing = next(folder for folder in folders if not (path / folder).is_dir())
        raise FileNotFoundError(f"{name}: missing folder {path / missing}")
    (train, a), (query, b), (gallery, c) = (
        read_folder(root / folder, junk=folder == folders[2]) for folder in folders
    )
    notes = [*a, *b, *c, *shared_identity_notes(train, query)]
    data = ReidData(name, str(root), train, query, gallery, notes)
    if published is not None:
        data.notes.extend(published.differences(data))
    return data


def recognise(root: Path) -> str:
    """What lies in Market-1501's folders: a known data set by names and place or size, or just "market"."""
    names = image_files(root / FOLDERS[0])
    first, place, size = names[0] if names else "", f"{root.parent.name}/{root.name}".lower(), len(names)
    if "cuhk03" in place or size in (7_368, 7_365):
        return "cuhk03-np"
    if re.match(r"\d+_c\d+_f\d+", first) and ("duke" in place or size == 16_522):
        return "dukemtmc"
    if re.match(r"\d+_c\ds\d_\d+", first) and ("market" in place or size == 12_936):
        return "market1501"
    return "market"


def refuse_raw_cuhk03(path: Path) -> None:
    """Raises ValueError if the original CUHK03 release lies there."""
    names = [path.name] if path.is_file() else [child.name for child in path.iterdir()]
    if any(name.lower() in ("cuhk-03.mat", "cuhk03_release", "cuhk03_release.zip") for name in names):
        raise ValueError(
            f"{path} is CUHK03's original release (cuhk-03.mat), which is not read. Get CUHK03-NP as "
            "Market-style folders (see github.com/zhunzhong07/person-re-ranking): labeled or detected"
        )


def load(path: Path, format: str) -> ReidData:
    """format: "market1501", "cuhk03-np" or "market" (no published counts are compared)."""
    name = path.name if format == "market" else format
    if format == "cuhk03-np":
        root = find_root(path, FOLDERS)
        if root is None:
            refuse_raw_cuhk03(path)
        elif root.name.lower() in ("labeled", "detected"):
            name = f"{format} {root.name.lower()}"
        else:  # renamed folders: the number of images tells
            detected = len(image_files(root / FOLDERS[0])) == PUBLISHED["cuhk03-np detected"].train[0]
            name = f"{format} {'detected' if detected else 'labeled'}"
    return read_market_style(path, name, None if format == "market" else PUBLISHED.get(name))
