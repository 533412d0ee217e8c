"""Freed memory is kept for the next tensors: counted in page faults, in a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from sabmn_ext.host_memory import keep_freed_memory
keep = sys.argv[1] == "keep"
print(keep_freed_memory() if keep else None)
torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(how: str, **environment: str) -> tuple[str, int]:
    """What was returned, and the page faults of ten tensors of 64 MB, one after the other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    returned, faults = done.stdout.split()
    return returned, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_freed_memory_is_kept() -> None:
    returned, faults = run("keep")
    if returned != "True":
        pytest.skip("this C library has no mallopt of glibc's")
    assert faults < run("leave")[1] / 5


def test_thresholds_of_the_environment_are_left_alone() -> None:
    assert run("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
