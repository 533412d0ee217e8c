"""Spectral normalisation of many weights in one call: schema, dispatch and autograd.

The formulas stand in ``reference.spectral_norm``. A weight of any shape is the matrix ``weight.flatten(1)``. The
kernels are called in ``ops/cpu/``, ``ops/cuda/`` and ``ops/triton/``.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cpu.buffers import Buffers

Tensors = Sequence[Tensor]

_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_library.define(
    "spectral_norm_forward(Tensor[] weights, Tensor[] u, Tensor[] v, int n_power_iterations, float eps, str[] names, "
    "ScalarType? dtype, str backend) -> (Tensor[], Tensor[], Tensor[], Tensor)"
)
_library.define(
    "spectral_norm_backward(Tensor[] gradients, Tensor[] weights, Tensor[] u, Tensor[] v, Tensor sigma, str backend) "
    "-> Tensor[]"
)
for _operation in ("spectral_norm_forward", "spectral_norm_backward"):
    dispatch.register(_operation, cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES))

# The memory of normalised weights and of gradients on the CPU.
_buffers = Buffers()


def spectral_norm(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    names: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    group_bytes: int | None = None,
    backend: str | None = None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Divide every weight by its largest singular value, as estimated by power iteration.

    Args:
        weights: tensors of one floating dtype on one device, each of two dimensions or more; W = ``weight.flatten(1)``.
        u: [rows] each, left singular vectors so far, of unit length.
        v: [columns] each, right singular vectors so far.
        n_power_iterations: updates of u and v before σ is taken; 0 in eval mode.
        eps: the smallest length that a vector is divided by.
        names: what errors call the weights.
        dtype: of the normalised weights; None is the weights' own. float32 weights can be asked for in a 16-bit dtype.
        group_bytes: cut the weights, in their order, into groups of at most so many bytes. Each is a call and a node of
            the graph of its own, so that its gradients do not wait for those of the others. None: one group.

    Returns:
        the normalised weights (shapes of ``weights``), the new u and v (fresh tensors), and σ [len(weights)], float64
        for float64 weights and float32 otherwise. Only the normalised weights carry a gradient; u and v are its
        constants.

    Raises:
        ValueError: lists of different lengths, dtypes or devices; shapes that do not belong together; a ``dtype`` that
            is not served.
        RuntimeError: a weight whose σ is zero or not finite, by name (on the CPU: elsewhere the host would have to wait
            for the device); a backend that cannot serve.
    """
    if not weights:
        raise ValueError("weights is empty; expected at least one tensor")
    if not len(weights) == len(u) == len(v):
        raise ValueError(
            f"weights, u and v have {len(weights)}, {len(u)} and {len(v)} tensors; expected the same number"
        )
    names = list(names) or [f"weights[{i}]" for i in range(len(weights))]
    first = weights[0]
    for weight, left, right, name in zip(weights, u, v, names, strict=True):
        if weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(
                f"{name} is {list(weight.shape)} {weight.dtype}; expected a floating tensor of two dimensions or more"
            )
        if any(t.dtype != first.dtype or t.device != first.device for t in (weight, left, right)):
            raise ValueError(
                f"{name}, its u and v are {weight.dtype}, {left.dtype}, {right.dtype} on {weight.device}, "
                f"{left.device}, {right.device}; expected {first.dtype} on {first.device}, as {names[0]}"
            )
        rows = weight.shape[0]
        if left.shape != (rows,) or right.shape != (weight.numel() // max(rows, 1),):
            raise ValueError(
                f"{name} is {list(weight.shape)}, so u has [{rows}] and v [{weight.numel() // max(rows, 1)}] elements; "
                f"given {list(left.shape)} and {list(right.shape)}"
            )
    if dtype not in (None, first.dtype) and not (first.dtype == torch.float32 and dtype in _HALF):
        raise ValueError(f"dtype is {dtype} for weights of {first.dtype}; expected the same, or 16 bits for float32")
    parts = []
    for begin, end in _groups(weights, group_bytes):
        n = end - begin
        tensors = (weights[begin:end], u[begin:end], v[begin:end])
        options = (n_power_iterations, eps, names[begin:end], dtype, backend or "")
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(w.requires_grad for w in tensors[0])):
            # Where no gradient is needed, the compiler inlines the Function, and fails on its varying arity.
            parts.append(torch.ops.sabmn_ext.spectral_norm_forward(*tensors, *options))
            continue
        outputs = _SpectralNorm.apply(n, *options, *(t for column in tensors for t in column))
        parts.append((outputs[:n], outputs[n : 2 * n], outputs[2 * n : 3 * n], outputs[-1]))
    normalized, u_new, v_new = ([t for part in parts for t in part[k]] for k in range(3))
    return normalized, u_new, v_new, parts[0][3] if len(parts) == 1 else torch.cat([part[3] for part in parts])


_HALF = (torch.bfloat16, torch.float16)


