"""The Triton kernels of the spectral normalisation, run by Triton's interpreter and compiled for every architecture."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_runs import run_cases

from sabmn_ext.ops import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = Path(__file__).with_name("triton_spectral_norm_cases.py")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ARCHITECTURES = [80, 90, 100, 120]
# of W, Ŵ and the arithmetic
TYPES = [
    ("float32", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float16", "float32"),
    ("float64", "float64", "float64"),
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float32"),
]
KERNELS = ["forward_products", "forward_sums", "forward_scale", "backward_dots", "backward_gradient"]
BLOCKS_PER_MULTIPROCESSOR = 3  # of 128 threads with 8 KB and more in flight each: enough to keep the memory busy


def test_cases_under_the_interpreter(seed: int) -> None:
    run_cases(CASES, "not heavy", seed, TRITON_INTERPRET="1")


@pytest.mark.heavy
def test_heavy_cases_under_the_interpreter(seed: int) -> None:
    run_cases(CASES, "heavy", seed, TRITON_INTERPRET="1")


@needs_gpu
@pytest.mark.parametrize("marker", ["not heavy", pytest.param("heavy", marks=pytest.mark.heavy)])
def test_cases_on_the_gpu(marker: str, seed: int) -> None:
    run_cases(CASES, marker, seed, TRITON_INTERPRET="0")


def compiled(name: str, types: tuple[str, str, str], architecture: int) -> Any:
    """The kernel as a launch compiles it."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from sabmn_ext.ops.triton import spectral_norm_kernels as kernels

    kernel = getattr(kernels, f"spectral_norm_{name}_kernel")
    names = kernel.arg_names
    fields = kernels.FORWARD_FIELDS if name.startswith("forward") else kernels.BACKWARD_FIELDS
    constants = dict(zip(("WEIGHT", "NORMALIZED", "SUM"), (getattr(tl, t) for t in types), strict=True))
    constants["VECTOR"] = constants["WEIGHT"]
    signature = {
        "fields": (("i64",) * kernels.GROUP.value,) * fields.value,
        "table": "*i64",
        "count": "i32",
        "power": "i32",
        "divide": "i32",
        "eps": "fp64",
        **dict.fromkeys(constants, "constexpr"),
    }
    source = triton.compiler.ASTSource(
        kernel,
        signature={argument: signature[argument] for argument in names},
        constexprs={(names.index(argument),): value for argument, value in constants.items() if argument in names},
        attrs={(names.index("table"),): [["tt.divisibility", 16]]},
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=kernels.LAUNCH_OPTIONS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    ("architecture", "types"),
    [
        pytest.param(architecture, types, marks=[pytest.mark.heavy] * ((architecture, types) != (90, TYPES[0])))
        for architecture in ARCHITECTURES
        for types in TYPES
    ],
)
def test_resources_of_the_compiled_kernels(
    architecture: int, types: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton_resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in KERNELS:
        kernel = compiled(name, types, architecture)
        used = triton_resources.usage(kernel)
        assert used.stack == used.local == 0, f"{name} spills: {used}"
        assert used.shared <= 48 * 1024, f"{name}: {used}"
        assert used.blocks_per_sm(f"sm_{architecture}") >= BLOCKS_PER_MULTIPROCESSOR, f"{name}: {used}"
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), f"{name} has atomics"
        parameters = re.findall(r"\.param \.(\w)(\d+)", kernel.asm["ptx"])
        assert sum(int(bits) // 8 for _, bits in parameters) <= 4096, f"{name} has {len(parameters)} parameters"
        if name != "forward_sums":
            vectors = r"\.v2\.b64" if types[0] == "float64" else r"\.v4\.b32" if types[0] == "float32" else r"\.v2\.b32"
            assert re.search(rf"ld\.global[.\w:]*{vectors}", kernel.asm["ptx"]), f"{name} loads no vectors"


def test_arguments_of_a_group_are_one_pattern_to_triton() -> None:
    from sabmn_ext.ops.triton import spectral_norm, spectral_norm_kernels

    sizes = [(1, 1), (16, 1), (3, 16), (40, 64)]
    u, v = [torch.zeros(rows) for rows, _ in sizes], [torch.zeros(columns) for _, columns in sizes]
    (group,) = spectral_norm._groups(u, v, [1, 1, 16, 64], torch.zeros(4), spectral_norm._forward_bytes)
    values = [value for field in group.records(u, v) for value in field]
    assert len(values) == 7 * spectral_norm_kernels.GROUP.value
    assert all(value % 2 == 1 and 2**62 < value < 2**63 for value in values)


def test_the_rule_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)

    def why_not(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        return dispatch.why_not("spectral_norm_forward", "triton", device, dtype) or ""

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "on a CUDA device, not on cpu" in why_not(cpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert why_not(cpu) == ""
    assert "not torch.int32" in why_not(cpu, torch.int32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 and newer, not 7.5" in why_not(cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert why_not(cuda) == ""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in why_not(cuda)
