"""Registers, spills, shared memory and occupancy of every CUDA kernel, from the compiler's report; without a GPU.

The report is that of the build (setup.py cuda_report); what is not compiled yet is compiled for it.

python benchmarks/cuda_resources.py [--targets sm_80 sm_90 ...]
"""

import argparse
import ast
import functools
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """How a kernel is launched: threads a block, blocks that are to share an SM, dynamic shared memory in bytes.

    The blocks are planned for ``planned_shared``, which the network's shapes take; the launch with the widest takes
    ``dynamic_shared``. An SM of the small kind has 100 KB of shared memory, all others at least 164 KB.
    """

    threads: int
    blocks_per_sm: int
    dynamic_shared: int = 0
    planned_shared: int | None = None
    blocks_per_small_sm: int | None = None

    def blocks_on(self, target: str) -> int:
        small = LIMITS[target].shared <= 100 << 10 and self.blocks_per_small_sm is not None
        return self.blocks_per_small_sm if small else self.blocks_per_sm  # type: ignore[return-value]


PLANS = {
    # csrc/attention: ForwardPlan, BackwardPlan and the constants of the products.
    "attention_forward_kernel<64>": Plan(256, 2, 72 << 10, planned_shared=40 << 10),
    "attention_forward_kernel<128>": Plan(128, 2, 80 << 10, planned_shared=64 << 10, blocks_per_small_sm=1),
    "attention_forward_kernel<256>": Plan(128, 2, 56 << 10, blocks_per_small_sm=1),
    "attention_forward_kernel<tf32, 64>": Plan(128, 2, 80 << 10, planned_shared=64 << 10, blocks_per_small_sm=1),
    "attention_forward_kernel<fp32, 64>": Plan(128, 2, 56 << 10, planned_shared=40 << 10),
    "attention_backward_kernel": Plan(128, 3, 91648, planned_shared=50688, blocks_per_small_sm=1),
    "attention_backward_kernel<tf32>": Plan(128, 2, 91648, planned_shared=50688, blocks_per_small_sm=1),
    "attention_backward_kernel<fp32>": Plan(128, 2, 91648, planned_shared=50688, blocks_per_small_sm=1),
    "attention_backward_block_kernel": Plan(256, 1, 96 << 10),
    "attention_product_kernel": Plan(256, 2, 48 << 10),
    "attention_product_kernel<tf32>": Plan(256, 1, 48 << 10),
    "attention_product_kernel<fp32>": Plan(256, 1, 48 << 10),
    "attention_row_term_kernel": Plan(256, 6),
    "attention_reduce_kernel": Plan(256, 6),
    "device_probe_kernel": Plan(threads=1, blocks_per_sm=1),
    "retrieval_filter_kernel": Plan(512, 1, 96 << 10),
    "retrieval_pack_kernel": Plan(256, 5),
    "retrieval_pairs_kernel": Plan(256, 6),
    "retrieval_refine_kernel": Plan(256, 6),
    "retrieval_rows_kernel": Plan(256, 6),
    "spectral_norm_forward_rows_kernel": Plan(threads=256, blocks_per_sm=3),
    "spectral_norm_forward_columns_kernel": Plan(threads=256, blocks_per_sm=6),
    "spectral_norm_forward_scale_kernel": Plan(threads=256, blocks_per_sm=3),
    "spectral_norm_backward_dot_kernel": Plan(threads=256, blocks_per_sm=5),
    "spectral_norm_backward_rows_kernel": Plan(threads=256, blocks_per_sm=3),
}


@dataclass(frozen=True)
class Limits:
    """Of an SM (CUDA programming guide, compute capabilities); shared memory in bytes."""

    threads: int
    blocks: int
    shared: int
    shared_per_block: int
    registers: int = 65536


LIMITS = {
    "sm_80": Limits(2048, 32, 164 << 10, 163 << 10),
    "sm_90": Limits(2048, 32, 228 << 10, 227 << 10),
    "sm_100": Limits(2048, 32, 228 << 10, 227 << 10),
    "sm_120": Limits(1536, 24, 100 << 10, 99 << 10),
}


