"""Registers, shared memory and occupancy of self-attention's Triton kernels as a call launches them; without a GPU.

python benchmarks/triton_resources.py [--targets sm_80 ...] [--dtypes bfloat16 float32 tf32] [--sizes 512,512,64 ...]
"""

import argparse
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from cuda_resources import LIMITS
from torch import Tensor
from triton.backends.compiler import GPUTarget

from sabmn_ext.ops import attention as operation
from sabmn_ext.ops.triton import attention as launches

SHAPES = [(2048, 256, 32), (512, 512, 64), (128, 1024, 128), (128, 2048, 256)]  # N, C, d after ResNet-50's stages
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments of one launch; tensors may be meta tensors."""

    kernel: Any
    arguments: Sequence[Any]
    constants: dict[str, Any]
    configuration: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes: registers of a thread, bytes otherwise."""

    registers: int
    stack: int
    local: int
    shared: int
    warps: int

    def blocks_per_sm(self, target: str) -> int:
        limits = LIMITS[target]
        registers = -(-32 * self.registers // 256) * 256 * self.warps  # a warp takes them by 256
        return min(
            limits.threads // (32 * self.warps),
            limits.blocks,
            limits.registers // registers,
            limits.shared // (self.shared + 1024),
        )


def recorded(
    positions: int, channels: int, width: int, value_width: int, dtype: torch.dtype, *, batch: int = 64,
    w_out: bool = True, biases: bool = False, memory_format: torch.memory_format = torch.contiguous_format,
    target: str = "sm_80",
) -> list[Launch]:  # fmt: skip
    """The launches of a forward and a backward call with these sizes on ``target``, and nothing computed."""
    kept: list[Launch] = []

    def record(
        kernel: Any, grid: Any, arguments: Sequence[Any], configurations: list[dict[str, int]], **constants: Any
    ) -> None:
        kept.append(Launch(kernel, arguments, constants, configurations[0]))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x = empty(batch, channels, positions, 1).to(memory_format=memory_format)
    parameters: list[Tensor | None] = [empty(width, channels), empty(width, channels), empty(value_width, channels)]
    parameters += [empty(channels, value_width) if w_out else None, torch.empty((), device="meta")]
    lengths = (width, width, value_width, channels if w_out else 0)
    parameters += [empty(n) if biases and n else None for n in lengths]
    needs = [True, *[p is not None for p in parameters]]
    on_meta = operation._empty_on(x.device)
    y, *saved = on_meta(operation._forward_layouts(x, parameters[0], parameters[2]))  # type: ignore[arg-type]
    gradients = on_meta(operation._gradient_layouts([x, *parameters], needs))
    launch, hopper = launches._launch, launches._hopper
    launches._launch, launches._hopper = record, lambda: target == "sm_90"
    try:
        launches.forward(x, parameters, y, saved)
        launches.backward(y, x, parameters, saved, needs, gradients)
    finally:
        launches._launch, launches._hopper = launch, hopper
    return kept


def compiled(launch: Launch, target: str) -> Any:
    """The kernel for ``target``, specialised as by Triton's launcher: 1 is a constant, multiples of 16 are known."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        specialised = name not in (launch.kernel.do_not_specialize or ())
        if value is None or (isinstance(value, int) and value == 1 and specialised):
            signature[name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], multiple = f"*{_TYPES[value.dtype]}", value.storage_offset() * value.element_size()
        else:
            signature[name], multiple = "i32" if value < 2**31 else "i64", value
        if multiple % 16 == 0 and specialised:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: value for name, value in launch.configuration.items() if name.startswith("num_")}
    for name, value in (launch.constants | launch.configuration).items():
        if name not in options:
            signature[name], constants[(launch.kernel.arg_names.index(name),)] = "constexpr", value
    source = triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options)


def usage(kernel: Any) -> Usage:
    """Read from the machine code of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}
    shared = found["SHARED"] + kernel.metadata.shared
    return Usage(found["REG"], found["STACK"], found["LOCAL"], shared, kernel.metadata.num_warps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "tf32", "float32"])
    parser.add_argument(
        "--sizes", nargs="+", default=SHAPES, help="N,C,d", type=lambda text: tuple(map(int, text.split(",")))
    )
    options = parser.parse_args()
    print(f"{'kernel':<36} {'N, C, d':<15} {'type':<9} {'GPU':<7} registers  local  shared  warps  blocks/SM")
    for positions, channels, width in options.sizes:
        for name in options.dtypes:
            torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
            dtype = torch.float32 if name == "tf32" else getattr(torch, name)
            for target in options.targets:
                for launch in recorded(positions, channels, width, width, dtype, target=target):
                    used = usage(compiled(launch, target))
                    print(
                        f"{launch.name:<36} {f'{positions}, {channels}, {width}':<15} {name:<9} {target:<7} "
                        f"{used.registers:9} {used.local + used.stack:6} {used.shared:7} {used.warps:6} "
                        f"{used.blocks_per_sm(target):10}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
