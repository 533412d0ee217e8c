"""The seed of the randomised tests, and on the path what tests import: python_tests/*.py and benchmarks/*.py."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported. Threads that spin while they wait make the tests many times slower where the processor is
# shared, with a second test process for one.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


def pytest_configure(config: pytest.Config) -> None:
    """What torch.compile keeps on disk goes by an operation's name, not by what the operation is today."""
    if not hasattr(config, "workerinput"):  # worker processes have it from the first one
        folder = tempfile.mkdtemp()
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="seed of the tests that draw their cases (default 0)")


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.getoption('--seed')} (repeat with --seed)"


@pytest.fixture(autouse=True)
def seeded_generators(request: pytest.FixtureRequest) -> None:
    """Every test starts from the run's seed, whichever tests ran before it."""
    torch.manual_seed(request.config.getoption("--seed"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of this run: the same cases for the same ``--seed``."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def fp32_precision() -> Iterator[Callable[[str], None]]:
    """Sets how a GPU multiplies float32: ``ieee`` or ``tf32`` (no attribute, so not by monkeypatch)."""
    before = torch.backends.cuda.matmul.fp32_precision

    def set_to(precision: str) -> None:
        torch.backends.cuda.matmul.fp32_precision = precision

    yield set_to
    set_to(before)
