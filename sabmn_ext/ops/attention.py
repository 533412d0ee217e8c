"""Self-attention over a feature map, y = γ·a + x, as one operation: schema, checks, dispatch, autograd.

The formulas stand in ``reference.self_attention2d`` (Zhang et al., SAGAN, 2019; Munir and Micheloni, SpliTech 2020);
the kernels are called in ``ops/cpu/``, ``ops/cuda/`` and ``ops/triton/``::

    self_attention2d → _Attention → sabmn_ext::attention_forward                (no gradient of its own)
            backward → _AttentionGradient → sabmn_ext::attention_backward       (no gradient of its own)
            backward → torch.func.vjp of vjp(reference.self_attention2d)        (the only step that holds an N×N map)
"""

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.cpu.plain import why_not_plain

_INPUTS = (
    "Tensor x, Tensor w_query, Tensor w_key, Tensor w_value, Tensor? w_out, Tensor gamma, "
    "Tensor? b_query, Tensor? b_key, Tensor? b_value, Tensor? b_out"
)
_N_INPUTS = 10
_BIASES = ("b_query", "b_key", "b_value", "b_out")
_SAVED = "Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse"
_library = torch.library.Library("sabmn_ext", "FRAGMENT")
_library.define(f"attention_forward({_INPUTS}, str? backend) -> (Tensor y, {_SAVED})")
# One gradient for each input; an empty tensor where `needs` says that it is not wanted.
_library.define(
    f"attention_backward(Tensor grad_y, {_INPUTS}, {_SAVED}, bool[] needs, str? backend) "
    f"-> ({', '.join(['Tensor'] * _N_INPUTS)})"
)


