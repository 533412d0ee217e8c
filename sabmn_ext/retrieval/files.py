"""Features and results on disk: what ``python -m sabmn_ext.evaluate`` reads and writes."""

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sabmn_ext.retrieval.inputs import as_matrix
from sabmn_ext.retrieval.statistics import QueryScores

NEEDED = ("query_features", "gallery_features", "query_pids", "gallery_pids")
OPTIONAL = ("query_camids", "gallery_camids", "query_paths", "gallery_paths")


def read_features(source: Path) -> dict[str, np.ndarray]:
    """The arrays ``NEEDED`` and ``OPTIONAL`` of an .npz file, or of a folder of .npy files, which stay on the disk.

    Never unpickles. A ValueError says what is missing or damaged; a FileNotFoundError that nothing is there.
    """
    if not source.exists():
        raise FileNotFoundError(f"features {source}: no such file or folder")
    arrays, found = _mapped(source) if source.is_dir() else _unpacked(source)
    missing = [name for name in NEEDED if name not in arrays]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}; it holds {', '.join(found) or 'nothing'}")
    for side in ("query", "gallery"):
        count = len(as_matrix(f"{side}_features", arrays[f"{side}_features"]))
        paths = arrays.get(f"{side}_paths")
        if paths is not None and paths.shape != (count,):
            raise ValueError(f"{side}_paths has shape {list(paths.shape)}; expected [{count}]")
    return arrays


def _unpacked(file: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    try:
        if not zipfile.is_zipfile(file):
            raise ValueError("it is no archive, or cut off; write it with numpy.savez")
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in (*NEEDED, *OPTIONAL) if name in archive.files}, archive.files
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{file} is not a whole .npz file of plain arrays: {error}") from None


def _mapped(folder: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    files = sorted(folder.glob("*.npy"))
    arrays = {}
    for file in files:
        if file.stem in NEEDED or file.stem in OPTIONAL:
            try:
                arrays[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (ValueError, OSError, EOFError) as error:
                raise ValueError(f"{file} is not a whole .npy file of a plain array: {error}") from None
    return arrays, [file.stem for file in files]


def write_result(file: Path, report: dict[str, Any]) -> None:
    """JSON with one entry a line, those of the objects in it too."""

    def lines(items: dict[str, Any], indent: str) -> str:
        inner = indent + "  "
        entries = [
            f"{inner}{json.dumps(key)}: {lines(x, inner) if isinstance(x, dict) else json.dumps(x, allow_nan=False)}"
            for key, x in items.items()
        ]
        return "{\n" + ",\n".join(entries) + f"\n{indent}}}"

    file.write_text(lines(report, "") + "\n")


@dataclass(frozen=True)
class StoredResult:
    """A result read from ``file``, as far as another one is compared with it."""

    file: Path
    scores: QueryScores
    num_kept: int  # gallery items without junk


def read_result(run: Path) -> StoredResult:
    """A result that ``write_result`` has written: ``run`` is its file, or the folder of a training run that holds it.

    Raises:
        FileNotFoundError: there is none (says how to get one).
        ValueError: the file is damaged or something else (names it, and what is wrong).
    """
    file = run / "last.evaluation.json" if run.is_dir() else run
    if not file.is_file():
        advice = f"; write it by: python -m sabmn_ext.evaluate --checkpoint {run / 'last.pt'}" if run.is_dir() else ""
        raise FileNotFoundError(f"there is no result {file}{advice}")
    try:
        report = json.loads(file.read_bytes())
        if not isinstance(report, dict) or not isinstance(report.get("queries"), dict):
            raise ValueError("it holds no scores of queries")
        return StoredResult(file, QueryScores.from_dict(report["queries"]), report["num_gallery"] - report["num_junk"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is not a whole result ({error}); write one by: "
            "python -m sabmn_ext.evaluate --checkpoint FILE (or --features FILE)"
        ) from None
