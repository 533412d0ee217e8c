"""The 3×3 convolutions of ResNet-50 in training by Winograd's products, against torch's convolution.

    python benchmarks/convolution_bench.py [--threads 1 2] [--batch 8] [--dtypes fp32 bf16]

Every kind of layer of stride 1 at 256×128 pixels (last stride 1) by itself, channels_last, candidates in turns,
medians; then the sum over all layers. Forward, and forward with the gradients of images and weight. GF/s count the
products of the direct convolution, so that they can be more than the processor's. Errors are RMS, against float64,
those of torch over ours: above 1 ours are smaller.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from layer_settings import layer_parser
from timing import interleaved
from torch import Tensor
from torch.nn import functional as F

from sabmn_ext.functional import conv3x3
from sabmn_ext.ops import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "with gradients")


class Layer(NamedTuple):
    channels: int
    height: int
    width: int
    count: int


def resnet50(height: int, width: int) -> list[Layer]:
    """The 3×3 convolutions of stride 1 for images of this size, those that are alike together."""
    counts = (3, 3, 5, 3)  # the first ones of stages 2 and 3 have the stride
    scales = (4, 8, 16, 16)
    return [Layer(64 << i, height // scales[i], width // scales[i], counts[i]) for i in range(4)]


class Candidate:
    def __init__(self, backend: str, tensors: tuple[Tensor, ...]) -> None:
        self.backend = backend
        x, weight, self.grad_y = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
        self.leaves = [x.requires_grad_(), weight.requires_grad_()]

    def forward(self) -> Tensor:
        return conv3x3(*self.leaves, backend=self.backend)

    def with_gradients(self) -> list[Tensor]:
        y = self.forward()
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.grad_y)]


def measure(
    layer: Layer, batch: int, dtype: torch.dtype, rounds: int
) -> tuple[dict[tuple[str, str], float], list[float]]:
    """Seconds of (pass, candidate), and the errors of torch's results over those of ours."""
    image = (batch, layer.channels, layer.height, layer.width)
    scale = (9 * layer.channels) ** -0.5
    tensors = (torch.randn(image), scale * torch.randn(layer.channels, layer.channels, 3, 3), torch.randn(image))
    tensors = tuple(t.to(dtype) for t in tensors)
    candidates = {"ours": Candidate("cpu", tensors), "torch": Candidate("torch", tensors)}
    errors = compare(candidates, tensors)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, candidate in candidates.items():
        runs |= {("forward", name): candidate.forward, ("with gradients", name): candidate.with_gradients}
    return interleaved(runs, rounds), errors


def compare(candidates: dict[str, Candidate], tensors: tuple[Tensor, ...]) -> list[float]:
    x, weight, grad_y = (t.double().requires_grad_() for t in tensors)
    y = F.conv2d(x, weight, padding=1)
    exact = [y.detach(), *torch.autograd.grad(y, (x, weight), grad_y)]
    with dispatch.record() as calls:
        results = {name: candidate.with_gradients() for name, candidate in candidates.items()}
    assert ("conv3x3_forward", "cpu") in calls
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
            print(f"batch {options.batch}, {dtype}, channels_last, {threads} threads, torch {torch.__version__}")
            report(resnet50(*options.size), options.batch, DTYPES[dtype], options.rounds)


def report(layers: list[Layer], batch: int, dtype: torch.dtype, rounds: int) -> None:
    total: dict[tuple[str, str], float] = {}
    for layer in layers:
        seconds, errors = measure(layer, batch, dtype, rounds)
        flops = 2 * 9 * layer.channels**2 * batch * layer.height * layer.width
        cells = []
        for which, products in zip(PASSES, (1, 3), strict=True):
            ours, ratio = seconds[which, "ours"], seconds[which, "torch"] / seconds[which, "ours"]
            rate = products * flops / ours / 1e9
            cells.append(f"{which} ours {1e3 * ours:6.2f} ms ({rate:3.0f} GF/s), torch / ours {ratio:.2f}")
        shape = f"{layer.count} × [{layer.channels}, {layer.height}, {layer.width}]"
        print(f"{shape:20s}" + "; ".join(cells), end="; ")
        print("errors of y, x, weight " + ", ".join(f"{error:.2f}" for error in errors))
        for key, value in seconds.items():
            total[key] = total.get(key, 0.0) + layer.count * value
    parts = (f"{which} {total[which, 'torch'] / total[which, 'ours']:.2f}" for which in PASSES)
    ours, other = (total["with gradients", name] for name in ("ours", "torch"))
    print(f"all: ours {1e3 * ours:.0f} ms, torch {1e3 * other:.0f} ms; torch / ours {', '.join(parts)}\n")


if __name__ == "__main__":
    main()
