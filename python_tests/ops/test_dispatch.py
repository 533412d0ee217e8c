"""Which backend may serve: the rule of compiled CUDA kernels, and what a native failure says."""

from types import SimpleNamespace

import pytest
import torch

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("target", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_80", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_gpus_a_target_runs_on(target: str, runs: list[tuple[int, int]], does_not: list[tuple[int, int]]) -> None:
    assert all(dispatch.runs_on(target, capability) for capability in runs)
    assert not any(dispatch.runs_on(target, capability) for capability in does_not)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="no CUDA architecture"):
        dispatch.runs_on("gfx90a", (9, 0))


def test_reasons_of_a_cuda_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = dispatch.native_cuda(torch.float32)
    build = {"cuda_targets": ["sm_80", "compute_80"], "cuda_missing": None}
    monkeypatch.setattr(_native, "module", SimpleNamespace())
    monkeypatch.setattr(_native, "build_info", lambda: build)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert rule(GPU, torch.float32) is None
    assert "not torch.float64" in str(rule(GPU, torch.float64))
    assert "not on cpu" in str(rule(torch.device("cpu"), torch.float32))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "not for a GPU of capability (7, 5)" in str(rule(GPU, torch.float32))
    monkeypatch.setattr(torch.version, "cuda", None)  # a build for AMD calls its devices cuda, too
    assert "NVIDIA" in str(rule(GPU, torch.float32))
    build.update(cuda_targets=[], cuda_missing="no nvcc found")
    assert "no nvcc found" in str(rule(GPU, torch.float32))
    monkeypatch.setattr(_native, "module", None)
    monkeypatch.setattr(_native, "missing_reason", "not built")
    assert rule(GPU, torch.float32) == "not built"


def test_triton_comes_first_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, dtype, first in (
        ((9, 0), torch.bfloat16, "triton"),
        ((9, 0), torch.float32, "cuda"),
        ((8, 0), torch.bfloat16, "cuda"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        order = dispatch.order("attention_forward", GPU, dtype)
        assert order[0] == first
        assert sorted(order) == sorted(dispatch.BACKENDS)
    assert dispatch.order("attention_forward", torch.device("cpu"), torch.bfloat16) == list(dispatch.BACKENDS)
    assert dispatch.order("squared_norms", GPU, torch.bfloat16) == list(dispatch.BACKENDS)


def test_a_failure_names_operation_shapes_and_reason() -> None:
    dispatch.check_status(0, "attention_forward")
    with pytest.raises(RuntimeError, match=r"attention_forward failed for tensors \[2, 3\] torch.float32: there is no"):
        dispatch.check_status(1, "attention_forward", torch.zeros(2, 3))


@pytest.mark.skipif(not hasattr(_native.module, "cuda_error"), reason="the native module was built without CUDA")
def test_a_failed_launch_is_told_in_cudas_words() -> None:
    with pytest.raises(RuntimeError, match=r"spectral_norm_forward failed .*\[2, 3\] .*CUDA says: out of memory"):
        dispatch.check_status(1002, "spectral_norm_forward", torch.zeros(2, 3))
    if torch.cuda.is_available():
        return  # the launch below would succeed and spoil the context: its addresses are the CPU's
    weight, u, v, sigma, workspace = (torch.zeros(shape) for shape in ([2, 3], [2], [3], [1], [4096]))
    addresses = [[t.data_ptr()] for t in (weight, u, v, weight, u, v)]
    status = _native.module.spectral_norm_forward_cuda(
        *addresses, [2], [3], [3], sigma.data_ptr(), 1, 1e-12, 0, 0, workspace.data_ptr(), 0
    )
    with pytest.raises(RuntimeError, match=r"CUDA says: .*(driver|device)"):
        dispatch.check_status(status, "spectral_norm_forward", weight)