def _groups(weights: Tensors, group_bytes: int | None) -> list[tuple[int, int]]:
    """Runs of weights, as (begin, end), of at most ``group_bytes`` each where one weight alone is not more."""
    begins, size = [0], 0
    for i, weight in enumerate(weights):
        nbytes = weight.numel() * weight.element_size()
        if group_bytes is not None and i > begins[-1] and size + nbytes > group_bytes:
            begins.append(i)
            size = 0
        size += nbytes
    return list(zip(begins, [*begins[1:], len(weights)], strict=True))


class _SpectralNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        count: int,
        n_power_iterations: int,
        eps: float,
        names: list[str],
        dtype: torch.dtype | None,
        backend: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, u, v = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        normalized, u_new, v_new, sigma = torch.ops.sabmn_ext.spectral_norm_forward(
            weights, u, v, n_power_iterations, eps, names, dtype, backend
        )
        return (*normalized, *u_new, *v_new, sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count, ctx.backend = inputs[0], inputs[5]
        ctx.set_materialize_grads(False)  # a layer that a step did not use has no gradient
        ctx.mark_non_differentiable(*output[ctx.count :])
        ctx.save_for_backward(*inputs[6 : 6 + ctx.count], *output[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        n = ctx.count
        *saved, sigma = ctx.saved_tensors
        used = [i for i in range(n) if gradients[i] is not None and ctx.needs_input_grad[6 + i]]
        results: list[Tensor | None] = [None] * n
        if used:
            if len(used) < n:
                sigma = torch.stack([sigma[i] for i in used])
            weights, u, v = ([saved[k * n + i] for i in used] for k in range(3))
            used_gradients = [gradients[i] for i in used]
            if torch.compiler.is_compiling():
                # The compiler cannot call a Function of varying arity in here; compiled graphs refuse second
                # derivatives by themselves, so nothing is lost.
                weight_gradients = torch.ops.sabmn_ext.spectral_norm_backward(
                    used_gradients, weights, u, v, sigma, ctx.backend
                )
            else:
                weight_gradients = _SpectralNormBackward.apply(
                    len(used), ctx.backend, *used_gradients, *weights, *u, *v, sigma
                )
            for i, gradient in zip(used, weight_gradients, strict=True):
                results[i] = gradient
        return (None, None, None, None, None, None, *results, *[None] * (2 * n))


class _SpectralNormBackward(torch.autograd.Function):
    """The backward op as a differentiable function of the gradients and the weights, for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        gradients, weights, u, v = (tensors[k * count : (k + 1) * count] for k in range(4))
        return tuple(
            torch.ops.sabmn_ext.spectral_norm_backward(gradients, weights, u, v, tensors[-1], backend)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n = ctx.count
        saved = ctx.saved_tensors
        gradients, weights, u, v = (saved[k * n : (k + 1) * n] for k in range(4))
        results: list[Tensor | None] = [None] * (2 * n)
        for i, cotangent in enumerate(cotangents):
            if cotangent is not None:
                left, right = u[i], v[i]
                pull_back = torch.func.vjp(
                    lambda g, w, left=left, right=right: reference.spectral_norm_backward(g, w, left, right),
                    gradients[i],
                    weights[i],
                )[1]
                results[i], results[n + i] = pull_back(cotangent)
        return (None, None, *results, *[None] * (2 * n), None)


# ---- the ops themselves (private: a direct call has no gradient) ----


def _kernels(backend: str) -> Any:
    """The module whose ``forward`` and ``backward`` fill lists of dense tensors."""
    return importlib.import_module(f"sabmn_ext.ops.{backend}.spectral_norm")


def _dense(weight: Tensor) -> tuple[Tensor, int]:
    """A dense matrix in memory, copied only where ``weight`` is none, and the order of its columns.

    Column m in memory is column (m % inner)·(columns / inner) + m / inner of ``weight.flatten(1)``: convolutions in
    channels_last have their input channels innermost.
    """
    columns = weight[0].numel()
    if not weight.is_contiguous():
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        if weight.dim() in formats and weight.is_contiguous(memory_format=formats[weight.dim()]):
            return weight, weight.shape[1]
    return weight.contiguous(), columns


def _empty_like(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    if tensors[0].device.type == "cpu":
        return _buffers.empty_like(tensors, dtype)
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def _like(tensor: Tensor, model: Tensor) -> Tensor:
    """``tensor`` in the memory format of ``model``."""
    expected = torch.empty_like(model, dtype=tensor.dtype)
    return tensor if expected.stride() == tensor.stride() else expected.copy_(tensor)


def _forward(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    n_power_iterations: int,
    eps: float,
    names: Sequence[str],
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    first = weights[0]
    taken = dispatch.choose("spectral_norm_forward", backend, first.device, first.dtype)
    if taken == "torch":
        results = [
            reference.spectral_norm(w, left, right, n_power_iterations, eps, dtype)
            for w, left, right in zip(weights, u, v, strict=True)
        ]
        normalized, u_new, v_new = ([result[k] for result in results] for k in range(3))
        sigma = torch.stack([result[3] for result in results])
    else:
        dense, inner = (list(column) for column in zip(*map(_dense, weights), strict=True))
        normalized = _empty_like(dense, dtype or first.dtype)
        u, v = [t.contiguous() for t in u], [t.contiguous() for t in v]
        u_new, v_new = [torch.empty_like(t) for t in u], [torch.empty_like(t) for t in v]
        sigma = first.new_empty(len(weights), dtype=reference.wide(first.dtype))
        _kernels(taken).forward(dense, u, v, normalized, u_new, v_new, inner, sigma, n_power_iterations, eps)
    if sigma.device.type == "cpu":
        check_sigma(names, sigma)
    return [_like(n, w) for n, w in zip(normalized, weights, strict=True)], u_new, v_new, sigma


def check_sigma(names: Sequence[str], sigma: Tensor) -> None:
    """Raise a RuntimeError that names the weights whose σ cannot be divided by: zero, or not finite."""
    if not bool((sigma.abs() >= torch.finfo(sigma.dtype).tiny).logical_and(sigma.isfinite()).all()):
        for name, value in zip(names, sigma.tolist(), strict=True):
            if not torch.finfo(sigma.dtype).tiny <= abs(value) < float("inf"):
                raise RuntimeError(
                    f"the largest singular value of {name} is {value}: the weight is zero, overflows or is not finite, "
                    "so it cannot be divided by it. Initialise the layer, or exclude it from spectral normalisation"
                )


def _backward(
    gradients: Tensors, weights: Tensors, u: Tensors, v: Tensors, sigma: Tensor, backend: str
) -> list[Tensor]:
    taken = dispatch.choose("spectral_norm_backward", backend, sigma.device, weights[0].dtype)
    if taken == "torch":
        results = [
            reference.spectral_norm_backward(*inputs) for inputs in zip(gradients, weights, u, v, strict=True)
        ]
    else:
        dense, inner = (list(column) for column in zip(*map(_dense, weights), strict=True))
        # A gradient has to lie in memory as its weight does.
        ordered = [
            g if g.stride() == w.stride() else torch.empty_like(w, dtype=g.dtype).copy_(g)
            for g, w in zip(gradients, dense, strict=True)
        ]
        results = _empty_like(dense, weights[0].dtype)
        u, v = [t.contiguous() for t in u], [t.contiguous() for t in v]
        _kernels(taken).backward(ordered, dense, u, v, inner, sigma.contiguous(), results)
    return [_like(result, w) for result, w in zip(results, weights, strict=True)]


def _forward_fake(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    n_power_iterations: int,
    eps: float,
    names: Sequence[str],
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
    normalized = [torch.empty_like(w, dtype=dtype) for w in weights]
    u_new, v_new = ([torch.empty_like(t) for t in tensors] for tensors in (u, v))
    sigma = weights[0].new_empty(len(weights), dtype=reference.wide(weights[0].dtype))
    return normalized, u_new, v_new, sigma


def _backward_fake(
    gradients: Tensors, weights: Tensors, u: Tensors, v: Tensors, sigma: Tensor, backend: str
) -> list[Tensor]:
    return [torch.empty_like(w) for w in weights]


def _vmap_by_loop(op: Any) -> Any:
    """The batching rule of an op that takes and returns lists of tensors: one call for each element of the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        def take(argument: Any, dims: Any, b: int) -> Any:
            if isinstance(argument, (list, tuple)) and isinstance(dims, (list, tuple)):
                return [take(a, d, b) for a, d in zip(argument, dims, strict=True)]
            return argument if dims is None else argument.select(dims, b)

        results = [
            op(*(take(a, d, b) for a, d in zip(args, in_dims, strict=True))) for b in range(info.batch_size)
        ]
        leaves, spec = zip(*(torch.utils._pytree.tree_flatten(result) for result in results), strict=True)
        stacked = [torch.stack(list(parts)) for parts in zip(*leaves, strict=True)]
        return (
            torch.utils._pytree.tree_unflatten(stacked, spec[0]),
            torch.utils._pytree.tree_unflatten([0] * len(stacked), spec[0]),
        )

    return rule


_library.impl("spectral_norm_forward", _forward, "CompositeExplicitAutograd")
_library.impl("spectral_norm_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("sabmn_ext::spectral_norm_forward", _forward_fake, lib=_library)
torch.library.register_fake("sabmn_ext::spectral_norm_backward", _backward_fake, lib=_library)
for _operation in ("spectral_norm_forward", "spectral_norm_backward"):
    torch.library.register_vmap(
        f"sabmn_ext::{_operation}", _vmap_by_loop(getattr(torch.ops.sabmn_ext, _operation)), lib=_library
    )
