"""The normalised weights below one root module: updated together, by hooks around the root's forward."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sabmn_ext.nn.spectral_norm_layer import SpectralNorm, normalize, running
from sabmn_ext.ops.spectral_norm import check_sigma


def parametrizations(module: nn.Module) -> dict[str, Any]:
    """The parametrization lists of a module, by parameter; empty for a module without any."""
    return dict(cast(nn.ModuleDict, module.parametrizations).items()) if parametrize.is_parametrized(module) else {}


class Member(NamedTuple):
    """One normalised parameter."""

    host: nn.Module
    parameter: str
    owner: parametrize.ParametrizationList
    layer: SpectralNorm

    def is_present(self) -> bool:
        """Whether the parametrization is still there: torch's own function can take it off too."""
        lists = self.host._modules.get("parametrizations")
        return lists is not None and lists._modules.get(self.parameter) is self.owner


class Group:
    """The hooks of one root.

    They are bound methods, which a deep copy of the model copies along with the group; closures would go on serving the
    original.
    """

    def __init__(self) -> None:
        self.members: list[Member] = []
        self.deferred = DeferredCheck()

    def begin(self, module: nn.Module, inputs: Any) -> None:
        running.enter()
        self.forget_removed()
        # The last layers first: DDP's buckets are filled from the end of the network.
        members = [member for member in reversed(self.members) if member.layer not in running.normalized]
        if members:
            layers, weights = [member.layer for member in members], [member.owner.original for member in members]
            self.deferred.look()
            normalized, sigmas = normalize(layers, weights, cast=True)
            self.deferred.add(sigmas)
            running.normalized.update(zip(layers, normalized, strict=True))

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        running.leave()

    def forget_removed(self) -> None:
        if not all(member.is_present() for member in self.members):
            self.members = [member for member in self.members if member.is_present()]

    def attach(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self.begin)
        root.register_forward_hook(self.end, always_call=True)

    def detach(self, root: nn.Module) -> None:
        for hooks in (root._forward_pre_hooks, root._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]:
                del hooks[key]
                root._forward_hooks_always_called.pop(key, None)


def groups(root: nn.Module) -> list[tuple[nn.Module, Group]]:
    """Every group at or below ``root``, with the module that it hangs on."""
    return [
        (module, group)
        for module in root.modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(group := getattr(hook, "__self__", None), Group)
    ]


class DeferredCheck:
    """Finds a σ that is zero or not finite on devices that the host must not wait for.

    On the CPU the operation raises by itself. On a GPU σ is copied to the host without waiting, and looked at in the
    first later forward in which the copy is there. A new copy starts when the last one has been looked at; meanwhile a
    NaN does not go away, since it is in u and v by then.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[list[str], Tensor, Callable[[], bool]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeferredCheck":
        return DeferredCheck()  # events cannot be copied

    def look(self) -> None:
        if not self.pending or not all(is_there() for _, _, is_there in self.pending):
            return
        pending, self.pending = self.pending, []
        for names, sigma, _ in pending:
            try:
                check_sigma(names, sigma)
            except RuntimeError as error:
                raise RuntimeError(f"in an earlier forward {error}") from None

    def add(self, sigmas: list[tuple[list[str], Tensor]]) -> None:
        if not self.pending and not torch.compiler.is_compiling():
            copies = [(names, copy_to_host(sigma)) for names, sigma in sigmas]
            self.pending = [(names, *copy) for names, copy in copies if copy is not None]


def copy_to_host(sigma: Tensor) -> tuple[Tensor, Callable[[], bool]] | None:
    """Start copying σ to the host: the copy, and what tells whether it is there. None where there is no need."""
    if sigma.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    host = torch.empty_like(sigma, device="cpu", pin_memory=True)
    host.copy_(sigma, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.query
