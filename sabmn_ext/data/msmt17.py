"""MSMT17: Wei et al., "Person transfer GAN to bridge domain gap for person re-identification", CVPR 2018.

    list_train.txt    30,248 images  } together 32,621 images of 1,041 identities
    list_val.txt       2,373 images  }
    list_query.txt    11,659 images, 3,060 identities
    list_gallery.txt  82,161 images, 3,060 identities; 15 cameras
A line is "0000/0000_000_01_0303morning_0008_0.jpg 0": path below train/ and test/ (V1) or mask_train_v2/ and
mask_test_v2/ (V2), and the identity. The camera is the third field of the file's own name. Identities start
at 0 in train and again in test: the same number is two people, so train and test pids must never be compared.
"""

from __future__ import annotations

from pathlib import Path

from .records import ImageRecord, Published, ReidData, find_root

LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
VERSIONS = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
TRAIN, TRAIN_WITH_VAL, QUERY, GALLERY = (30_248, 1_041), (32_621, 1_041), (11_659, 3_060), (82_161, 3_060)


def _read_list(file: Path, folder: Path) -> list[ImageRecord]:
    records = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            path, pid = line.rsplit(maxsplit=1)
            records.append(ImageRecord(str(folder / path), int(pid), int(Path(path).name.split("_")[2])))
        except (ValueError, IndexError):
            raise ValueError(
                f"{file}, line {number}: expected '0000/0000_000_01_0303morning_0008_0.jpg 0', got {line!r}"
            ) from None
    if not records:
        raise ValueError(f"{file} lists no image")
    return records


def load(path: Path, *, with_val: bool = False) -> ReidData:
    """with_val: list_val.txt joins the training images (its people are those of list_train.txt)."""
    root = find_root(path, LISTS)
    if root is None:
        missing = next(name for name in LISTS if not (path / name).is_file())
        raise FileNotFoundError(f"msmt17: missing file {path / missing}")
    folders = next((pair for pair in VERSIONS if all((root / name).is_dir() for name in pair)), None)
    if folders is None:
        raise FileNotFoundError(f"msmt17: missing {root}/train and test, or mask_train_v2 and mask_test_v2")
    train_folder, test_folder = (root / name for name in folders)
    train, val = (_read_list(root / name, train_folder) for name in LISTS[:2])
    query, gallery = (_read_list(root / name, test_folder) for name in LISTS[2:])
    data = ReidData("msmt17", str(root), train + val if with_val else train, query, gallery)
    data.notes.extend(Published(TRAIN_WITH_VAL if with_val else TRAIN, QUERY, GALLERY).differences(data))
    return data
