"""Inputs of the attention operation for its tests, the block as eager modules write it, the check against float64."""

from collections.abc import Callable
from typing import Any

import torch
from float64_rule import assert_close_to_float64
from peak_memory import peak_bytes
from torch import Tensor
from torch.nn import functional

from sabmn_ext.functional import self_attention2d
from sabmn_ext.ops import dispatch

NAMES = ["x", "w_query", "w_key", "w_value", "w_out", "gamma", "b_query", "b_key", "b_value", "b_out"]
Inputs = list[Tensor | None]


def draw(sizes: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Inputs:
    """The ten inputs: logits of a few units, gamma in ±[0.5, 2]."""
    batch, channels, height, width, d, value_width, biases, projection = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    x = normal(batch, channels, height, width)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = normal(batch, channels + 3, height + 1, 2 * width + 1)
        x = wide[:, 2:-1, 1:, 1::2]
    elif layout == "sliced channels_last":
        x = normal(batch, channels + 3, height + 2, width).to(memory_format=torch.channels_last)[:, 3:, 2:]
    gamma = torch.rand((), generator=generator, dtype=torch.float64) * 1.5 + 0.5
    if torch.rand((), generator=generator) < 0.5:
        gamma = -gamma
    weights = [
        normal(d, channels, scale=1.2 * channels**-0.5),
        normal(d, channels, scale=1.2 * channels**-0.5),
        normal(value_width, channels, scale=channels**-0.5),
        normal(channels, value_width, scale=value_width**-0.5) if projection else None,
    ]
    lengths = [d, d, value_width, channels if projection else 0]
    return [x, *weights, gamma.to(dtype), *[normal(n) if biases and n else None for n in lengths]]


# As many as a mean needs of them: the error comes from the few rows that are not quite one-hot. Three draws of 35
# positions have so few that one seed in some hundred made ours 3 times plain torch's; over many it is 1.4 times.
SHARP_DRAWS = 32

# As TF32, of kernels whose numbers are rounded elsewhere than the literal's. A draw has one gradient of gamma, and its
# error is far above float32's rounding: of 24 draws the RMS was over 1.5 times the literal's for one seed in 12.
TF32_DRAWS = 96


def sharp(sizes: tuple[int, ...], seed: int, dtype: torch.dtype) -> Inputs:
    """Inputs with logits of about ±1000, so that most rows of the map are one-hot; the logits are exact in float32.

    x, w_query and w_key hold small integers: what is tested is softmax and its gradient, not the rounding of a logit.
    """
    inputs = draw(sizes, seed, dtype)
    generator = torch.Generator().manual_seed(seed)
    for i in (0, 1, 2):
        inputs[i] = torch.randint(-2, 3, inputs[i].shape, generator=generator).to(dtype)
    inputs[6] = inputs[7] = None
    x = inputs[0]
    logits = torch.bmm(
        functional.conv2d(x, inputs[1][:, :, None, None]).flatten(2).mT,
        functional.conv2d(x, inputs[2][:, :, None, None]).flatten(2),
    )
    factor = 2.0 ** round(float(torch.log2(1000 / logits.abs().max())))
    inputs[1] = inputs[1] * factor
    return inputs


def call(inputs: Inputs, backend: str | None = None) -> Tensor:
    return self_attention2d(*inputs[:6], **dict(zip(NAMES[6:], inputs[6:], strict=True)), backend=backend)


def literal(inputs: Inputs) -> Tensor:
    """The block as the copied eager modules write it: convolutions, two products, a softmax over the whole map."""
    x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out = inputs
    query, key, value = (
        functional.conv2d(x, w[:, :, None, None], b).flatten(2)
        for w, b in ((w_query, b_query), (w_key, b_key), (w_value, b_value))
    )
    attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)
    out = torch.bmm(value, attention.transpose(1, 2)).view(x.shape[0], -1, *x.shape[2:])
    if w_out is not None:
        out = functional.conv2d(out, w_out[:, :, None, None], b_out)
    return gamma * out + x


