"""Spectral normalisation of the network's 58 weights in one call, against torch's parametrization of each.

    python benchmarks/spectral_norm_bench.py [--device cuda] [--threads N] [--rounds 15] [--step-rounds 7]

Floors beside it: torch cloning all weights (one reading, one writing) for the forward pass, and a plain loop over as
much memory (two readings, one writing) for the backward pass. Every backward pass gets gradients that nothing else
refers to, as in a training step; making them is not timed. Then a training step of the network without, with ours, and
with torch's. On a GPU, as a training step calls it: with the launches of the host, and until the device has done.
"""

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from timing import Run, interleaved, timed, wall_clock
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import sabmn_ext

STEP_BATCH, STEP_SIZE = 4, (64, 32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--step-rounds", type=int, default=7)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device here; expected cpu")
    torch.set_num_threads(options.threads)
    network = sabmn_ext.SABMN(751, weights="none", spectral_norm=False).to(options.device)
    measure_operation(network, options.threads, options.rounds)
    measure_step(network, options.step_rounds)


def measure_operation(network: nn.Module, threads: int, rounds: int) -> None:
    layers = nn.ModuleList(m for m in network.modules() if isinstance(m, nn.Conv2d))
    plain = [layer.weight.detach() for layer in layers]
    gradients = [torch.randn_like(weight) for weight in plain]
    outputs = [torch.empty_like(weight) for weight in plain]
    ours, theirs = Weights(copy.deepcopy(layers)), Weights(copy.deepcopy(layers))
    normalize_with_ours(ours)
    normalize_with_torch(theirs)
    values = sum(weight.numel() for weight in plain)
    where = torch.cuda.get_device_name() if plain[0].is_cuda else f"{threads} threads"
    print(f"{len(plain)} weights, {values / 1e6:.1f} M values, {where}, torch {torch.__version__}")

    handed_out: list[torch.Tensor] = []

    def clock(run: Run) -> float:
        handed_out[:] = [gradient.clone() for gradient in gradients]
        return wall_clock(run)

    def both(model: Weights) -> None:
        backward(RestOfNetwork.apply(handed_out, *model()), list(model.parameters()))

    def only_backward(model: Weights) -> Callable[[], None]:
        loss, parameters = RestOfNetwork.apply(handed_out, *model()), list(model.parameters())
        return lambda: backward(loss, parameters)

    def backward(loss: torch.Tensor, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(retain_graph=True)

    def loop() -> None:
        for gradient, weight, output in zip(gradients, plain, outputs, strict=True):
            torch.add(gradient, weight, out=output)

    for name, runs, floor in (
        ("forward", {"ours": torch.no_grad()(ours), "torch": torch.no_grad()(theirs)}, "clone"),
        ("backward", {"ours": only_backward(ours), "torch": only_backward(theirs)}, "three-pass loop"),
        ("forward + backward", {"ours": lambda: both(ours), "torch": lambda: both(theirs)}, None),
    ):
        floors = {"clone": lambda: [weight.clone() for weight in plain], "three-pass loop": loop}
        times = timed(runs | ({floor: floors[floor]} if floor else {}), rounds, clock=clock)
        seconds = {candidate: median(values) for candidate, values in times.items()}
        line = f"{name:>18}: ours {1e3 * seconds['ours']:.1f} ms, torch {1e3 * seconds['torch']:.1f} ms, "
        line += f"ratio {seconds['torch'] / seconds['ours']:.2f}"
        if floor:
            line += f"; {floor} {1e3 * seconds[floor]:.1f} ms, ours takes {seconds['ours'] / seconds[floor]:.2f} of it"
        print(line)


def measure_step(network: nn.Module, rounds: int) -> None:
    device = next(network.parameters()).device
    images = torch.randn(STEP_BATCH, 3, *STEP_SIZE, device=device)
    labels = torch.randint(0, 751, (STEP_BATCH,), device=device)
    height, width = STEP_SIZE
    seconds = interleaved(
        {
            "without": training_step(copy.deepcopy(network), images, labels),
            "ours": training_step(normalize_with_ours(copy.deepcopy(network)), images, labels),
            "torch": training_step(normalize_with_torch(copy.deepcopy(network)), images, labels),
        },
        rounds,
    )
    shares = ", ".join(f"{name} takes {seconds[name] / seconds['without']:.2f}" for name in ("ours", "torch"))
    without = 1e3 * seconds["without"]
    print(f"training step, B = {STEP_BATCH}, {height}×{width}: without {without:.0f} ms; of it, {shares}")


def training_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step() -> None:
        optimizer.zero_grad()
        with parametrize.cached():  # torch's version would run one power iteration for each reading of a weight
            torch.stack([nn.functional.cross_entropy(logits, labels) for logits in network(images)]).sum().backward()
        optimizer.step()

    return step


def normalize_with_ours(model: nn.Module) -> nn.Module:
    return sabmn_ext.spectral_norm_model(model, preserve_eval=False)


def normalize_with_torch(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.spectral_norm(module)
    return model


class RestOfNetwork(torch.autograd.Function):
    """Takes the weights, and hands each its gradient when the backward pass begins; keeps none."""

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *weights: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        handed_out = tuple(ctx.gradients)
        ctx.gradients.clear()
        return (None, *handed_out)


class Weights(nn.Module):
    """A root whose forward reads every weight once, as a network's does."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self.layers]


if __name__ == "__main__":
    main()
