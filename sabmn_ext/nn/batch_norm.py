"""Which batch norm follows a convolution, and how its statistics move when the convolution's weight is divided by σ.

Batch norm in eval mode computes (z − mean)/√(var + eps). Where z = Wx + b becomes (W/σ)x + b, the same values come out
with mean ← (mean − b)/σ + b and var ← (var + eps)/σ² − eps.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

# One of: the batch norm that follows; None, no batch norm follows; a string, why that cannot be decided.
Follower = _BatchNorm | None | str


def followers(model: nn.Module, convolutions: Mapping[str, nn.Module]) -> dict[str, Follower]:
    """What follows each convolution: read off the traced graph if there is one, else off the module order."""
    for opaque in (False, True):
        try:
            # A copy, since tracing runs forwards, which may change what they read; in train mode, since heads that only
            # training uses have batch norms too.
            graph = _Tracer(opaque).trace(copy.deepcopy(model).train())
        except Exception:  # they run with stand-ins for tensors, which may raise anything
            continue
        return _from_graph(model, graph, convolutions)
    return _from_module_order(model, convolutions)


class _Tracer(torch.fx.Tracer):
    """``opaque``: modules without a batch norm inside are not looked into, since their forward may resist tracing."""

    def __init__(self, opaque: bool) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if super().is_leaf_module(m, module_qualified_name):
            return True
        return self.opaque and not any(isinstance(inner, _BatchNorm) for inner in m.modules())


def _from_graph(
    model: nn.Module, graph: torch.fx.Graph, convolutions: Mapping[str, nn.Module]
) -> dict[str, Follower]:
    modules: dict[object, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def successors(node: torch.fx.Node) -> list[nn.Module | None]:
        """The modules that read a node, flattening and ``nn.Identity`` aside; None for what is no module."""
        found: list[nn.Module | None] = []
        for user in node.users:
            module = modules.get(user.target) if user.op == "call_module" else None
            flattens = user.target in ("flatten", "squeeze") or user.target is torch.flatten
            passes = flattens or isinstance(module, (nn.Flatten, nn.Identity))
            found += successors(user) if passes else [module]
        return found

    called = [(node, modules[node.target]) for node in graph.nodes if node.op == "call_module"]
    calls = Counter(module for _, module in called if isinstance(module, _BatchNorm))
    result: dict[str, Follower] = {}
    for name, convolution in convolutions.items():
        mine = [node for node, module in called if module is convolution]
        next_modules = {module for node in mine for module in successors(node)}
        norms = {module for module in next_modules if isinstance(module, _BatchNorm)}
        if not mine:
            result[name] = "it does not appear in the traced forward"
        elif not norms:
            result[name] = None
        elif len(next_modules) > 1:
            result[name] = "its output goes to a batch norm and elsewhere"
        else:
            (norm,) = norms
            # A batch norm that is shared cannot follow two different σ.
            result[name] = norm if calls[norm] == len(mine) else "its batch norm serves other layers too"
    return result


def _from_module_order(model: nn.Module, convolutions: Mapping[str, nn.Module]) -> dict[str, Follower]:
    chosen = {module: name for name, module in convolutions.items()}
    result: dict[str, Follower] = dict.fromkeys(convolutions, "the model cannot be traced, and no batch norm is next")
    for parent in model.modules():
        children = list(parent.children())
        for module, following in pairwise(children):
            channels = getattr(module, "out_channels", None)
            if module in chosen and isinstance(following, _BatchNorm) and following.num_features == channels:
                result[chosen[module]] = following
    return result


@torch.no_grad()
def rescale(layers: Mapping[str, tuple[nn.Module, Follower, float]]) -> list[str]:
    """Move the statistics behind each layer, given (layer, what follows, σ); returns a line for each that resists."""
    problems = []
    for name, (layer, norm, sigma) in layers.items():
        if norm is None:
            problems.append(f"{name}: no batch norm follows; its output is divided by {sigma:.4g}")
            continue
        if isinstance(norm, str):
            problems.append(f"{name}: {norm}; its output is divided by {sigma:.4g}")
            continue
        if norm.running_mean is None or norm.running_var is None:
            continue  # statistics of the batch at all times: nothing to move
        bias = getattr(layer, "bias", None)
        shift = bias if bias is not None else torch.zeros_like(norm.running_mean)
        norm.running_mean.sub_(shift).div_(sigma).add_(shift)
        near = int((norm.running_var / sigma**2 < 10 * norm.eps).sum())
        if near:
            problems.append(
                f"{name}: var/σ² comes near the batch norm's eps {norm.eps:g} in {near} of {norm.num_features} channels"
            )
        norm.running_var.add_(norm.eps).div_(sigma**2).sub_(norm.eps).clamp_(min=0)
    return problems


def warn_about(problems: list[str]) -> None:
    if problems:
        warnings.warn(
            "spectral normalisation changes what these layers compute in eval mode:\n  " + "\n  ".join(problems),
            stacklevel=3,
        )
