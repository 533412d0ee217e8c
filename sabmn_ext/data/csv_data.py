"""A user's own data as a CSV file whose first line names the columns path, pid, camid (optional) and split.

path is absolute or relative to the CSV file's folder; split is train, query or gallery. pid and camid may be
numbers or names; names are numbered in sorted order. An empty camid is an unknown camera, pid −1 is junk.
"""

from __future__ import annotations

import csv
from pathlib import Path

from .records import ImageRecord, ReidData, shared_identity_notes

COLUMNS = ("path", "pid", "camid", "split")
SPLITS = ("train", "query", "gallery")


def _numbers(values: list[str]) -> dict[str, int]:
    """Integers as they are; if there is any name among them, all are numbered by sorted order, from 0."""
    try:
        return {value: int(value) for value in values if value}
    except ValueError:
        names = sorted({value for value in values if value and value != "-1"})
        return {"-1": -1} | {name: number for number, name in enumerate(names)}


def load(file: Path) -> ReidData:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        columns = reader.fieldnames or []
        if not {"path", "pid", "split"} <= set(columns):
            raise ValueError(f"{file}: the first line must name path, pid, split (and camid); got {columns}")
        rows = [(reader.line_num, {key: (row.get(key) or "").strip() for key in COLUMNS}) for row in reader]
    for line, row in rows:
        if row["split"] not in SPLITS:
            raise ValueError(f"{file}, line {line}: split {row['split']!r} is not train, query or gallery")
        if not row["path"] or not row["pid"]:
            raise ValueError(f"{file}, line {line}: path and pid must not be empty")
        if not (file.parent / row["path"]).is_file():
            raise FileNotFoundError(f"{file}, line {line}: no such file: {file.parent / row['path']}")
    pids, cameras = (_numbers([row[key] for _, row in rows]) for key in ("pid", "camid"))
    splits: dict[str, list[ImageRecord]] = {name: [] for name in SPLITS}
    dropped = 0
    for _, row in rows:
        pid = max(pids[row["pid"]], -1)
        if pid < 0 and row["split"] != "gallery":
            dropped += 1
            continue
        camid = max(cameras.get(row["camid"], -1), -1)
        splits[row["split"]].append(ImageRecord(str(file.parent / row["path"]), pid, camid))
    for name in ("query", "gallery"):
        if not splits[name]:
            raise ValueError(f"{file} has no row with split {name}")
    notes = [f"left out {dropped:,} junk images (pid −1) of train or query"] if dropped else []
    if not splits["train"]:
        notes.append("no row has split train: good for evaluation only")
    notes += shared_identity_notes(splits["train"], splits["query"])
    return ReidData(file.stem, str(file.parent), splits["train"], splits["query"], splits["gallery"], notes)