class _Tf32Product(torch.autograd.Function):
    """a @ b and its gradients, every operand as TF32: what torch does only for sizes that cuBLAS finds fit."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, half: int) -> Tensor:
        ctx.half = half
        ctx.save_for_backward(a, b)
        return to_tf32(a, half) @ to_tf32(b, half)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b, grad = (to_tf32(t, ctx.half) for t in (*ctx.saved_tensors, grad))
        return grad @ b.mT, a.mT @ grad, None


def to_tf32(x: Tensor, half: int) -> Tensor:
    """With 10 bits after the point: the nearest such number where ``half`` is half of the last bit, cut off where 0."""
    return ((x.contiguous().view(torch.int32) + half) & ~0x1FFF).view(torch.float32)


def literal_in_tf32(inputs: Inputs, half: int = 0x1000) -> Tensor:
    """``literal`` of float32, multiplied as TF32: of the nearest numbers, or as the tensor cores take a float32."""
    x, w_query, w_key, w_value, w_out, gamma, b_query, b_key, b_value, b_out = inputs

    def product(a: Tensor, b: Tensor) -> Tensor:
        return _Tf32Product.apply(a, b, half)

    def convolution(weight: Tensor, image: Tensor, bias: Tensor | None) -> Tensor:
        result = product(weight.expand(len(image), -1, -1), image)
        return result if bias is None else result + bias[:, None]

    flat = x.flatten(2)
    query, key, value = (
        convolution(w, flat, b) for w, b in ((w_query, b_query), (w_key, b_key), (w_value, b_value))
    )
    out = product(value, torch.softmax(product(query.mT, key), dim=-1).mT)
    out = out if w_out is None else convolution(w_out, out, b_out)
    return gamma * out.view(x.shape) + x


def with_gradients(function: object, inputs: Inputs, grad_y: Tensor) -> list[Tensor]:
    """The output, then the gradient of every input that is there."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    y = function(leaves)
    return [y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], grad_y)]


def check(
    draws: list[Inputs], backend: str | None, plainly: Callable[[Inputs], Tensor] = literal
) -> list[Tensor]:
    """Holds output and every gradient against float64, and asserts that they are not trivially right.

    ``plainly`` is what its error is compared with.

    Several draws of one size are compared as one tensor: of a single number, such as gamma's gradient, one draw would
    say little about plain torch's error.
    """
    expected, ours, plain, exact = backend or "torch", [], [], []
    for inputs in draws:
        x = inputs[0]
        generator = torch.Generator().manual_seed(7)
        grad_y = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        with dispatch.record() as calls:
            ours.append(with_gradients(lambda t: call(t, backend), inputs, grad_y))
        assert calls == [("attention_forward", expected), ("attention_backward", expected)]
        with torch.backends.cudnn.flags(allow_tf32=False):  # which its convolutions take by default
            plain.append(with_gradients(plainly, inputs, grad_y))
        exact.append(with_gradients(literal, [None if t is None else t.double() for t in inputs], grad_y.double()))
    names = ["y", *[name for name, t in zip(NAMES, inputs, strict=True) if t is not None]]
    columns = [[torch.stack(parts) for parts in zip(*results, strict=True)] for results in (ours, plain, exact)]
    for name, our, other, truth in zip(names, *columns, strict=True):
        try:
            assert_close_to_float64(our, other, truth, float64_floor=1e-11)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None
        one_position = x.shape[2] * x.shape[3] == 1 and name in ("w_query", "w_key", "b_query")
        assert name == "b_key" or one_position or our.abs().max() > 0, f"{name} is 0 everywhere"
    return ours[0]


def peak_of_first_step(backend: str, sizes: tuple[int, ...]) -> int | None:
    """Peak extra bytes of a first forward and backward, results included; ``eager`` is the literal.

    In a ``fresh_process``.
    """
    return peak_bytes(step(backend, sizes))


def step(backend: str, sizes: tuple[int, ...]) -> Callable[[], object]:
    inputs = [None if t is None else t.requires_grad_() for t in draw(sizes, 0, torch.float32)]
    leaves = [t for t in inputs if t is not None]
    grad_y = torch.ones_like(inputs[0])
    function = literal if backend == "eager" else lambda t: call(t, backend)
    return lambda: torch.autograd.grad(function(inputs), leaves, grad_y)
