"""The benchmarks run (what they measure is nobody's test: machines are noisy)."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
COMMANDS = {
    "attention_bench.py": ["--stages", "3", "--batch", "1", "--rounds", "1", "--profile", "trace"],
    "spectral_norm_bench.py": ["--rounds", "1"],
    "retrieval_bench.py": ["--queries", "40", "--gallery", "500", "--dim", "64", "--rounds", "1"],
}


@pytest.mark.parametrize("script", COMMANDS)
def test_benchmark_runs(script: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / script), *COMMANDS[script]]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "ours" in result.stdout
    if "--profile" in COMMANDS[script]:
        assert (tmp_path / "trace.stage3.json").stat().st_size > 0


def test_every_benchmark_is_tested() -> None:
    assert {path.name for path in FOLDER.glob("*_bench.py")} == set(COMMANDS)
