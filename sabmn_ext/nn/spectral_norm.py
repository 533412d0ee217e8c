"""Spectral normalisation of layers and of whole networks (Miyato et al., 2018), every weight of a network in one call.

State dicts, initial values and results are those of ``torch.nn.utils.parametrizations.spectral_norm`` with the forward
run under ``parametrize.cached()``: one update of u and v per training-mode forward of the outermost normalised module,
under ``no_grad`` too, however often a weight is read. A weight that is read outside such a forward behaves as torch's
does: one update per reading in train mode. Deliberate differences:

- The forward of a root updates all its weights; torch leaves those alone that the forward does not read.
- A weight whose σ is zero or not finite is an error that names it; torch's becomes NaN. On a GPU the host does not
  wait for σ: the error comes in a later forward, when u and v are spoiled already.
- Autocast does not reach the normalisation: u, v and σ have the weight's own precision. Inside the forward,
  convolutions and ``nn.Linear`` get their weight in autocast's dtype, rounded once.
- Gradient checkpointing is exact, where torch's iterates once more in the recomputation: what is read while a backward
  pass runs updates nothing. Once a later forward in train mode has changed u and v, recomputing an earlier one is an
  error. So is a region of ``checkpoint(use_reentrant=False)`` that holds two forwards of the same layer in train mode,
  and, where the backward pass runs in another thread than the forward (as on a GPU), ``use_reentrant=True`` nested in
  itself. All this is for eager code: around a compiled model, checkpointing is not noticed.
- Threads do not see each other's forwards: evaluation may run in several. Training the same model in several threads at
  once is not supported.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sabmn_ext.nn.batch_norm import followers, rescale, warn_about
from sabmn_ext.nn.spectral_norm_group import Group, Member, groups, parametrizations
from sabmn_ext.nn.spectral_norm_layer import SpectralNorm

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_normalized(module: nn.Module, name: str = "weight") -> bool:
    """Whether the parameter is spectrally normalised already, by this package or by torch (either of its forms)."""
    if hasattr(module, f"{name}_orig") and hasattr(module, f"{name}_u"):
        return True
    return any(type(p).__name__ in ("SpectralNorm", "_SpectralNorm") for p in parametrizations(module).get(name, ()))


def _register(
    group: Group, module: nn.Module, name: str, qualified: str, iterations: int, eps: float, dim: int | None
) -> None:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(module).__name__} has no parameter '{name}'; expected the name of a weight")
    if dim is None:
        dim = 1 if isinstance(module, _TRANSPOSED) else 0
    layer = SpectralNorm(
        weight,
        iterations,
        dim,
        eps,
        # torch runs 15, and in train mode reads the weight once more while it registers the parametrization.
        initial_iterations=15 + iterations * module.training,
        name=qualified,
        autocast=parametrize.type_before_parametrizations(module) in (*CONVOLUTIONS, nn.Linear),
    )
    layer.train(module.training)
    parametrize.register_parametrization(module, name, layer, unsafe=True)
    module.register_load_state_dict_pre_hook(_accept_old_keys)
    owner = parametrizations(module)[name]
    if weight.dim() > 1 and owner[0] is layer:  # else it is normalised where the forward reads it first
        group.members.append(Member(module, name, owner, layer))


def _accept_old_keys(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Renames the keys of torch's older ``nn.utils.spectral_norm`` to the parametrization's."""
    for name in parametrizations(module):
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
        group = Group()
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
    group = Group()
    for name, module in chosen.items():
        _register(group, module, "weight", f"{name}.weight" if name else "weight", n_power_iterations, eps, None)
    if group.members:
        group.attach(model)
    if preserve_eval:
        warn_about(rescale({name: (chosen[name], bn, layer_sigma(chosen[name])) for name, bn in following.items()}))
    return model


@contextmanager
def without_updates(model: nn.Module) -> Iterator[None]:
    """While entered, forwards in train mode use u and v as they are: several of them have the same weights."""
    layers = [module for module in model.modules() if isinstance(module, SpectralNorm) and module.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def layer_sigma(module: nn.Module) -> float:
    """σ of a normalised layer's ``weight``."""
    owner = parametrizations(module)["weight"]
    sigma: float = owner[0].sigma(owner.original)
    return sigma


def remove_spectral_norm(module: nn.Module) -> nn.Module:
    """Replace every normalised weight of ``module`` and below by its value in eval mode; returns the same module."""
    for host in list(module.modules()):
        for name, owner in parametrizations(host).items():
            if any(isinstance(layer, SpectralNorm) for layer in owner):
                owner.eval()  # no power iteration while the value is read
                # Torch takes the parameter's property off the class, which deep copies of the module share.
                kind = type(host)
                host.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
                parametrize.remove_parametrizations(host, name, leave_parametrized=True)
    for root, group in groups(module):
        group.forget_removed()
        if not group.members:
            group.detach(root)
    return module
