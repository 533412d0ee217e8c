"""What the compiler reports of every CUDA kernel: nothing is spilled, and an SM holds as many blocks as planned."""

import re
from pathlib import Path

import cuda_resources
import pytest

NVCC = cuda_resources.find_nvcc()


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("target", cuda_resources.shipped_targets())
@pytest.mark.parametrize("source", cuda_resources.SOURCES, ids=lambda source: source.stem)
def test_resources(source: Path, target: str) -> None:
    kernels = cuda_resources.resources(source, target, NVCC)
    assert kernels, f"ptxas reported no kernel of {source.name}"
    for kernel in kernels:
        plan, limits = cuda_resources.PLANS[kernel.name], cuda_resources.LIMITS[target]
        assert kernel.spills == 0, f"{kernel}: registers are spilled"
        assert kernel.stack == 0, f"{kernel}: local memory is used"
        assert kernel.shared <= limits.shared_per_block, f"{kernel}: too much shared memory"
        assert kernel.blocks_per_sm >= plan.blocks_on(target), f"{kernel}: fewer blocks an SM than planned ({plan})"


def test_every_kernel_has_a_plan() -> None:
    kernels = set()
    for source in [*cuda_resources.SOURCES, *cuda_resources.ROOT.glob("csrc/*/*_kernels.cuh")]:
        if source.parent.name != "simt":
            kernels.update(re.findall(r"\b(\w+_kernel)\(", re.sub(r"//.*", "", source.read_text())))
    assert kernels == {re.sub("<.*", "", plan) for plan in cuda_resources.PLANS}
