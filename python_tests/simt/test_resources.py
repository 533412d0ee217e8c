"""What the compiler reports of every CUDA kernel: nothing is spilled, and an SM holds as many blocks as planned."""

import re

import cuda_resources
import pytest


@pytest.mark.skipif(cuda_resources.find_nvcc() is None, reason="there is no nvcc")
@pytest.mark.parametrize("target", cuda_resources.shipped_targets())
def test_resources(target: str) -> None:
    kernels = [kernel for kernel in cuda_resources.resources() if kernel.target == target]
    assert {re.sub("<.*", "", kernel.kernel) for kernel in kernels} == kernel_names()
    for kernel in kernels:
        plan, limits = cuda_resources.PLANS[kernel.name], cuda_resources.LIMITS[target]
        assert kernel.spills == 0, f"{kernel}: registers are spilled"
        assert kernel.stack == 0, f"{kernel}: local memory is used"
        assert kernel.shared <= limits.shared_per_block, f"{kernel}: too much shared memory"
        assert kernel.blocks_per_sm >= plan.blocks_on(target), f"{kernel}: fewer blocks an SM than planned ({plan})"


def kernel_names() -> set[str]:
    kernels = set()
    csrc = cuda_resources.ROOT / "csrc"
    for source in [*csrc.glob("*/*_cuda.cu"), *csrc.glob("*/*_kernels.cuh")]:
        if source.parent.name != "simt":
            kernels.update(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", re.sub(r"//.*", "", source.read_text())))
    return kernels


def test_every_kernel_has_a_plan() -> None:
    assert kernel_names() == {re.sub("<.*", "", plan) for plan in cuda_resources.PLANS}
