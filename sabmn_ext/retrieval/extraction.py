"""Features of many images in a folder on the disk, written so that a killed extraction goes on where it was.

    extraction.json       the checkpoint, its settings and the images, by which a later call is checked
    NAME_features.npy     [n, D] float32, for numpy.load(…, mmap_mode="r"); NAME is gallery, query, train
    NAME.csv              path, pid, camid of each row; pid and camid are empty where they are unknown
    NAME_pids.npy, …      the CSV's columns as arrays, so that the folder can be given to evaluate --features

While it is under way the first two of a part end in .partial: rows are appended to the features and brought to the
disk, then their lines to the CSV. A line in the CSV therefore stands for a whole row of features.
"""

import csv
import hashlib
import io
import json
import os
import struct
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sabmn_ext.data.loader import image_batches
from sabmn_ext.data.records import IMAGE_SUFFIXES, ImageRecord
from sabmn_ext.retrieval.extractor import Extractor

FORMAT = "sabmn_ext features 1"
COLUMNS = ("path", "pid", "camid")
_HEADER_BYTES = 128
_COMMIT_SECONDS = 2.0  # at most this much work is done again after a kill


def images_below(folder: Path) -> list[ImageRecord]:
    """All images in a folder and below it, sorted by path, hidden ones left out; pid and camera unknown."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder of images: {folder}")
    folder = folder.absolute()
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and not any(name.startswith(".") for name in path.relative_to(folder).parts)
        and path.is_file()
    )
    if not paths:
        raise ValueError(f"there is no image in {folder}, nor below it")
    return [ImageRecord(str(path), -1, -1) for path in paths]


def write_features(
    out: Path,
    extractor: Extractor,
    parts: Mapping[str, Sequence[ImageRecord]],
    *,
    labelled: bool,
    workers: int = 0,
    on_error: str = "stop",
    progress: bool = True,
) -> dict[str, int]:
    """Write the features of each part into the folder ``out``; goes on with what is there of the same extraction.

    Args:
        labelled: whether the records' pid and camid mean anything.
        on_error: ``"stop"`` raises at an unreadable image, ``"skip"`` leaves it out.

    Returns:
        the number of rows of each part.

    Raises:
        ValueError: ``out`` holds features of another checkpoint, other settings or other images (says which).
        UnreadableImageError: names the file; what was done before it is kept.
    """
    identity = {
        "format": FORMAT,
        "checkpoint": str(extractor.checkpoint),
        "checkpoint_sha256": file_sha256(extractor.checkpoint),
        "metric": extractor.metric,
        "settings": settings_of(extractor),
        "parts": {name: _fingerprint(records, labelled) for name, records in parts.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        _check_identity(out, identity)
        return {
            name: _write_part(out, name, extractor, records, labelled, workers, on_error, progress)
            for name, records in parts.items()
        }


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Refuse a second extraction into the same folder at the same time, where the system can tell."""
    with open(out / ".lock", "w") as lock:
        if os.name == "posix":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another extraction is writing into {out}: wait, or name another --out") from None
        yield


def settings_of(extractor: Extractor) -> dict[str, Any]:
    """What features depend on besides the checkpoint and the image."""
    names = ("height", "width", "flip", "precision", "feature_dim")
    return {name: getattr(extractor, name) for name in names}


def file_sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fingerprint(records: Sequence[ImageRecord], labelled: bool) -> dict[str, Any]:
    """Identifies the images: paths, sizes, times of change and labels, in order."""
    digest = hashlib.sha256()
    for record in records:
        status = os.stat(record.path)
        labels = (record.pid, record.camid) if labelled else ()
        digest.update(repr((record.path, status.st_size, status.st_mtime_ns, *labels)).encode())
    return {"images": len(records), "fingerprint": digest.hexdigest()}


def read_identity(folder: Path) -> dict[str, Any]:
    """``extraction.json``; a ValueError where it is damaged or something else."""
    file = folder / "extraction.json"
    try:
        identity = json.loads(file.read_bytes())
        if identity["format"] != FORMAT or not isinstance(identity["parts"], dict):
            raise ValueError(f"its format is not '{FORMAT}'")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged or not of this sabmn_ext ({error}); extract into another folder") from None
    return identity


def _check_identity(out: Path, identity: dict[str, Any]) -> None:
    """Refuse a folder with features of something else; else note what this extraction is of."""
    from sabmn_ext.training.checkpoint import write_atomically

    file = out / "extraction.json"
    if file.exists():
        found = read_identity(out)
        problem = ""
        if found["checkpoint_sha256"] != identity["checkpoint_sha256"]:
            problem = f"another checkpoint ({found['checkpoint']}, with other contents than {identity['checkpoint']})"
        elif found["settings"] != identity["settings"]:
            problem = f"other settings ({found['settings']}, now {identity['settings']})"
        for name, part in identity["parts"].items():
            earlier = found["parts"].get(name, part)
            if not problem and earlier != part:
                counts = f"{earlier['images']:,} images then, {part['images']:,} now"
                problem = f"other {name} images ({counts}, or other paths, labels, sizes or times of change)"
        if problem:
            raise ValueError(f"{out} holds features of {problem}; name another --out, or remove that folder")
        identity = found | {"parts": found["parts"] | identity["parts"]}
    write_atomically(file, lambda stream: stream.write((json.dumps(identity, indent=2) + "\n").encode()))


