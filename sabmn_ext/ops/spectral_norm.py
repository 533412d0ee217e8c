"""Spectral normalisation of many weights in one call: schema, dispatch and autograd.

The formulas stand in ``reference.spectral_norm``. A weight of any shape is the matrix ``weight.flatten(1)``. The
kernels are called in ``ops/cpu/``, ``ops/cuda/`` and ``ops/triton/``.
"""

import functools
import importlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cpu.buffers import Buffers
from sabmn_ext.ops.cpu.unshared import unshared

Tensors = Sequence[Tensor]

_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_library.define(
    "spectral_norm_forward(Tensor[] weights, Tensor[] u, Tensor[] v, int n_power_iterations, float eps, str[] names, "
    "ScalarType? dtype, str backend) -> (Tensor[], Tensor, Tensor, Tensor)"
)
_library.define(
    "spectral_norm_backward(Tensor[] gradients, Tensor[] weights, Tensor u, Tensor v, Tensor sigma, str backend) "
    "-> Tensor[]"
)
# The u that an op makes are one tensor, those of all weights one after the other, and so are the v.
for _operation in ("spectral_norm_forward", "spectral_norm_backward"):
    dispatch.register(
        _operation,
        cuda=dispatch.native_cuda(*dispatch.DTYPE_CODES),
        triton=dispatch.triton(*dispatch.DTYPE_CODES),
        cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES),
    )

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
    kind, device = weights[0].dtype, weights[0].device
    for weight, left, right, name in zip(weights, u, v, names, strict=True):
        if weight.dim() < 2 or not weight.is_floating_point():
            raise ValueError(
                f"{name} is {list(weight.shape)} {weight.dtype}; expected a floating tensor of two dimensions or more"
            )
        alike = weight.dtype == left.dtype == right.dtype == kind
        if not (alike and weight.device == left.device == right.device == device):
            raise ValueError(
                f"{name}, its u and v are {weight.dtype}, {left.dtype}, {right.dtype} on {weight.device}, "
                f"{left.device}, {right.device}; expected {kind} on {device}, as {names[0]}"
            )
        rows, columns = _sizes(weight)
        if left.shape != (rows,) or right.shape != (columns,):
            raise ValueError(
                f"{name} is {list(weight.shape)}, so u has [{rows}] and v [{columns}] elements; "
                f"given {list(left.shape)} and {list(right.shape)}"
            )
    if dtype not in (None, kind) and not (kind == torch.float32 and dtype in _HALF):
        raise ValueError(f"dtype is {dtype} for weights of {kind}; expected the same, or 16 bits for float32")
    normalized: list[Tensor] = []
    vectors = []  # u, v and σ of each group
    for begin, end in _groups(weights, group_bytes):
        tensors = (weights[begin:end], u[begin:end], v[begin:end])
        options = (n_power_iterations, eps, names[begin:end], dtype, backend or "")
        if torch.compiler.is_compiling() and not (torch.is_grad_enabled() and any(w.requires_grad for w in tensors[0])):
            # Where no gradient is needed, the compiler inlines the Function, and fails on its varying arity.
            outputs, *made = torch.ops.sabmn_ext.spectral_norm_forward(*tensors, *options)
        else:
            *outputs, left, right, sigma = _SpectralNorm.apply(end - begin, *options, *chain(*tensors))
            made = [left, right, sigma]
        normalized += outputs
        vectors.append(made)
    u_new, v_new, sigma = map(torch.cat, zip(*vectors, strict=True)) if len(vectors) > 1 else vectors[0]
    return normalized, _split(u_new, _lengths(u)), _split(v_new, _lengths(v)), sigma


def _sizes(weight: Tensor) -> tuple[int, int]:
    """Rows and columns of a weight's matrix."""
    rows = weight.shape[0]
    return rows, weight.numel() // max(rows, 1)


def _lengths(vectors: Tensors) -> list[int]:
    return [vector.numel() for vector in vectors]


def _split(vectors: Tensor, lengths: list[int]) -> list[Tensor]:
    """The vector of each weight, as views of the tensor that holds them one after the other."""
    return list(vectors.split(lengths))


