"""The Triton kernels of self-attention, run by Triton's interpreter and compiled for every architecture."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch
from triton_runs import run_cases

from sabmn_ext.ops import dispatch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

CASES = Path(__file__).with_name("triton_attention_cases.py")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_cases_under_the_interpreter(seed: int) -> None:
    run_cases(CASES, "not heavy", seed, TRITON_INTERPRET="1")


@pytest.mark.heavy
def test_heavy_cases_under_the_interpreter(seed: int) -> None:
    run_cases(CASES, "heavy", seed, TRITON_INTERPRET="1")


@needs_gpu
@pytest.mark.parametrize("marker", ["not heavy", pytest.param("heavy", marks=pytest.mark.heavy)])
def test_cases_on_the_gpu(marker: str, seed: int) -> None:
    run_cases(CASES, marker, seed, TRITON_INTERPRET="0")


# N, C, d, dtype, target: each architecture once, and each way of making products. The rest is in the table that
# benchmarks/triton_resources.py prints.
COMPILED = [
    pytest.param(128, 1024, 128, torch.bfloat16, "sm_90"),
    pytest.param(2048, 256, 32, torch.float16, "sm_80", marks=pytest.mark.heavy),
    pytest.param(512, 512, 64, torch.float32, "sm_100", marks=pytest.mark.heavy),
    pytest.param(128, 2048, 256, torch.bfloat16, "sm_120", marks=pytest.mark.heavy),
]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted kernels are not compiled")
@pytest.mark.parametrize(("positions", "channels", "width", "dtype", "target"), COMPILED)
def test_resources_of_the_compiled_kernels(
    positions: int, channels: int, width: int, dtype: torch.dtype, target: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import triton_resources

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = triton_resources.recorded(positions, channels, width, width, dtype, target=target)
    kernels = {launch.name: launch for launch in launches}  # of the products the last
    for name in ("forward", "query_gradient", "key_value_gradient"):
        launch = kernels[f"attention_{name}_kernel"]
        kernel = triton_resources.compiled(launch, target)
        used = triton_resources.usage(kernel)
        assert used.stack == used.local == 0, f"{name} spills: {used}"
        assert used.shared <= (227 if target == "sm_90" else 99) << 10, f"{name}: {used}"
        assert used.blocks_per_sm(target) >= 1, f"{name}: {used}"
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"]), f"{name} has atomics"
        tensor_cores = re.search(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)", kernel.asm["ptx"])
        assert bool(tensor_cores) == (dtype != torch.float32), name


def test_every_kernel_is_launched_by_a_call() -> None:
    import triton_resources

    from sabmn_ext.ops.triton import attention_kernels, attention_product_kernels

    launches = triton_resources.recorded(129, 40, 17, 300, torch.bfloat16, biases=True)
    names = [*vars(attention_kernels), *vars(attention_product_kernels)]
    kernels = {name for name in names if re.fullmatch(r"attention_\w+_kernel", name)}
    assert {launch.name for launch in launches} == kernels
    fused = triton_resources.recorded(129, 40, 17, 256, torch.bfloat16)
    assert [launch.name for launch in fused[:3]] == [
        "attention_project_kernel",
        "attention_forward_kernel",
        "attention_product_kernel",  # of the backward pass
    ]
    assert len(launches) == len(fused) + 1 == 10


def test_the_rule_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    for operation in ("attention_forward", "attention_backward"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert dispatch.why_not(operation, "triton", torch.device("cuda", 0), dtype) is None
        reason = dispatch.why_not(operation, "triton", torch.device("cuda", 0), torch.float64)
        assert reason == "it serves float32, bfloat16, float16, not torch.float64"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    reason = dispatch.why_not("attention_forward", "triton", torch.device("cuda", 0), torch.float32)
    assert reason == "it serves NVIDIA GPUs, not AMD's"
