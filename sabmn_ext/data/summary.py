"""What is in a data set, as numbers: counts, images and cameras an identity, duplicates, unreadable files."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .images import to_rgb
from .records import ImageRecord, ReidData

SPLITS = ("train", "query", "gallery")
# Of 128 bits. Measured on the demo: a copy saved again as JPEG of quality 60 differs in 4 (median; 90 % in at
# most 9), two different images, of 600, in 61 (median) and never in fewer than 12.
NEAR_BITS = 8
MAX_NEAR = 10_000  # pairs that are listed


def _spread(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "median": median(values), "max": max(values)} if values else {}


def summarize(data: ReidData) -> dict[str, Any]:
    """Counts of each split, from the file lists alone. JSON-able."""
    searched = {record.pid for record in data.query}
    summary: dict[str, Any] = {"name": data.name, "root": data.root, "cameras_known": data.has_cameras}
    for split in SPLITS:
        records: list[ImageRecord] = getattr(data, split)
        images = Counter(record.pid for record in records if record.pid >= 0)
        cameras: dict[int, set[int]] = defaultdict(set)
        for record in records:
            if record.pid >= 0 and record.camid >= 0:
                cameras[record.pid].add(record.camid)
        summary[split] = {
            "images": len(records),
            "identities": len(images),
            "cameras": len({record.camid for record in records if record.camid >= 0}),
            "junk": sum(record.pid < 0 for record in records),
            "images_per_identity": _spread(list(images.values())),
            "cameras_per_identity": _spread([len(seen) for seen in cameras.values()]),
            "one_camera_identities": sum(len(seen) == 1 for seen in cameras.values()),
        }
    # Images of people nobody searches for: they only make the search harder (pid 0 in Market-1501).
    summary["gallery"]["distractors"] = sum(r.pid >= 0 and r.pid not in searched for r in data.gallery)
    matches: dict[int, Counter[int]] = defaultdict(Counter)
    for record in data.gallery:
        matches[record.pid][record.camid] += 1
    summary["query"]["without_match"] = sum(
        not any(camid != record.camid or record.camid < 0 for camid in matches[record.pid])
        for record in data.query
    )
    summary["notes"] = data.notes
    return summary


def difference_hash(path: str) -> np.ndarray:
    """128 bits, bool: is the picture, shrunk to 9 × 9 gray, brighter to the right (64) and below (64)?"""
    from PIL import Image

    with Image.open(path) as file:
        file.draft("RGB", (64, 64))  # JPEG may decode at reduced size: the whole file is still read
        gray = np.asarray(to_rgb(file).convert("L").resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    return np.concatenate(((gray[:8, 1:] > gray[:8, :-1]).ravel(), (gray[1:, :8] > gray[:-1, :8]).ravel()))


def near_pairs(a: np.ndarray, b: np.ndarray, bits: int = NEAR_BITS) -> Iterator[tuple[int, int]]:
    """Pairs (i, j) of rows of bool [n, 128] and [m, 128] that differ in at most `bits` places.

    The Hamming distance of rows in {−1, 1} is (128 − a·b)/2: one matrix product a block, seconds for
    13,000 × 23,000.
    """
    signs = np.where(b, 1.0, -1.0).astype(np.float32).T
    for start in range(0, len(a), 512):
        products = np.where(a[start : start + 512], 1.0, -1.0).astype(np.float32) @ signs
        for i, j in np.argwhere(products >= a.shape[1] - 2 * bits):
            yield start + int(i), int(j)


def audit(data: ReidData, *, progress: bool = True) -> dict[str, Any]:
    """Opens every image and looks for unreadable files and for copies. JSON-able lists of paths.

    query_in_gallery: queries whose bytes are in the gallery, with the first such file. exact: groups of files
    with the same bytes. near: pairs of a training and a test image that look alike (difference hash) and are
    not the same bytes; at most MAX_NEAR of them.
    """
    from tqdm import tqdm

    places = [(split, record) for split in SPLITS for record in getattr(data, split)]
    contents: dict[bytes, list[tuple[str, ImageRecord]]] = {}  # by the bytes' hash
    hashes, unreadable = [], []
    for split, record in tqdm(places, "reading images", unit="image", disable=None if progress else True):
        try:
            digest = hashlib.blake2b(Path(record.path).read_bytes(), digest_size=16).digest()
            if digest not in contents:
                hashes.append(difference_hash(record.path))
            contents.setdefault(digest, []).append((split, record))
        except MemoryError:
            raise
        except Exception as error:  # see images.load_image
            unreadable.append({"path": record.path, "why": f"{type(error).__name__}: {error}"})
    files = list(contents.values())  # files[k] have the same bytes, hashes[k] is theirs
    groups = [group for group in files if len(group) > 1]
    first = [{split: r.path for split, r in reversed(group)} for group in files]  # of each split

    train = np.array([k for k, group in enumerate(files) if any(s == "train" for s, _ in group)], dtype=int)
    test = np.array([k for k, group in enumerate(files) if any(s != "train" for s, _ in group)], dtype=int)
    bits = np.array(hashes, dtype=bool).reshape(len(hashes), -1)
    pairs = ((train[i], test[j]) for i, j in near_pairs(bits[train], bits[test]))
    near = itertools.islice(((a, b) for a, b in pairs if a != b), MAX_NEAR)
    return {
        "unreadable": unreadable,
        "query_in_gallery": [
            [r.path, paths["gallery"]]
            for group, paths in zip(files, first, strict=True)
            for split, r in group
            if split == "query" and "gallery" in paths
        ],
        "exact": [[record.path for _, record in group] for group in groups],
        "exact_across_train_and_test": sum(len({s == "train" for s, _ in group}) == 2 for group in groups),
        "exact_with_different_pids": sum(len({record.pid for _, record in group}) > 1 for group in groups),
        "near": [[first[a]["train"], first[b].get("query", first[b].get("gallery"))] for a, b in near],
    }


def as_text(summary: dict[str, Any], found: dict[str, Any] | None = None) -> str:
    """The summary, and the audit if there is one, as a table of text."""
    rows = [["", *SPLITS]]
    for title, key in (
        ("images", "images"),
        ("identities", "identities"),
        ("cameras", "cameras"),
        ("images an identity, min / median / max", "images_per_identity"),
        ("cameras an identity, min / median / max", "cameras_per_identity"),
        ("identities with one camera", "one_camera_identities"),
        ("junk (pid −1)", "junk"),
        ("images of people nobody queries", "distractors"),
        ("queries without a match", "without_match"),
    ):
        values = [summary[split].get(key, "") for split in SPLITS]
        rows.append([title, *(" / ".join(f"{x:g}" for x in v.values()) if isinstance(v, dict)
                              else f"{v:,}" if v != "" else "" for v in values)])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [f"{summary['name']} in {summary['root']}"]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3))]
        lines.append("  ".join(cells).rstrip())
    if not summary["cameras_known"]:
        lines.append("cameras unknown or left aside: evaluation runs without the camera rule")
    lines += [f"note: {note}" for note in summary["notes"]]
    if found is None:
        return "\n".join(lines)
    near = len(found["near"])
    lines += [
        f"unreadable files: {len(found['unreadable']):,}",
        *(f"  {item['path']} ({item['why']})" for item in found["unreadable"][:10]),
        f"query files inside the gallery: {len(found['query_in_gallery']):,}",
        *(f"  {' = '.join(paths)}" for paths in found["query_in_gallery"][:5]),
        f"groups of exact copies: {len(found['exact']):,}, of which {found['exact_across_train_and_test']:,} "
        f"across train and test and {found['exact_with_different_pids']:,} with different pids",
        *(f"  {' = '.join(paths[:4])}" for paths in found["exact"][:5]),
        f"near copies across train and test: {near:,} pairs{' or more' if near == MAX_NEAR else ''}",
        *(f"  {' ~ '.join(paths)}" for paths in found["near"][:5]),
    ]
    return "\n".join(lines)
