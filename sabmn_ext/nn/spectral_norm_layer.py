"""The parametrization that normalises one weight, and the normalisation of many of them in one call.

Inside the forward of a normalised root a weight is normalised once, however often it is read; this is what
``torch.nn.utils.parametrize.cached()`` does for torch's parametrization.
"""

import sys
import threading
from collections.abc import Iterable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from sabmn_ext.nn import spectral_norm_recompute as recompute
from sabmn_ext.ops import reference
from sabmn_ext.ops.spectral_norm import spectral_norm as normalize_weights

# DistributedDataParallel reduces gradients in buckets of this size.
BUCKET_BYTES = 25 * 2**20

# Autograd runs the ready node with the highest number first; AccumulateGrad has the highest there is.
_AT_ONCE = 2**63


class RootForward(threading.local):
    """The forward of the outermost normalised root that runs in this thread, with the weights normalised for it."""

    def __init__(self) -> None:
        self.depth = 0
        self.caller: FrameType | None = None
        self.normalized: dict[SpectralNorm, Tensor] = {}

    def enter(self) -> None:
        self.forget_interrupted()
        self.depth += 1
        if self.depth == 1 and not torch.compiler.is_compiling():
            self.caller = sys._getframe(2)

    def leave(self) -> None:
        if self.depth > 1:
            self.depth -= 1
        else:  # 1, or 0 where another hook raised before the forward was entered
            self.clear()

    def clear(self) -> None:
        if not torch.compiler.is_compiling():
            for layer in self.normalized:
                layer.generation.end()
        self.normalized.clear()
        self.depth, self.caller = 0, None

    def forget_interrupted(self) -> None:
        """Ends a forward that KeyboardInterrupt left: modules run no hook then."""
        if torch.compiler.is_compiling() or self.caller is None:
            return
        try:
            self.caller.clear()
        except RuntimeError:  # the frame still runs
            return
        self.clear()


running = RootForward()


