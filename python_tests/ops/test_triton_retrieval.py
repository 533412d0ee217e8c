"""The Triton kernels of the ranking, run by Triton's interpreter and compiled for every architecture."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from triton_runs import run_cases

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = Path(__file__).with_name("triton_retrieval_cases.py")
ARCHITECTURES = [80, 90, 100, 120]
BLOCKS_PER_MULTIPROCESSOR = {"filter": 1, "pair_sums": 4, "count": 4}


def test_cases_under_the_interpreter(seed: int) -> None:
    run_cases(CASES, "not heavy", seed, TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cases_on_the_gpu(seed: int) -> None:
    run_cases(CASES, "not heavy", seed, TRITON_INTERPRET="0")


def compiled(name: str, architecture: int, **constants: Any) -> Any:
    """The kernel as a launch compiles it, for float32 features that are contiguous."""
    import triton
    from triton.backends.compiler import GPUTarget

    from sabmn_ext.ops.triton import retrieval_kernels as kernels

    kernel = getattr(kernels, f"retrieval_{name}_kernel")
    signature = {
        **dict.fromkeys(["a", "b", "query_values", "gallery_values", "below", "above", "query", "gallery"], "*fp32"),
        **dict.fromkeys(["query_pids", "gallery_pids", "query_camids", "gallery_camids"], "*i32"),
        **dict.fromkeys(["offsets", "between", "histogram", "indices", "items"], "*i64"),
        **dict.fromkeys(["query_indices", "gallery_indices"], "*i64"),
        **dict.fromkeys(["distances", "thresholds", "sums"], "*fp64"),
        "flags": "*u8",
        **dict.fromkeys(constants, "constexpr"),
    }
    names = kernel.arg_names
    signature = {argument: signature.get(argument, "i32") for argument in names}
    aligned = [a for a in names if signature[a].startswith("*") or a == "dim" or a.endswith("row_stride")]
    source = triton.compiler.ASTSource(
        kernel,
        signature=signature,
        constexprs={(names.index(argument),): value for argument, value in constants.items()},
        attrs={(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned},
    )
    options = kernels.FILTER_OPTIONS if name == "filter" else kernels.EXACT_OPTIONS
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=[pytest.mark.heavy] * (a != 90)) for a in ARCHITECTURES]
)
def test_the_compiled_kernels(architecture: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton_resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    strides = {"query_column_stride": 1, "gallery_column_stride": 1}
    for name, constants in (
        ("filter", {}),
        ("pair_sums", {**strides, "DOT": True}),
        ("pair_sums", {**strides, "DOT": False}),
        ("count", {"BLOCK": 256}),
    ):
        kernel = compiled(name, architecture, **constants)
        ptx, used = kernel.asm["ptx"], triton_resources.usage(kernel)
        assert used.stack == used.local == 0, f"{name} spills: {used}"
        assert used.shared <= 48 * 1024, f"{name}: {used}"
        assert used.blocks_per_sm(f"sm_{architecture}") >= BLOCKS_PER_MULTIPROCESSOR[name], f"{name}: {used}"
        atomics = re.findall(r"\b(?:atom|red)\.[\w.:]+", ptx)
        assert all(re.search(r"\.[us]64$", atomic) for atomic in atomics), f"{name}: {atomics}"
        assert (name != "pair_sums") == bool(atomics), f"{name}: {atomics}"
        if name == "pair_sums":  # whose products and sums are rounded one by one
            assert "fma.rn.f64" not in ptx
            assert "mul.rn.f64" in ptx
        if name == "filter":  # in float32: neither TF32 nor a tensor core's sums
            assert "fma.rn.f32" in ptx
            assert not re.search(r"\b(mma|wgmma|tcgen05)\b", ptx)