@dataclass(frozen=True)
class Resources:
    """What a kernel takes on one architecture; bytes but for the registers of a thread."""

    kernel: str  # with its types
    target: str
    registers: int
    stack: int
    spills: int
    static_shared: int

    @property
    def name(self) -> str:
        """The key in ``PLANS``: the name with its types where these have a plan of their own, else with its numbers."""
        if self.kernel in PLANS:
            return self.kernel
        numbers = re.findall(r"\b\d+\b", "".join(re.findall(r"<.*", self.kernel)))
        return re.sub(r"<.*", "", self.kernel) + (f"<{', '.join(numbers)}>" if numbers else "")

    @property
    def shared(self) -> int:
        return self.static_shared + PLANS[self.name].dynamic_shared

    @property
    def planned_shared(self) -> int:
        planned = PLANS[self.name].planned_shared
        return self.shared if planned is None else self.static_shared + planned

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit an SM: registers come in units of 256 a warp, shared memory with 1 KB a block."""
        limits, warps = LIMITS[self.target], -(-PLANS[self.name].threads // 32)
        registers = -(-self.registers * 32 // 256) * 256 * warps
        return min(
            limits.threads // (32 * warps),
            limits.blocks,
            limits.registers // registers,
            limits.shared // (self.planned_shared + 1024),
        )


def shipped_targets() -> list[str]:
    """The architectures of setup.py that machine code is shipped for."""
    match = re.search(r"^CUDA_TARGETS = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert match, "setup.py has no line CUDA_TARGETS = [...]"
    return [target for target in ast.literal_eval(match[1]) if target.startswith("sm_")]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


@functools.cache
def resources() -> list[Resources]:
    """What ptxas says of every kernel on every architecture that is built."""
    command = [sys.executable, "setup.py", "-q", "cuda_report"]
    environment = os.environ | {"SABMN_CUDA": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"the CUDA kernels do not compile:\n{result.stdout}{result.stderr}")
    report = re.compile(
        r"Compiling entry function '(?:void )?([^\n]*)' for '(sm_\w+)'.*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n",
        re.DOTALL,
    )
    found = []
    for path in re.findall(r"^report (.*)$", result.stdout, re.MULTILINE):
        said = Path(path).read_text()
        readable = subprocess.run(["c++filt"], input=said, capture_output=True, text=True, check=True).stdout
        for signature, target, stack, stores, loads, registers, rest in report.findall(readable):
            shared = re.search(r"(\d+) bytes smem", rest)
            kernel = re.sub(r"\(anonymous namespace\)::|sabmn::", "", signature)
            kernel = re.sub(r"\((?!anonymous).*", "", kernel)
            static_shared = int(shared[1]) if shared else 0
            found.append(Resources(kernel, target, int(registers), int(stack), int(stores) + int(loads), static_shared))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=shipped_targets(), choices=sorted(LIMITS))
    options = parser.parse_args()
    if find_nvcc() is None:
        raise SystemExit("error: no nvcc found (CUDA_HOME, PATH)")
    print(f"{'kernel':<62} {'GPU':<7} registers  spills  local  shared  blocks/SM (planned)  threads of the SM's")
    for kernel in sorted(resources(), key=lambda k: (k.kernel, len(k.target), k.target)):
        if kernel.target not in options.targets:
            continue
        plan = PLANS[kernel.name]
        share = kernel.blocks_per_sm * plan.threads / LIMITS[kernel.target].threads
        print(
            f"{kernel.kernel:<62} {kernel.target:<7} {kernel.registers:9} {kernel.spills:7} {kernel.stack:6} "
            f"{kernel.shared:7} {kernel.blocks_per_sm:9} ({plan.blocks_on(kernel.target)}) {share:24.0%}"
        )


if __name__ == "__main__":
    main()
