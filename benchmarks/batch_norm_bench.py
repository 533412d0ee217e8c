"""Batch norm, residual and ReLU of ResNet-50 in training, in one operation against torch's ones in a row.

    python benchmarks/batch_norm_bench.py [--threads 1 2] [--batch 8] [--dtypes fp32 bf16] [--formats channels_last]

Every kind of layer at 256×128 pixels (last stride 1) by itself, candidates in turns, medians; then the sum over all 53
layers. Forward, and backward with a gradient that nothing else refers to, as in a network; making it is not timed. GB/s
are those of the bytes that the plan reads and writes: x twice, the residual, y; backward the gradient and x twice, the
gradient of x, with a residual y and its gradient too. Both candidates must agree first.
"""

from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from layer_settings import layer_parser
from timing import Run, timed, wall_clock
from torch import Tensor

from sabmn_ext.ops import dispatch
from sabmn_ext.ops.batch_norm import batch_norm_act

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Layer(NamedTuple):
    channels: int
    height: int
    width: int
    residual: bool
    relu: bool
    count: int


def resnet50(height: int, width: int) -> list[Layer]:
    """The batch norms of the network for images of this size, those that are alike together."""
    layers = [Layer(64, height // 2, width // 2, False, True, 1)]
    for stage, depth in enumerate((3, 4, 6, 3)):
        h, w = (size // (4, 8, 16, 16)[stage] for size in (height, width))
        narrow, wide = 64 << stage, 256 << stage
        layers += [Layer(narrow, h, w, False, True, 2 * depth - (stage in (1, 2)))]
        if stage in (1, 2):  # before the stride
            layers += [Layer(narrow, 2 * h, 2 * w, False, True, 1)]
        layers += [Layer(wide, h, w, True, True, depth), Layer(wide, h, w, False, False, 1)]
    return layers


class Hands(torch.autograd.Function):
    """Hands its input a gradient that nothing else refers to."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handed_out: list[Tensor]) -> Tensor:
        ctx.handed_out = handed_out
        return y.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.handed_out.pop(), None


class Candidate:
    def __init__(self, backend: str, layer: Layer, inputs: dict[str, Tensor], grad_y: Tensor) -> None:
        self.options: dict[str, Any] = {"relu": layer.relu, "backend": backend}
        self.leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        self.running = {"running_mean": torch.zeros(layer.channels), "running_var": torch.ones(layer.channels)}
        self.grad_y, self.handed_out = grad_y, list[Tensor]()
        self.loss: Any = None

    def forward(self) -> Tensor:
        y = batch_norm_act(**self.leaves, **self.running, **self.options)
        self.loss = Hands.apply(y, self.handed_out)
        return y

    def backward(self) -> None:
        gradients = torch.autograd.grad(self.loss, list(self.leaves.values()))
        self.gradients = [g for g in gradients if g.dim() == 1]  # what is kept is no longer written over

    def clock(self, run: Run) -> float:
        if run == self.backward:
            self.forward()
            self.handed_out[:] = [self.grad_y.clone()]
        return wall_clock(run)


def measure(layer: Layer, batch: int, dtype: torch.dtype, form: str, rounds: int) -> dict[tuple[str, str], float]:
    """Seconds of (pass, candidate)."""
    size = (batch, layer.channels, layer.height, layer.width)

    def image() -> Tensor:
        return torch.randn(size).to(dtype).contiguous(memory_format=FORMATS[form])

    inputs = {"x": image(), "weight": torch.rand(layer.channels) + 0.5, "bias": torch.randn(layer.channels)}
    if layer.residual:
        inputs["residual"] = image()
    grad_y = image()
    backends = {"ours": "cpu", "torch": "torch"}
    candidates = {name: Candidate(backend, layer, inputs, grad_y) for name, backend in backends.items()}
    check(candidates)
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, candidate in candidates.items():
        runs |= {("forward", name): candidate.forward, ("backward", name): candidate.backward}

    def clock(run: Run) -> float:
        return run.__self__.clock(run)  # type: ignore[attr-defined, no-any-return]

    return {key: median(values) for key, values in timed(runs, rounds, clock=clock).items()}


def check(candidates: dict[str, Candidate]) -> None:
    results = []
    tolerance = 0.01 if next(iter(candidates.values())).grad_y.dtype == torch.float32 else 0.05
    with dispatch.record() as calls:
        for candidate in candidates.values():
            y = candidate.forward().detach()
            candidate.handed_out[:] = [candidate.grad_y.clone()]
            candidate.backward()
            results.append([y, *candidate.gradients])
    assert ("batch_norm_act_forward", "cpu") in calls
    for ours, other in zip(*results, strict=True):
        error = (ours.float() - other.float()).norm() / other.float().norm()
        assert error < tolerance, f"the candidates differ by {error:.2g}"


def plan_bytes(layer: Layer, batch: int, dtype: torch.dtype) -> dict[str, int]:
    image = batch * layer.channels * layer.height * layer.width * dtype.itemsize
    return {"forward": (3 + layer.residual) * image, "backward": (7 if layer.residual else 5) * image}


def main() -> None:
    parser = layer_parser(__doc__, DTYPES)
    parser.add_argument("--formats", choices=FORMATS, nargs="+", default=["channels_last"])
    options = parser.parse_args()
    torch.manual_seed(0)
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in options.dtypes:
            for form in options.formats:
                print(f"batch {options.batch}, {dtype}, {form}, {threads} threads, torch {torch.__version__}")
                report(resnet50(*options.size), options.batch, DTYPES[dtype], form, options.rounds)


def report(layers: list[Layer], batch: int, dtype: torch.dtype, form: str, rounds: int) -> None:
    total: dict[tuple[str, str], float] = {}
    for layer in layers:
        seconds = measure(layer, batch, dtype, form, rounds)
        nbytes = plan_bytes(layer, batch, dtype)
        cells = []
        for which in nbytes:
            ours, ratio = seconds[which, "ours"], seconds[which, "torch"] / seconds[which, "ours"]
            rate = nbytes[which] / ours / 1e9
            cells.append(f"{which} ours {1e3 * ours:6.2f} ms ({rate:3.0f} GB/s), torch / ours {ratio:.2f}")
        kind = ("+ residual" if layer.residual else "") + (" + ReLU" if layer.relu else "")
        shape = f"{layer.count:2d} × [{layer.channels}, {layer.height}, {layer.width}] {kind}"
        print(f"{shape:44s}" + "; ".join(cells))
        for key, value in seconds.items():
            total[key] = total.get(key, 0.0) + layer.count * value
    ours, other = (sum(total[which, name] for which in ("forward", "backward")) for name in ("ours", "torch"))
    parts = (f"{which} {total[which, 'torch'] / total[which, 'ours']:.2f}" for which in ("forward", "backward"))
    print(f"all: ours {1e3 * ours:.0f} ms, torch {1e3 * other:.0f} ms;", end=" ")
    print(f"torch / ours {', '.join(parts)}, both {other / ours:.2f}\n")


if __name__ == "__main__":
    main()