class SpectralNorm(nn.Module):
    """The parametrization of one weight: holds u and v, and hands out the normalised weight.

    Args:
        weight: the weight to normalise, of any floating dtype. A vector is divided by its length.
        n_power_iterations: power iterations per training-mode forward.
        dim: the dimension of ``weight`` that is the matrix's row.
        eps: the smallest length that a vector is divided by.
        initial_iterations: power iterations now, from random vectors.
        name: what errors call the weight.
        autocast: whether the layer casts its weight under autocast, as convolutions and ``nn.Linear`` do.
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
        name: str = "the weight",
        autocast: bool = False,
    ) -> None:
        super().__init__()
        if not -weight.dim() <= dim < weight.dim():
            raise ValueError(f"dim is {dim}, expected one of the {weight.dim()} dimensions of the weight")
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations is {n_power_iterations}, expected 1 or more")
        self.n_power_iterations, self.dim, self.eps = n_power_iterations, dim % weight.dim(), eps
        self.name, self.autocast = name, autocast
        self.generation = recompute.Generation()
        if weight.dim() > 1:
            with torch.no_grad():
                matrix = self.rows_first(weight).flatten(1)
                u, v = (matrix.new_empty(n).normal_(0, 1) for n in matrix.shape)
                u, v = (nn.functional.normalize(t, dim=0, eps=eps) for t in (u, v))
                u, v = reference.power_iteration(matrix, u, v, initial_iterations, eps)
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def rows_first(self, weight: Tensor) -> Tensor:
        return weight if self.dim == 0 else weight.movedim(self.dim, 0)

    def rows_back(self, weight: Tensor) -> Tensor:
        return weight if self.dim == 0 else weight.movedim(0, self.dim)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.dim() == 1:
            return nn.functional.normalize(weight, dim=0, eps=self.eps)
        running.forget_interrupted()
        kept = running.normalized.get(self)
        if kept is None:
            kept = normalize([self], [weight])[0][0]
            if running.depth:
                running.normalized[self] = kept
            return kept
        if recompute.is_running():  # a backward pass inside the forward, perhaps through an earlier one
            self.generation.check(self.name)
        return kept if self._serves(kept, weight) else normalize([self], [weight], update=False)[0][0]

    def _serves(self, kept: Tensor, weight: Tensor) -> bool:
        """Whether the weight normalised earlier in this forward has the dtype and the gradient that are needed here."""
        if kept.dtype != weight.dtype and kept.dtype != compute_dtype(weight):
            return False  # made under autocast, which is off here
        return kept.requires_grad or not (weight.requires_grad and torch.is_grad_enabled())

    def sigma(self, weight: Tensor) -> float:
        """The estimate uᵀWv of the largest singular value, without an update."""
        with torch.no_grad():
            return torch.dot(self._u, torch.mv(self.rows_first(weight).flatten(1), self._v)).item()


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a convolution or a linear layer uses its weight here: autocast's, or its own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def normalize(
    layers: list[SpectralNorm], weights: list[Tensor], *, update: bool = True, cast: bool = False
) -> tuple[list[Tensor], list[tuple[list[str], Tensor]]]:
    """Normalise the weights of many layers, one call for all that share dtype, device, eps and iterations.

    Args:
        update: whether layers in train mode update u and v; a recomputation never does.
        cast: whether layers that cast their weight under autocast get it in that dtype.

    Returns:
        the normalised weights in order, and for each call (names, σ).

    Raises:
        RuntimeError: a weight whose σ is zero or not finite, by name; no u and v have changed then. A recomputation
            that belongs to an earlier forward.
    """
    recomputing = recompute.is_running()
    kinds: dict[Any, list[int]] = {}
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        if recomputing:
            layer.generation.check(layer.name)
        iterations = layer.n_power_iterations if layer.training and update and not recomputing else 0
        dtype = compute_dtype(weight) if cast and layer.autocast else weight.dtype
        kinds.setdefault((iterations, layer.eps, dtype, weight.dtype, weight.device), []).append(i)
    normalized: dict[int, Tensor] = {}
    sigmas, updates = [], []
    for (iterations, eps, dtype, _, device), members in kinds.items():
        chosen = [layers[i] for i in members]
        names = [layer.name for layer in chosen]
        matrices = [layer.rows_first(weights[i]) for i, layer in zip(members, chosen, strict=True)]
        u, v = [layer._u for layer in chosen], [layer._v for layer in chosen]
        with _autocast_off(device), recompute.outside_of_checkpoints():
            results, u_new, v_new, sigma = normalize_weights(
                matrices,
                u,
                v,
                n_power_iterations=iterations,
                eps=eps,
                names=names,
                dtype=dtype,
                group_bytes=BUCKET_BYTES if _is_distributed() else None,
            )
        turned = [layer.rows_back(result) for layer, result in zip(chosen, results, strict=True)]
        if _is_distributed():
            _deliver_at_once([*turned, *results, *matrices])
        normalized.update(zip(members, turned, strict=True))
        sigmas.append((names, sigma))
        if iterations:
            updates.append((chosen, u + v, u_new + v_new))
    for chosen, old, new in updates:
        # In place: DDP's broadcast and CUDA graphs hold the buffers. The backward pass keeps the fresh tensors.
        with torch.no_grad():
            torch._foreach_copy_(old, new)
        if not torch.compiler.is_compiling():
            for layer in chosen:
                layer.generation.update()
                layer.generation.end()
    return [normalized[i] for i in range(len(layers))], sigmas


def _autocast_off(device: torch.device) -> Any:
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _deliver_at_once(tensors: Iterable[Tensor]) -> None:
    """Have autograd run the nodes of ``tensors`` as soon as their gradients are there, and not in the order of making.

    They are made before all others of the forward and would run after all of them, when nothing is left that the
    all-reduce of their gradients could overlap with.
    """
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            if tensor.grad_fn is not None:
                tensor.grad_fn._set_sequence_nr(_AT_ONCE)  # type: ignore[attr-defined]