def _npy_header(rows: int, dim: int) -> bytes:
    """Of a C-ordered float32 array, always of one length: the number of rows is known at the end."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    start = b"\x93NUMPY\x01\x00" + struct.pack("<H", _HEADER_BYTES - 10)
    return start + text.encode().ljust(_HEADER_BYTES - len(start) - 1) + b"\n"


def _line(record: ImageRecord, labelled: bool) -> tuple[str, str, str]:
    return record.path, str(record.pid) if labelled else "", str(record.camid) if record.camid >= 0 else ""


def _csv_rows(text: str) -> list[list[str]]:
    """The whole lines of a CSV that may be cut off anywhere, without the first one."""
    rows = list(csv.reader(io.StringIO(text, newline="")))
    whole = rows if text.endswith("\n") and text.count('"') % 2 == 0 else rows[:-1]
    return whole[1:]


def _kept_rows(features: Path, lines: Path, records: Sequence[ImageRecord], row_bytes: int) -> list[int]:
    """The records whose features an earlier call has brought to the disk, ascending."""
    if not features.exists() or not lines.exists():
        return []
    rows = _csv_rows(lines.read_bytes().decode("utf-8", errors="ignore"))
    kept, index = [], 0
    for row in rows[: max(0, features.stat().st_size - _HEADER_BYTES) // row_bytes]:
        while index < len(records) and records[index].path != row[0]:
            index += 1  # it was left out as unreadable
        if index == len(records):
            break
        kept.append(index)
        index += 1
    return kept


def _write_part(
    out: Path,
    name: str,
    extractor: Extractor,
    records: Sequence[ImageRecord],
    labelled: bool,
    workers: int,
    on_error: str,
    progress: bool,
) -> int:
    from tqdm import tqdm

    final, lines_final = out / f"{name}_features.npy", out / f"{name}.csv"
    if final.exists():
        return len(np.load(final, mmap_mode="r"))
    partial, lines_partial = (file.with_name(f"{file.name}.partial") for file in (final, lines_final))
    row_bytes = 4 * extractor.feature_dim
    kept = _kept_rows(partial, lines_partial, records, row_bytes)
    first = kept[-1] + 1 if kept else 0
    with open(lines_partial, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines, lineterminator="\n").writerows([COLUMNS, *(_line(records[i], labelled) for i in kept)])
    with (
        open(partial, "r+b" if kept else "wb") as features,
        open(lines_partial, "a", newline="", encoding="utf-8") as lines,
        tqdm(total=len(records), initial=first, unit="image", desc=name, disable=None if progress else True) as bar,
    ):
        features.write(_npy_header(len(records), extractor.feature_dim))
        features.seek(_HEADER_BYTES + len(kept) * row_bytes)
        features.truncate()
        pending: list[int] = []

        def commit() -> None:
            _to_disk(features)
            csv.writer(lines, lineterminator="\n").writerows(_line(records[i], labelled) for i in pending)
            _to_disk(lines)
            kept.extend(pending)
            pending.clear()

        committed = time.monotonic()
        batches = image_batches(
            records[first:], height=extractor.height, width=extractor.width, batch_size=extractor.batch_size,
            workers=workers, on_error=on_error,
        )  # fmt: skip
        try:
            for images, indices in batches:
                features.write(extractor.features_of_normalized(images).numpy().astype("<f4").tobytes())
                pending += [first + i for i in indices]
                bar.update(first + indices[-1] + 1 - bar.n)
                if time.monotonic() - committed > _COMMIT_SECONDS:
                    commit()
                    committed = time.monotonic()
        finally:
            commit()  # an unreadable image and Ctrl-C lose nothing
        features.seek(0)
        features.write(_npy_header(len(kept), extractor.feature_dim))
        _to_disk(features)
    if not kept:
        raise ValueError(f"none of the {len(records):,} {name} images could be read")
    _write_labels(out, name, [records[i] for i in kept], labelled)
    os.replace(lines_partial, lines_final)
    os.replace(partial, final)
    return len(kept)


def _to_disk(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _write_labels(out: Path, name: str, records: Sequence[ImageRecord], labelled: bool) -> None:
    np.save(out / f"{name}_paths.npy", np.array([record.path for record in records]))
    if labelled:
        np.save(out / f"{name}_pids.npy", np.array([record.pid for record in records]))
        if all(record.camid >= 0 for record in records):
            np.save(out / f"{name}_camids.npy", np.array([record.camid for record in records]))


def read_part(folder: Path, name: str) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Features [n, D], memory-mapped, and the CSV's rows of a part that ``write_features`` has written.

    Raises:
        FileNotFoundError: the part is not there, or its extraction is not finished.
        ValueError: its files are damaged or do not belong together.
    """
    file, lines = folder / f"{name}_features.npy", folder / f"{name}.csv"
    if not file.exists():
        if file.with_name(f"{file.name}.partial").exists():
            raise FileNotFoundError(f"{file} is not finished; go on by the same call of python -m sabmn_ext.extract")
        raise FileNotFoundError(f"{folder} holds no {file.name}; write it by python -m sabmn_ext.extract")
    try:
        features = np.load(file, mmap_mode="r", allow_pickle=False)
        with open(lines, newline="", encoding="utf-8") as stream:
            rows = list(_checked_rows(csv.DictReader(stream)))
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} and {lines.name} are not whole: {error}") from None
    if len(rows) != len(features):
        raise ValueError(f"{file} has {len(features)} rows, but {lines.name} has {len(rows)}")
    return features, rows


def _checked_rows(reader: Iterable[dict[str, str]]) -> Iterable[dict[str, str]]:
    for row in reader:
        if any(row.get(column) is None for column in COLUMNS):
            raise ValueError(f"a line of the CSV lacks one of {', '.join(COLUMNS)}")
        yield row
