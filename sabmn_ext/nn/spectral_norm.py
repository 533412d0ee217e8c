"""Spectral normalisation of layers and of whole networks (Miyato et al., 2018), every weight of a network in one call.

State dicts, initial values and results are those of ``torch.nn.utils.parametrizations.spectral_norm`` with the root's
forward run under ``parametrize.cached()``: one power iteration per training-mode forward of the root, however often a
weight is read. A weight that is read outside its root's forward behaves as torch's does: one iteration per reading in
train mode.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sabmn_ext.nn.batch_norm import followers, rescale, warn_about
from sabmn_ext.ops import reference
from sabmn_ext.ops.spectral_norm import spectral_norm as normalize_weights

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class SpectralNorm(nn.Module):
    """The parametrization of one weight: holds u and v, and hands out the normalised weight.

    Args:
        weight: the weight to normalise, of any floating dtype. A vector is divided by its length.
        n_power_iterations: power iterations per training-mode forward.
        dim: the dimension of ``weight`` that is the matrix's row.
        eps: the smallest length that a vector is divided by.
        initial_iterations: power iterations now, from random vectors.
    """

    _u: Tensor
    _v: Tensor

    def __init__(
        self,
        weight: Tensor,
        n_power_iterations: int = 1,
        dim: int = 0,
        eps: float = 1e-12,
        initial_iterations: int = 15,
    ) -> None:
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise ValueError(f"dim is {dim}, expected one of the {weight.dim()} dimensions of the weight")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations is {n_power_iterations}, expected 1 or more")
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.dim(), eps
        self.normalized: Tensor | None = None  # this forward's, while the root's forward runs
        self.removed = False  # from its layer; the group, which may hang on any module above, then forgets it
        if weight.dim() > 1:
            with torch.no_grad():
                matrix = self.rows_first(weight).flatten(1)
                u, v = (matrix.new_empty(n).normal_(0, 1) for n in matrix.shape)
                u, v = (nn.functional.normalize(t, dim=0, eps=eps) for t in (u, v))
                u, v = reference.power_iteration(matrix, u, v, initial_iterations, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def rows_first(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0)

    def forward(self, weight: Tensor) -> Tensor:
        if self.normalized is not None:
            return self.normalized
        if weight.dim() == 1:
            return nn.functional.normalize(weight, dim=0, eps=self.eps)
        return _update([self], [weight], ["the weight"])[0]

    def sigma(self, weight: Tensor) -> float:
        """The estimate uᵀWv of the largest singular value, without an update."""
        with torch.no_grad():
            return torch.dot(self._u, torch.mv(self.rows_first(weight).flatten(1), self._v)).item()


def _update(layers: list[SpectralNorm], weights: list[Tensor], names: list[str]) -> list[Tensor]:
    """One power iteration (in train mode) and the normalised weights, for layers of one kind (see ``_Group.begin``)."""
    first = layers[0]
    matrices = [layer.rows_first(weight) for layer, weight in zip(layers, weights, strict=True)]
    u, v = [layer._u for layer in layers], [layer._v for layer in layers]
    iterations = first.n_power_iterations if first.training else 0
    normalized, u_new, v_new, _ = normalize_weights(
        matrices, u, v, n_power_iterations=iterations, eps=first.eps, names=names
    )
    if iterations:
        # In place: DDP's broadcast and CUDA graphs hold the buffers. The backward pass keeps the fresh tensors.
        with torch.no_grad():
            torch._foreach_copy_(u, u_new)
            torch._foreach_copy_(v, v_new)
    return [n.movedim(0, layer.dim) for n, layer in zip(normalized, layers, strict=True)]


class _Group:
    """The normalised weights below one root module, updated together by hooks around the root's forward.

    The hooks are bound methods, which a deep copy of the model copies along with the group; closures would go on
    serving the original.
    """

    def __init__(self) -> None:
        self.members: list[tuple[str, parametrize.ParametrizationList, SpectralNorm]] = []
        self.depth = 0

    def begin(self, module: nn.Module, inputs: Any) -> None:
        self.depth += 1
        if self.depth > 1:
            return
        self.forget_removed()
        kinds: dict[Any, list[tuple[str, Tensor, SpectralNorm]]] = {}
        for name, owner, layer in self.members:
            weight = owner.original
            iterations = layer.n_power_iterations if layer.training else 0
            kind = (iterations, layer.eps, weight.dtype, weight.device)
            kinds.setdefault(kind, []).append((name, weight, layer))
        for members in kinds.values():
            names, weights, layers = (list(column) for column in zip(*members, strict=True))
            for layer, normalized in zip(layers, _update(layers, weights, names), strict=True):
                layer.normalized = normalized

    def end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            for _, _, layer in self.members:
                layer.normalized = None

    def forget_removed(self) -> None:
        if any(layer.removed for _, _, layer in self.members):
            self.members = [member for member in self.members if not member[2].removed]

    def attach(self, root: nn.Module) -> None:
        root.register_forward_pre_hook(self.begin)
        root.register_forward_hook(self.end, always_call=True)


def _groups(root: nn.Module) -> list[tuple[nn.Module, int, _Group]]:
    """Every group below ``root``: the module that it hangs on, the key of its pre-hook, and the group."""
    return [
        (module, key, group)
        for module in root.modules()
        for key, hook in module._forward_pre_hooks.items()
        if isinstance(group := getattr(hook, "__self__", None), _Group)
    ]


def is_normalized(module: nn.Module, name: str = "weight") -> bool:
    """Whether the parameter is spectrally normalised already, by this package or by torch (either of its forms)."""
    if hasattr(module, f"{name}_orig") and hasattr(module, f"{name}_u"):
        return True
    if not parametrize.is_parametrized(module, name):
        return False
    return any(type(p).__name__ in ("SpectralNorm", "_SpectralNorm") for p in _parametrizations(module)[name])


def _parametrizations(module: nn.Module) -> dict[str, Any]:
    """The parametrization lists of a parametrized module, by parameter."""
    return dict(cast(nn.ModuleDict, module.parametrizations).items())


def _register(
    group: _Group, module: nn.Module, name: str, qualified: str, iterations: int, eps: float, dim: int | None
) -> None:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter '{name}'; expected the name of a weight")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    # torch runs 15 iterations, and in train mode reads the weight once more while it registers the parametrization.
    layer = SpectralNorm(weight, iterations, dim, eps, initial_iterations=15 + iterations * module.training)
    layer.train(module.training)
    parametrize.register_parametrization(module, name, layer, unsafe=True)
    module.register_load_state_dict_pre_hook(_accept_old_keys)
    if weight.dim() > 1:
        group.members.append((qualified, _parametrizations(module)[name], layer))


def _accept_old_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames the keys of torch's older ``nn.utils.spectral_norm`` to the parametrization's."""
    for name in _parametrizations(module) if parametrize.is_parametrized(module) else ():
        new = f"{prefix}parametrizations.{name}"
        old_keys = {f"{name}_orig": f"{new}.original", f"{name}_u": f"{new}.0._u", f"{name}_v": f"{new}.0._v"}
        for old, key in old_keys.items():
            if prefix + old in state_dict:
                state_dict[key] = state_dict.pop(prefix + old)


