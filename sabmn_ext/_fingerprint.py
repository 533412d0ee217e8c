"""One number for the native sources, compiled into the binary and compared at import.

Used by setup.py (which must not import torch) and by ``sabmn_ext._native``; hence a file of its own.
"""

import hashlib
from pathlib import Path


def source_fingerprint(root: Path) -> str:
    """The fingerprint of ``root/csrc``, or the one that the installation left beside this file.

    The harness and the tests that run in it are left out: no binary that is installed holds them.
    """
    packaged = Path(__file__).with_name("_fingerprint.txt")
    if packaged.exists():
        return packaged.read_text().strip()
    digest = hashlib.sha256()
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    files = [path for path in files if path.parent.name != "simt" and not path.stem.endswith("_simt")]
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
