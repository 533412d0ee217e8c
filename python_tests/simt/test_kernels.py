"""Every CUDA kernel, executed thread by thread on the CPU and compared with float64, in three builds."""

import re

import pytest
from simt_program import ROOT, SANITIZERS, registered_tests, run

BOUNDS = r"(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?"
KERNEL = re.compile(rf"__global__\s+{BOUNDS}void\s+{BOUNDS}(\w+)\s*\(")
TESTS = [name for name in registered_tests() if not name.startswith("planted_")]
HEAVY = [name for name in TESTS if name.endswith("_heavy")]
SEEDS = {"none": "3", "address": "3", "thread": "1"}  # each takes minutes under the thread sanitizer


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("test", sorted(set(TESTS) - set(HEAVY)))
def test_kernel(sanitizer: str, test: str, seed: int) -> None:
    """Values and the order of threads and blocks are drawn anew for each of the seeds."""
    result = run(sanitizer, "--seed", str(seed), "--seeds", SEEDS[sanitizer], test)
    assert result.returncode == 0, result.stdout


@pytest.mark.heavy
@pytest.mark.parametrize("test", HEAVY)
def test_kernel_on_large_inputs(test: str, seed: int) -> None:
    """In the plain build and with one seed: under a sanitizer these would take many minutes."""
    result = run("none", "--seed", str(seed), test)
    assert result.returncode == 0, result.stdout


def test_the_names_read_here_are_those_of_the_program() -> None:
    assert sorted(run("none", "--list").stdout.split()) == sorted(registered_tests())


def test_every_kernel_has_a_test_that_runs_it(seed: int) -> None:
    kernels = set()
    for source in [*ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*.cuh")]:
        code = re.sub(r"//.*", "", source.read_text())
        found = KERNEL.findall(code)
        assert len(found) == code.count("__global__"), f"{source}: a kernel that this test cannot read"
        kernels.update(found)
    launched = set()
    for test in sorted(set(TESTS) - set(HEAVY)):
        said = run("none", "--seed", str(seed), "--seeds", SEEDS["none"], test).stdout
        launched.update(re.findall(r"^kernel (\w+)", said, re.MULTILINE))
    assert kernels
    assert kernels <= launched, f"without a test: {', '.join(sorted(kernels - launched))}"