def spectral_norm(
    module: nn.Module, name: str = "weight", n_power_iterations: int = 1, eps: float = 1e-12, dim: int | None = None
) -> nn.Module:
    """Normalise one parameter of ``module`` by its largest singular value; returns the same module.

    Args as ``torch.nn.utils.parametrizations.spectral_norm``: ``dim`` is the weight's row dimension, by default 1 for
    transposed convolutions and 0 otherwise. A parameter that is normalised already is left alone.

    Raises:
        ValueError: no such parameter, ``dim`` out of range, fewer than one power iteration.

    >>> layer = sabmn_ext.spectral_norm(torch.nn.Linear(20, 40))
    >>> torch.linalg.matrix_norm(layer.weight, 2)   # about 1
    """
    if not is_normalized(module, name):
        group = _Group()
        _register(group, module, name, name, n_power_iterations, eps, dim)
        group.attach(module)
    return module


def spectral_norm_model(
    model: nn.Module,
    *,
    types: tuple[type[nn.Module], ...] = CONVOLUTIONS,
    exclude: Iterable[str | nn.Module] = (),
    preserve_eval: bool = True,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
) -> nn.Module:
    """Normalise the ``weight`` of every layer of the given types in ``model``; returns the same model.

    All weights are updated together, once per training-mode forward of ``model``. Weights that are normalised already
    are left alone, so a second call changes nothing.

    Args:
        model: the root; its forward updates the weights.
        types: the layers to normalise; every convolution by default.
        exclude: names (as in ``model.named_modules()``; what is below them is excluded too) or modules.
        preserve_eval: also move the running statistics of the batch norms that follow, so that the model computes in
            eval mode what it computed before. Dividing a trained network's weights and leaving the statistics
            destroys it. Layers for which this cannot be done are named in a warning.
        n_power_iterations, eps: see ``spectral_norm``.

    Raises:
        ValueError: ``exclude`` names a module that is not there.
    """
    modules = dict(model.named_modules())
    excluded: set[nn.Module] = set()
    for entry in exclude:
        if isinstance(entry, str) and entry not in modules:
            raise ValueError(f"exclude names '{entry}', which is no module of {type(model).__name__}")
        excluded.update((modules[entry] if isinstance(entry, str) else entry).modules())
    chosen = {
        name: module
        for name, module in modules.items()
        if isinstance(module, types) and module not in excluded and not is_normalized(module)
    }
    following = followers(model, chosen) if preserve_eval else {}
    group = _Group()
    for name, module in chosen.items():
        _register(group, module, "weight", f"{name}.weight" if name else "weight", n_power_iterations, eps, None)
    if group.members:
        group.attach(model)
    if preserve_eval:
        warn_about(rescale({name: (chosen[name], bn, layer_sigma(chosen[name])) for name, bn in following.items()}))
    return model


def layer_sigma(module: nn.Module) -> float:
    """σ of a normalised layer's ``weight``."""
    owner = _parametrizations(module)["weight"]
    sigma: float = owner[0].sigma(owner.original)
    return sigma


def remove_spectral_norm(module: nn.Module) -> nn.Module:
    """Replace every normalised weight of ``module`` and below by its value in eval mode; returns the same module."""
    for host in list(module.modules()):
        if not parametrize.is_parametrized(host):
            continue
        for name, owner in _parametrizations(host).items():
            if any(isinstance(layer, SpectralNorm) for layer in owner):
                owner.eval()  # no power iteration while the value is read
                for layer in owner:
                    layer.removed = True
                parametrize.remove_parametrizations(host, name, leave_parametrized=True)
    for root, key, group in _groups(module):
        group.forget_removed()
        if not group.members:
            del root._forward_pre_hooks[key]
            for other, hook in list(root._forward_hooks.items()):
                if getattr(hook, "__self__", None) is group:
                    del root._forward_hooks[other]
                    root._forward_hooks_always_called.pop(other, None)
    return module
