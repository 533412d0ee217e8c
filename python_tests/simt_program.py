"""Builds and runs the tests of the CUDA kernels on the CPU (csrc/simt/README.md). Each build and run happens once."""

import fcntl
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZER_FLAGS = {"none": (), "address": ("-fsanitize=address,undefined",), "thread": ("-fsanitize=thread",)}
SANITIZERS = ("none", "thread", pytest.param("address", marks=pytest.mark.heavy))  # the one that compiles longest


def registered_tests() -> list[str]:
    """The names of the tests in csrc/*/*_simt.cpp, planted faults included. Those that take long end in _heavy."""
    sources = sorted(ROOT.glob("csrc/*/*_simt.cpp"))
    return [name for source in sources for name in re.findall(r"^SIMT_TEST\((\w+)", source.read_text(), re.MULTILINE)]


@functools.cache
def missing(sanitizer: str) -> str:
    """Why nothing can be built with this sanitizer here; empty where it can."""
    compiler = os.environ.get("CXX", "c++").split()
    if not shutil.which(compiler[0]):
        return f"no C++ compiler: {compiler[0]}"
    probe = [*compiler, *SANITIZER_FLAGS[sanitizer], "-x", "c++", "-", "-o", os.devnull]
    result = subprocess.run(probe, input="int main() {}", capture_output=True, text=True, check=False)
    return f"{compiler[0]} cannot link with {sanitizer}: {result.stderr.strip()}" if result.returncode else ""


@functools.cache
def program(sanitizer: str) -> tuple[str, ...]:
    """The command that runs the tests of this build."""
    if missing(sanitizer):
        pytest.skip(missing(sanitizer))
    build = [sys.executable, "setup.py", "-q", "simt", "--sanitizer", sanitizer]
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "simt.lock").open("w") as lock:  # another test process may want the same program
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    # ThreadSanitizer's shadow memory can clash with where the kernel loads programs at random.
    fixed_addresses = ("setarch", "-R")
    allowed = shutil.which("setarch") and not subprocess.run([*fixed_addresses, "true"], check=False).returncode
    return (*(fixed_addresses if allowed else ()), str(ROOT / "build" / "simt" / sanitizer / "tests"))


@functools.cache
def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One run of the tests; its stdout holds all that was said."""
    command = [*program(sanitizer), *arguments]
    return subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
