"""The harness finds what it is there to find: each planted fault of csrc/simt/harness_kernels.cuh is reported."""

import re

import pytest
from simt_program import ROOT, SANITIZERS, run

KERNELS = ROOT / "csrc" / "simt" / "harness_kernels.cuh"


def line_of(code: str) -> str:
    """``harness_kernels.cuh:LINE`` of the one line with this code."""
    (number,) = [number for number, line in enumerate(KERNELS.read_text().splitlines(), 1) if code in line]
    return f"{KERNELS.name}:{number}"


def reports(sanitizer: str, test: str, seed: int) -> str:
    result = run(sanitizer, "--seed", str(seed), test)
    assert result.returncode > 0, f"the fault was not found; the program said:\n{result.stdout}"
    return result.stdout


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(
    ("test", "words"),
    [
        ("planted_divergent_barrier", ["224 x __syncthreads at ", "32 x returned, the first is thread (0, 3, 0)"]),
        ("planted_two_barriers", ["224 x __syncthreads at ", "32 x __syncthreads at "]),
        ("planted_partial_mask", ["__shfl_down_sync: only full warps meet here", line_of("__shfl_down_sync(mask")]),
    ],
)
def test_threads_that_do_not_meet(sanitizer: str, test: str, words: list[str], seed: int) -> None:
    said = reports(sanitizer, test, seed)
    assert all(word in said for word in words), said
    assert re.search(r"\b(transpose|sum)_kernel<.*>, block \(\d+, \d+, \d+\)", said), said


def test_data_that_has_not_landed_is_nan(seed: int) -> None:
    assert "is not finite" in reports("none", "planted_missing_wait", seed)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("test", "code"),
    [
        ("planted_missing_guard", "] = values[x][y];"),
        ("planted_static_overrun", "fault == shared_overrun && x == 0"),
        ("planted_dynamic_overrun", "(fault == shared_overrun)] = sum;"),
    ],
)
def test_an_access_out_of_bounds_is_reported_at_its_line(test: str, code: str, seed: int) -> None:
    said = reports("address", test, seed)
    assert line_of(code) in said, said
    # What lies out of bounds may be memory that was freed: then the sanitizer names it so.
    assert re.search(r"AddressSanitizer: (heap-buffer-overflow|global-buffer-overflow|heap-use-after-free)", said), said
    assert re.search(r"^in (transpose|sum)_kernel<.*>, block \(\d+, \d+, \d+\), thread \(", said, re.MULTILINE), said


@pytest.mark.parametrize(
    ("test", "lines"),
    [
        ("planted_missing_barrier", ["values[y][x] = in[", "] = values[x][y];"]),
        ("planted_missing_second_barrier", ["fetch(slice + 1)"]),
        ("planted_missing_fence", [": blockIdx.x] = sum;", "sum += sums[block]"]),
        ("planted_shared_output", [": blockIdx.x] = sum;"]),
    ],
)
def test_a_race_is_reported_at_its_lines(test: str, lines: list[str], seed: int) -> None:
    said = reports("thread", test, seed)
    assert "ThreadSanitizer: data race" in said, said
    assert all(line_of(code) in said for code in lines), said


@pytest.mark.heavy
def test_only_the_thread_sanitizer_sees_a_missing_barrier(seed: int) -> None:
    assert "Sanitizer" not in run("address", "--seed", str(seed), "planted_missing_barrier").stdout
