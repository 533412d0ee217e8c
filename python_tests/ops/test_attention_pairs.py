"""bfloat16 multiplied in pairs (AVX512-BF16): odd sizes, formats, sharp rows, threads; which processors take it."""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import attention_bench
import pytest
import torch
from attention_cases import call, check, draw, with_gradients
from instruction_sets import instruction_set, needs_native

from sabmn_ext import _native

pytestmark = needs_native
FORM = "avx512_bf16"

# B, C, H, W, key width, value width, biases, output projection: each count that is cut into pairs is odd, then even.
SIZES = [
    (2, 15, 5, 7, 3, 5, True, True),
    (2, 14, 9, 16, 4, 6, True, True),
    (1, 69, 13, 17, 9, 69, True, False),
    (3, 8, 1, 1, 1, 1, False, True),
    (1, 131, 9, 15, 129, 130, True, True),
    (1, 5, 27, 41, 5, 6, True, True),  # the backward cuts the keys into parts
]


@pytest.fixture
def pairs() -> Iterator[None]:
    with instruction_set(FORM):
        yield


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "sliced channels_last"])
@pytest.mark.parametrize("sizes", SIZES[:-1], ids=str)
@pytest.mark.usefixtures("pairs")
def test_output_and_gradients(sizes: tuple[int, ...], layout: str, seed: int) -> None:
    check([draw(sizes, 100 * seed + i, torch.bfloat16, layout) for i in range(16)], "cpu")


@pytest.mark.usefixtures("pairs")
def test_parts_of_keys(seed: int) -> None:
    """Many draws: a bias has few numbers, and their errors are as large as plain torch's."""
    check([draw(SIZES[-1], 100 * seed + i, torch.bfloat16) for i in range(40)], "cpu")


@pytest.mark.usefixtures("pairs")
def test_the_same_bits_with_other_threads(seed: int) -> None:
    before, results = torch.get_num_threads(), []
    inputs = draw(SIZES[5], seed, torch.bfloat16)
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda t: call(t, "cpu"), inputs, torch.ones_like(inputs[0])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_only_bfloat16_is_multiplied_in_pairs(dtype: torch.dtype, seed: int) -> None:
    """The other dtypes have the bits that they have with AVX-512; of bfloat16 some differ, so pairs did run."""
    inputs = draw(SIZES[4], seed, dtype)
    results = []
    for isa in ("avx512", FORM):
        with instruction_set(isa):
            results.append(with_gradients(lambda t: call(t, "cpu"), inputs, torch.ones_like(inputs[0])))
    same = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    assert all(same) == (dtype != torch.bfloat16), same


@pytest.mark.usefixtures("pairs")
def test_gamma_zero_is_the_identity(seed: int) -> None:
    inputs = draw(SIZES[0], seed, torch.bfloat16)
    inputs[5] = torch.zeros((), dtype=torch.bfloat16)
    assert torch.equal(call(inputs, "cpu"), inputs[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("pairs")
def test_one_image_does_not_notice_another(value: float, seed: int) -> None:
    """What stands beside an odd end is another image's, and must not be multiplied."""
    inputs = draw(SIZES[0], seed, torch.bfloat16)
    expected = call(inputs, "cpu")
    for image in range(2):
        inputs[0] = draw(SIZES[0], seed, torch.bfloat16)[0]
        inputs[0][image] = value
        y = call(inputs, "cpu")
        assert not y[image].isfinite().any()
        assert torch.equal(y[1 - image], expected[1 - image])


@pytest.mark.usefixtures("pairs")
def test_the_benchmark_names_the_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert "ours avx512_bf16)" in attention_bench.machine(attention_bench.parse(["--isa", FORM]))
    with pytest.raises(SystemExit, match="2"):
        attention_bench.parse(["--isa", "mmx"])
    assert "instruction set 'mmx' is not available here" in capsys.readouterr().err


CPUINFO = Path("/proc/cpuinfo")


@pytest.mark.skipif(not CPUINFO.exists() or platform.machine() != "x86_64", reason="Linux's list of an x86 processor")
def test_amd_takes_it_by_default_and_intel_does_not() -> None:
    """Where there is a choice, the vendor decides; nothing is timed."""
    lines = dict(line.split(":", 1) for line in CPUINFO.read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines.items()}
    environment = {name: value for name, value in os.environ.items() if name != "SABMN_ISA"}
    environment["PYTHONPATH"] = str(Path(_native.module.__file__).parent)
    code = "import _sabmn_ext; print(_sabmn_ext.isa())"
    taken = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    expected = "avx512_bf16" in fields["flags"] and fields["vendor_id"] == "AuthenticAMD"
    assert (taken.stdout.strip() == FORM) == expected, (taken.stdout, fields["vendor_id"])