def _split_both(u: Tensor, v: Tensor, weights: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """The u and the v of each weight."""
    rows, columns = zip(*map(_sizes, weights), strict=True)
    return _split(u, list(rows)), _split(v, list(columns))


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
        return (*normalized, u_new, v_new, sigma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count, ctx.backend = inputs[0], inputs[5]
        ctx.set_materialize_grads(False)  # a layer that a step did not use has no gradient
        ctx.mark_non_differentiable(*output[ctx.count :])
        ctx.save_for_backward(*inputs[6 : 6 + ctx.count], *output[ctx.count :])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        n = ctx.count
        *weights, u, v, sigma = ctx.saved_tensors
        may_change = unshared(gradients)
        used = [i for i in range(n) if gradients[i] is not None and ctx.needs_input_grad[6 + i]]
        results: list[Tensor | None] = [None] * n
        if used:
            if len(used) < n:
                u, v = (torch.cat([vectors[i] for i in used]) for vectors in _split_both(u, v, weights))
                sigma = torch.stack([sigma[i] for i in used])
            used_weights = [weights[i] for i in used]
            used_gradients: list[Any] = [gradients[i] for i in used]
            if torch.compiler.is_compiling():
                # The compiler cannot call a Function of varying arity in here; compiled graphs refuse second
                # derivatives by themselves, so nothing is lost.
                weight_gradients = torch.ops.sabmn_ext.spectral_norm_backward(
                    used_gradients, used_weights, u, v, sigma, ctx.backend
                )
            elif any(may_change):  # and then nothing differentiates this pass
                weight_gradients = _backward(
                    used_gradients, used_weights, u, v, sigma, ctx.backend, [may_change[i] for i in used]
                )
            else:
                weight_gradients = _SpectralNormBackward.apply(
                    len(used), ctx.backend, *used_gradients, *used_weights, u, v, sigma
                )
            for i, gradient in zip(used, weight_gradients, strict=True):
                results[i] = gradient
        return (None, None, None, None, None, None, *results, *[None] * (2 * n))


class _SpectralNormBackward(torch.autograd.Function):
    """The backward op as a differentiable function of the gradients and the weights, for second derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        gradients, weights, vectors = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        return tuple(torch.ops.sabmn_ext.spectral_norm_backward(gradients, weights, *vectors, backend))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.count = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n = ctx.count
        *matrices, all_u, all_v = ctx.saved_tensors
        gradients, weights = matrices[:n], matrices[n:]
        u, v = _split_both(all_u, all_v, weights)
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
        return (None, None, *results, None, None, None)


# ---- the ops themselves (private: a direct call has no gradient) ----


@functools.lru_cache
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
    if all(t.device.type == "cpu" for t in tensors):
        return _buffers.empty_like(tensors, dtype)
    return [torch.empty_like(t, dtype=dtype) for t in tensors]


def _like(results: Tensors, weights: Tensors) -> list[Tensor]:
    """``results`` in the memory format of ``weights``."""
    return [
        result if _same_layout(result, weight) else torch.empty_like(weight, dtype=result.dtype).copy_(result)
        for result, weight in zip(results, weights, strict=True)
    ]


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lie in memory alike. The stride of a dimension of size 1 says nothing."""
    if a.stride() == b.stride():
        return True
    return all(i == j or n == 1 for i, j, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def _forward(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    n_power_iterations: int,
    eps: float,
    names: Sequence[str],
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    first = weights[0]
    taken = dispatch.choose("spectral_norm_forward", backend, first.device, first.dtype)
    if taken == "torch":
        results = [
            reference.spectral_norm(w, left, right, n_power_iterations, eps, dtype)
            for w, left, right in zip(weights, u, v, strict=True)
        ]
        normalized = [result[0] for result in results]
        u_new, v_new = (torch.cat([result[k] for result in results]) for k in (1, 2))
        sigma = torch.stack([result[3] for result in results])
    else:
        dense, inner = (list(column) for column in zip(*map(_dense, weights), strict=True))
        normalized = _empty_like(dense, dtype or first.dtype)
        u, v = [t.contiguous() for t in u], [t.contiguous() for t in v]
        rows, columns = _lengths(u), _lengths(v)
        u_new, v_new = first.new_empty(sum(rows)), first.new_empty(sum(columns))
        sigma = first.new_empty(len(weights), dtype=reference.wide(first.dtype))
        new = (_split(u_new, rows), _split(v_new, columns))
        _kernels(taken).forward(dense, u, v, normalized, *new, inner, sigma, n_power_iterations, eps)
    if sigma.device.type == "cpu":
        check_sigma(names, sigma)
    return _like(normalized, weights), u_new, v_new, sigma


def check_sigma(names: Sequence[str], sigma: Tensor) -> None:
    """Raise a RuntimeError that names the weights whose σ cannot be divided by: zero, or not finite."""
    tiny = torch.finfo(sigma.dtype).tiny
    for name, value in zip(names, sigma.tolist(), strict=True):
        if not tiny <= abs(value) < float("inf"):
            raise RuntimeError(
                f"the largest singular value of {name} is {value}: the weight is zero, overflows or is not finite, "
                "so it cannot be divided by it. Initialise the layer, or exclude it from spectral normalisation"
            )


def _backward(
    gradients: Tensors,
    weights: Tensors,
    u: Tensor,
    v: Tensor,
    sigma: Tensor,
    backend: str,
    may_change: Sequence[bool] | None = None,
) -> list[Tensor]:
    """``may_change``: gradients that may be written over with the result."""
    taken = dispatch.choose("spectral_norm_backward", backend, sigma.device, weights[0].dtype)
    vectors = _split_both(u, v, weights)
    if taken == "torch":
        results = [
            reference.spectral_norm_backward(*inputs) for inputs in zip(gradients, weights, *vectors, strict=True)
        ]
        return _like(results, weights)
    dense, inner = (list(column) for column in zip(*map(_dense, weights), strict=True))
    gradients = _like(gradients, dense)
    if taken == "cpu" and may_change is not None and gradients[0].dtype == weights[0].dtype:
        fresh = iter(_empty_like([w for w, mine in zip(dense, may_change, strict=True) if not mine], weights[0].dtype))
        results = [g if mine else next(fresh) for g, mine in zip(gradients, may_change, strict=True)]
    else:
        results = _empty_like(dense, weights[0].dtype)
    _kernels(taken).backward(gradients, dense, *vectors, inner, sigma.contiguous(), results)
    return _like(results, weights)


def _forward_fake(
    weights: Tensors,
    u: Tensors,
    v: Tensors,
    n_power_iterations: int,
    eps: float,
    names: Sequence[str],
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    normalized = [torch.empty_like(w, dtype=dtype) for w in weights]
    u_new, v_new = (weights[0].new_empty(sum(t.numel() for t in vectors)) for vectors in (u, v))
    sigma = weights[0].new_empty(len(weights), dtype=reference.wide(weights[0].dtype))
    return normalized, u_new, v_new, sigma


def _backward_fake(
    gradients: Tensors, weights: Tensors, u: Tensor, v: Tensor, sigma: Tensor, backend: str
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
