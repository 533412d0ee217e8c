"""Spectral normalisation of the network's 58 weights in one call, against torch's parametrization of each.

    python benchmarks/spectral_norm_bench.py [--threads N] [--rounds 15]

The floor beside the forward pass is torch cloning all weights: one reading and one writing.
"""

import argparse
import copy

import torch
from timing import interleaved
from torch import nn
from torch.nn.utils import parametrizations

import sabmn_ext


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    network = sabmn_ext.SABMN(751, weights="none", spectral_norm=False)
    layers = nn.ModuleList(m for m in network.modules() if isinstance(m, nn.Conv2d))
    plain = [layer.weight.detach() for layer in layers]
    gradients = [torch.randn_like(weight) for weight in plain]
    ours, theirs = Weights(copy.deepcopy(layers)), Weights(copy.deepcopy(layers))
    sabmn_ext.spectral_norm_model(ours, preserve_eval=False)
    for layer in theirs.layers:
        parametrizations.spectral_norm(layer)

    def both(model: Weights) -> None:
        torch.autograd.grad(model(), list(model.parameters()), gradients)

    values = sum(weight.numel() for weight in plain)
    print(f"{len(plain)} weights, {values / 1e6:.1f} M values, {options.threads} threads, torch {torch.__version__}")
    for name, runs in (
        ("forward", {"ours": torch.no_grad()(ours), "torch": torch.no_grad()(theirs)}),
        ("forward + backward", {"ours": lambda: both(ours), "torch": lambda: both(theirs)}),
    ):
        seconds = interleaved({**runs, "clone": lambda: [weight.clone() for weight in plain]}, options.rounds)
        print(
            f"{name:>18}: ours {1e3 * seconds['ours']:.1f} ms, torch {1e3 * seconds['torch']:.1f} ms, ratio "
            f"{seconds['torch'] / seconds['ours']:.2f}; a clone of all weights {1e3 * seconds['clone']:.1f} ms"
        )


class Weights(nn.Module):
    """A root whose forward reads every weight once, as a network's does."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self) -> list[torch.Tensor]:
        return [layer.weight for layer in self.layers]


if __name__ == "__main__":
    main()