def self_attention2d(
    x: Tensor,
    w_query: Tensor,
    w_key: Tensor,
    w_value: Tensor,
    w_out: Tensor | None,
    gamma: Tensor,
    *,
    b_query: Tensor | None = None, b_key: Tensor | None = None, b_value: Tensor | None = None,
    b_out: Tensor | None = None, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Self-attention over the positions of a feature map, with its projections, scale and residual: ``y = γ·a + x``.

    ``query``, ``key`` and ``value`` are 1×1 convolutions of x; ``out_j = Σ_i softmax_i(key_i · query_j) value_i`` over
    the N = H·W positions, unscaled; ``a = w_out out + b_out``.

    Args:
        x: ``[B, C, H, W]``, any strides; float32, float64, bfloat16 or float16. C++ kernels serve the CPU (the 16-bit
            types computed in float32; bfloat16 multiplied as it is where that pays, see README), CUDA or Triton kernels
            NVIDIA GPUs but for float64, plain torch all else. On a GPU float32 is multiplied as TF32 if torch's own
            products are (``torch.backends.cuda.matmul.fp32_precision``), else exactly. The N×N map is stored nowhere,
            except by second derivatives: O(B·N²).
        w_query, w_key: ``[d, C]`` or ``[d, C, 1, 1]``, with x's dtype and device, as all weights and biases.
        w_value: ``[value width, C]``.
        w_out: ``[C, value width]``; None leaves the output projection out, and the value width is then C.
        gamma: one number, of shape ``[]`` or ``[1]``, in any float dtype.
        b_query, b_key: ``[d]``; b_value: ``[value width]``; b_out: ``[C]``, only with ``w_out``.
        backend: ``cuda``, ``triton``, ``cpu``, ``torch``, or None / ``auto`` for the first of them that can.

    Returns:
        ``[B, C, H, W]`` in x's memory format and dtype. Under autocast x, weights and biases are cast to autocast's
        dtype and y has that dtype (float64 is left alone, as torch does).

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit; names the argument.
        RuntimeError: the backend that was asked for cannot serve the call; says why.

    >>> x, w = torch.randn(2, 64, 16, 8), torch.randn(8, 64)
    >>> self_attention2d(x, w, w, w, torch.randn(64, 8), torch.tensor(0.5)).shape
    torch.Size([2, 64, 16, 8])
    """
    x, weights, biases = _cast(x, [w_query, w_key, w_value, w_out], [b_query, b_key, b_value, b_out])
    _check(x, weights, gamma, biases)
    if _is_alone(x, *weights, gamma, *biases):
        return _forward_alone(x, weights, gamma, biases, backend)
    return _function(_Attention)(x, *_parameters(x, weights, gamma, biases), backend)[0]  # type: ignore[no-any-return]


def attention_map(
    x: Tensor, w_query: Tensor, w_key: Tensor, *, b_query: Tensor | None = None, b_key: Tensor | None = None
) -> Tensor:
    """The map ``[B, N, N]`` itself, rows j summing to 1 over i, in plain torch and at least float32."""
    x, weights, biases = _cast(x, [w_query, w_key], [b_query, b_key])
    _check(x, [*weights, None, None], None, [*biases, None, None])
    with _no_autocast(x):
        return reference.attention_map(x, *weights, b_query=biases[0], b_key=biases[1])  # type: ignore[arg-type]


# ---- checks and autocast ----


def _cast(x: Tensor, *groups: list[Tensor | None]) -> tuple[Any, ...]:
    if torch.is_autocast_enabled(x.device.type) and x.is_floating_point() and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), *([None if t is None else t.to(dtype) for t in group] for group in groups)
    return x, *groups


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:  # what is inside runs in the dtypes it is given
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _check(x: Tensor, weights: Sequence[Tensor | None], gamma: Tensor | None, biases: Sequence[Tensor | None]) -> None:
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x has shape {list(x.shape)}; expected a feature map [B, C, H, W] of at least one channel")
    if x.dtype not in dispatch.DTYPE_CODES:
        raise TypeError(f"x has dtype {x.dtype}; expected float32, float64, bfloat16 or float16")
    w_query, _, w_value, w_out = weights
    channels, width = x.shape[1], 0 if w_query is None or w_query.dim() == 0 else w_query.shape[0]
    value_width = channels if w_value is None or w_out is None or w_value.dim() == 0 else w_value.shape[0]
    why_value = "no w_out, so the values are as wide as x" if w_out is None else "any value width, x's channels"
    for name, tensor, shape, why in (
        ("w_query", weights[0], (width, channels), "any width d ≥ 1, x's channels"),
        ("w_key", weights[1], (width, channels), "w_query's rows, x's channels"),
        ("w_value", weights[2], (value_width, channels), why_value),
        ("w_out", weights[3], (channels, value_width), "x's channels, w_value's rows"),
        ("b_query", biases[0], (width,), "w_query's rows"),
        ("b_key", biases[1], (width,), "w_query's rows"),
        ("b_value", biases[2], (value_width,), "w_value's rows"),
        ("b_out", biases[3], (channels,), "x's channels"),
    ):
        if tensor is None:
            continue
        given = tensor.shape[:2] if tensor.dim() == 4 and tensor.shape[2] == tensor.shape[3] == 1 else tensor.shape
        if given != shape or given[0] == 0:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {list(shape)} ({why})")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {x.dtype}, as x (or use torch.autocast)")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; expected {x.device}, where x is")
    if biases[3] is not None and w_out is None:
        raise ValueError("b_out is given, but w_out is None; without an output projection there is no output bias")
    one_number = gamma is None or (gamma.numel() == 1 >= gamma.dim() and gamma.is_floating_point())
    if gamma is not None and not (one_number and gamma.device == x.device):
        found = f"{list(gamma.shape)} {gamma.dtype} on {gamma.device}"
        raise ValueError(f"gamma is {found}; expected one float number, of shape [] or [1], on {x.device}")


def _parameters(
    x: Tensor, weights: Sequence[Tensor | None], gamma: Tensor, biases: Sequence[Tensor | None]
) -> list[Tensor | None]:
    flat = [None if w is None else w.flatten(1) for w in weights]
    return [*flat, gamma.reshape(()).to(reference.wide(x.dtype)), *biases]


# ---- the operations ----


Layout = tuple[Sequence[int], Sequence[int], torch.dtype]  # shape, stride, dtype
Empty = Callable[[Sequence[Layout]], list[Tensor]]  # makes uninitialised tensors


def _empty_on(device: torch.device) -> Empty:
    return lambda layouts: [torch.empty_strided(*layout[:2], dtype=layout[2], device=device) for layout in layouts]


def _image_layout(x: Tensor) -> Layout:
    """x's shape and memory format: channels_last where x's channels lie side by side."""
    _, channels, height, width = x.shape
    if channels > 1 and x.stride(1) == 1 and x.stride(3) >= channels:
        return x.shape, (channels * height * width, 1, channels * width, channels), x.dtype
    return _dense(x.shape, x.dtype)


def _dense(shape: Sequence[int], dtype: torch.dtype) -> Layout:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return shape, strides[: len(shape)][::-1], dtype


def _forward_layouts(x: Tensor, w_query: Tensor, w_value: Tensor) -> list[Layout]:
    """Of y, query, key, value, out, lse."""
    batch, positions = x.shape[0], x.shape[2] * x.shape[3]
    widths = (w_query.shape[0], w_query.shape[0], w_value.shape[0])
    projections = [_dense((batch, width, positions), x.dtype) for width in widths]
    out = _dense((reference.out_parts(x.dtype), batch, w_value.shape[0], positions), x.dtype)
    lse = _dense((batch, 2, positions), reference.wide(x.dtype))
    return [_image_layout(x), *projections, out, lse]


def _gradient_layouts(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Layout]:
    """Of one gradient for each input; of an empty tensor for one that is not wanted."""
    x: Any = inputs[0]
    layouts = [
        _dense(t.shape, t.dtype) if t is not None and need else _dense((0,), x.dtype)
        for t, need in zip(inputs, needs, strict=True)
    ]
    return [_image_layout(x), *layouts[1:]] if needs[0] else layouts


@functools.lru_cache
def _kernels(backend: str) -> Any:
    """The module that calls the kernels of a backend: forward(…) and backward(…), which fill the outputs.

    Where it has an empty_strided(…), the outputs are taken from there.
    """
    return importlib.import_module(f"sabmn_ext.ops.{backend}.attention")


def _forward(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *parameters, backend = arguments
    return _forward_by(dispatch.choose("attention_forward", backend, x.device, x.dtype), x, parameters)


def _forward_by(taken: str, x: Tensor, parameters: Sequence[Any]) -> tuple[Tensor, ...]:
    if taken != "torch":
        parameters = [None if t is None else t.contiguous() for t in parameters]
        kernels = _kernels(taken)
        empty = getattr(kernels, "empty_strided", None) or _empty_on(x.device)
        y, *saved = empty(_forward_layouts(x, parameters[0], parameters[2]))
        kernels.forward(x, parameters, y, saved)
        return y, *saved
    with torch.no_grad(), _no_autocast(x):
        biases = dict(zip(_BIASES, parameters[5:], strict=True))
        y, *saved = reference.self_attention2d_forward(x, *parameters[:5], **biases)
        return _copy_image(y, x), *(t.contiguous() for t in saved)


def _backward(grad_y: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    inputs, saved, (needs, backend) = arguments[:_N_INPUTS], arguments[_N_INPUTS:-2], arguments[-2:]
    x, *parameters = inputs
    taken = dispatch.choose("attention_backward", backend, x.device, x.dtype)
    if taken != "torch":
        parameters = [None if t is None else t.contiguous() for t in parameters]
        kernels = _kernels(taken)
        empty = getattr(kernels, "empty_strided", None) or _empty_on(x.device)
        grads = empty(_gradient_layouts([x, *parameters], needs))
        kernels.backward(grad_y, x, parameters, saved, needs, grads)
        return tuple(grads)
    with torch.no_grad(), _no_autocast(x):
        wanted = reference.self_attention2d_backward(grad_y, *inputs[:6], *saved, b_out=inputs[9], needs=needs)
        grads = [x.new_empty(0) if grad is None else grad.contiguous() for grad in wanted]
        return (_copy_image(grads[0], x) if needs[0] else grads[0], *grads[1:])


def _copy_image(image: Tensor, x: Tensor) -> Tensor:
    return _empty_on(x.device)([_image_layout(x)])[0].copy_(image)


def _one_by_one(operation: Any, info: Any, in_dims: Sequence[int | None], *arguments: Any) -> tuple[Any, Any]:
    """vmap's rule: a loop, since the weights or the gradients' sums may differ from one to the next."""
    calls = [
        operation(*(a.select(d, i) if isinstance(d, int) else a for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*calls, strict=True))
    return outputs, (0,) * len(outputs)


for _operation, _implementation, _fake in (
    ("attention_forward", _forward, lambda x, *rest: tuple(_empty_on(x.device)(_forward_layouts(x, rest[0], rest[2])))),
    ("attention_backward", _backward, lambda _, x, *rest: tuple(
        _empty_on(x.device)(_gradient_layouts((x, *rest[: _N_INPUTS - 1]), rest[-2]))
    )),
):
    dispatch.register(
        _operation,
        cuda=dispatch.native_cuda(torch.float32, torch.bfloat16, torch.float16),
        triton=dispatch.triton(torch.float32, torch.bfloat16, torch.float16),
        cpu=dispatch.native_cpu(*dispatch.DTYPE_CODES),
    )
    dispatch.prefer(_operation, dispatch.triton_on_hopper(torch.bfloat16, torch.float16))
    _library.impl(_operation, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sabmn_ext::{_operation}", _fake, lib=_library)
    _vmap = functools.partial(_one_by_one, getattr(torch.ops.sabmn_ext, _operation))
    torch.library.register_vmap(f"sabmn_ext::{_operation}", _vmap, lib=_library)


# ---- without autograd ----
#
# On a CPU the way through torch's dispatcher, and the outputs that only a backward pass reads, take 0.1 ms where the
# caches are cold, which in a network they are: 4 % of a small block's time.


def _is_alone(x: Tensor, *others: Tensor | None) -> bool:
    """Whether only y is wanted: no gradient, and no compiler, transformation or mode looks into the call."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.device.type != "cpu":
        return False
    return why_not_plain(x, *others) is None


def _forward_alone(
    x: Tensor, weights: Sequence[Any], gamma: Tensor, biases: Sequence[Tensor | None], backend: str | None
) -> Tensor:
    taken = dispatch.choose("attention_forward", backend, x.device, x.dtype)
    if taken != "cpu":
        return _forward_by(taken, x, _parameters(x, weights, gamma, biases))[0]
    parameters = [*weights, gamma.to(reference.wide(x.dtype)), *biases]
    layouts = _forward_layouts(x, weights[0], weights[2])
    return _kernels(taken).forward_alone(x, [None if t is None else t.contiguous() for t in parameters], layouts)  # type: ignore[no-any-return]


# ---- autograd ----
#
# The Functions' parameters are written out one by one: torch.compile counts them. `apply` asks for the signature at
# every call, which takes 20 µs unless it is at hand, and takes 60 µs in all, several times that where the caches are
# cold: no more than its forward is needed where there will be no gradient.


def _function(function: type[torch.autograd.Function]) -> Callable[..., tuple[Tensor, ...]]:
    return function.apply if torch.is_grad_enabled() else function.forward  # type: ignore[return-value]


class _Attention(torch.autograd.Function):
    """y, for the outside; then query, key, value, out, lse, which the backward needs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Any, w_query: Any, w_key: Any, w_value: Any, w_out: Any, gamma: Any,
        b_query: Any, b_key: Any, b_value: Any, b_out: Any, backend: str | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = (x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out)
        return torch.ops.sabmn_ext.attention_forward(*inputs, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if grad_y is None:
            return (None,) * (_N_INPUTS + 1)
        needs = tuple(ctx.needs_input_grad[:_N_INPUTS])
        grads = _function(_AttentionGradient)(grad_y, *ctx.saved_tensors, needs, ctx.backend)
        return (*_spread(grads, needs), None)


class _AttentionGradient(torch.autograd.Function):
    """The gradients that are needed, in the order of the inputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        grad_y: Any, x: Any, w_query: Any, w_key: Any, w_value: Any, w_out: Any, gamma: Any,
        b_query: Any, b_key: Any, b_value: Any, b_out: Any,
        query: Any, key: Any, value: Any, out: Any, lse: Any, needs: tuple[bool, ...], backend: str | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        inputs = (x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out)
        saved = (query, key, value, out, lse)
        grads = torch.ops.sabmn_ext.attention_backward(grad_y, *inputs, *saved, needs, backend)
        return tuple([grad for grad, need in zip(grads, needs, strict=True) if need])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: _N_INPUTS + 1])
        ctx.needs = inputs[-2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        arguments = ctx.saved_tensors  # grad_y and the ten inputs
        present = [t is not None for t in arguments]

        def attention(*inputs: Tensor) -> Tensor:
            full: Any = _spread(inputs, present[1:])
            return reference.self_attention2d(*full[:6], **dict(zip(_BIASES, full[6:], strict=True)))

        def gradients(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            firsts = _spread(torch.func.vjp(attention, *inputs)[1](grad_y), present[1:])
            return tuple([first for first, need in zip(firsts, ctx.needs, strict=True) if need and first is not None])

        with _no_autocast(arguments[0]):
            seconds = torch.func.vjp(gradients, *[t for t in arguments if t is not None])[1](grads)
        return (*_spread(seconds, present), *[None] * 7)  # the saved five, needs, backend


for _each in (_Attention, _AttentionGradient):
    _each.forward.__signature__ = inspect.signature(_each.forward)  # type: ignore


def _spread(tensors: Sequence[Tensor], present: Sequence[bool]) -> list[Tensor | None]:
    """The tensors at the places where ``present``, None at the others."""
    left = iter(tensors)
    return [next(left) if here else None for here in present]
