"""Runs a file of cases for Triton kernels in its own process: Triton reads TRITON_INTERPRET when it is imported."""

import os
import re
import subprocess
import sys
from pathlib import Path


def run_cases(cases: Path, marker: str, seed: int, **environment: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", marker, "--seed", str(seed), str(cases)],
        cwd=cases.parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"\d+ passed", process.stdout), process.stdout
    assert "skipped" not in process.stdout, process.stdout
