"""The convolutions of stride 1 of ResNet-50 in training as matrix products, against torch's convolution.

    python benchmarks/convolution_bench.py [--threads 1 2] [--batch 8] [--dtypes fp32 bf16]

Every kind of layer at 256×128 pixels (last stride 1) by itself, channels_last, candidates in turns, medians; then the
sum over all layers: the 3×3 ones by Winograd's products, and in float32 the 1×1 ones. Forward, and forward with the
gradients of images and weight. GF/s count the products of the direct convolution, so that they can be more than the
processor's. Errors are RMS, against float64, those of torch over ours: above 1 ours are smaller.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from layer_settings import layer_parser
from timing import interleaved
from torch import Tensor, nn
from torch.nn import functional as F

from sabmn_ext.functional import conv1x1, conv3x3
from sabmn_ext.nn.resnet import ResNet
from sabmn_ext.ops import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "with gradients")


class Layer(NamedTuple):
    filters: int  # their side
    channels: int
    rows: int  # channels of the output
    height: int
    width: int

    def __str__(self) -> str:
        return f"[{self.channels} → {self.rows}, {self.height}, {self.width}]"


def resnet50(height: int, width: int, filters: int) -> Counter[Layer]:
    """The convolutions of stride 1 with such filters for images of this size, and how many are alike."""
    found: Counter[Layer] = Counter()

    def note(module: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        if module.kernel_size == (filters, filters) and module.stride == (1, 1):
            found[Layer(filters, module.in_channels, module.out_channels, *inputs[0].shape[2:])] += 1

    network = ResNet("resnet50", last_stride=1).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    network(torch.empty(2, 3, height, width, device="meta"))
    return found


class Candidate:
    def __init__(self, backend: str, tensors: tuple[Tensor, ...]) -> None:
        self.backend = backend
        x, weight, self.grad_y = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
        self.leaves = [x.requires_grad_(), weight.requires_grad_()]

    def forward(self) -> Tensor:
        operation = conv1x1 if self.leaves[1].shape[2] == 1 else conv3x3
        return operation(*self.leaves, backend=self.backend)

    def with_gradients(self) -> list[Tensor]:
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.grad_y)]


def measure(
    layer: Layer, batch: int, dtype: torch.dtype, rounds: int
) -> tuple[dict[tuple[str, str], float], list[float]]:
    """Seconds of (pass, candidate), and the errors of torch's results over those of ours."""
    filters, channels, rows, height, width = layer
    weight = (filters**2 * channels) ** -0.5 * torch.randn(rows, channels, filters, filters)
    drawn = (torch.randn(batch, channels, height, width), weight, torch.randn(batch, rows, height, width))
    tensors = tuple(t.to(dtype) for t in drawn)
    candidates = {"ours": Candidate("cpu", tensors), "torch": Candidate("torch", tensors)}
    errors = compare(candidates, tensors)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, candidate in candidates.items():
        runs |= {("forward", name): candidate.forward, ("with gradients", name): candidate.with_gradients}
    return interleaved(runs, rounds), errors


def compare(candidates: dict[str, Candidate], tensors: tuple[Tensor, ...]) -> list[float]:
    x, weight, grad_y = (t.double().requires_grad_() for t in tensors)
    y = F.conv2d(x, weight, padding=weight.shape[2] // 2)
    exact = [y.detach(), *torch.autograd.grad(y, (x, weight), grad_y)]
    with dispatch.record() as calls:
        results = {name: candidate.with_gradients() for name, candidate in candidates.items()}
    assert "cpu" in {backend for _, backend in calls}
    ratios = []
    for ours, other, right in zip(results["ours"], results["torch"], exact, strict=True):
        error, others = ((t.double() - right).norm().item() for t in (ours, other))
        assert error < 0.01 * right.norm(), f"the error is {error / right.norm():.2g} of the result"
        ratios.append(others / error)
    return ratios


def main() -> None:
    options = layer_parser(__doc__, DTYPES).parse_args()
    torch.manual_seed(0)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for filters in (3, 1) if dtype == "fp32" else (3,):
                setting = f"batch {options.batch}, {dtype}, channels_last, {threads} threads"
                print(f"{filters}×{filters}, {setting}, torch {torch.__version__}")
                report(resnet50(*options.size, filters), options.batch, DTYPES[dtype], options.rounds)


def report(layers: Counter[Layer], batch: int, dtype: torch.dtype, rounds: int) -> None:
    total: dict[tuple[str, str], float] = {}
    for layer, count in layers.items():
        seconds, errors = measure(layer, batch, dtype, rounds)
        flops = 2 * layer.filters**2 * layer.channels * layer.rows * batch * layer.height * layer.width
        cells = []
        for which, products in zip(PASSES, (1, 3), strict=True):
            ours, ratio = seconds[which, "ours"], seconds[which, "torch"] / seconds[which, "ours"]
            rate = products * flops / ours / 1e9
            cells.append(f"{which} ours {1e3 * ours:6.2f} ms ({rate:3.0f} GF/s), torch / ours {ratio:.2f}")
        print(f"{f'{count} × {layer}':28s}" + "; ".join(cells), end="; ")
        print("errors of y, x, weight " + ", ".join(f"{error:.2f}" for error in errors))
        for key, value in seconds.items():
            total[key] = total.get(key, 0.0) + count * value
    parts = (f"{which} {total[which, 'torch'] / total[which, 'ours']:.2f}" for which in PASSES)
    ours, other = (total["with gradients", name] for name in ("ours", "torch"))
    print(f"all: ours {1e3 * ours:.0f} ms, torch {1e3 * other:.0f} ms; torch / ours {', '.join(parts)}\n")


if __name__ == "__main__":
    main()
