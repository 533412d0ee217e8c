"""1×1 convolutions as products, 3×3 ones by Winograd's, against float64 and a direct convolution."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from float64_rule import assert_close_to_float64
from instruction_sets import ISAS, instruction_set, needs_native
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from sabmn_ext import _native
from sabmn_ext.ops import convolution, dispatch
from sabmn_ext.ops.convolution import conv1x1, conv3x3
from sabmn_ext.ops.cpu import winograd

# The filters' size, and what is served.
KINDS = [(1, torch.float32), (3, torch.float32), (3, torch.bfloat16)]
# B, C, O, H, W
SIZES = [
    (1, 1, 1, 1, 1), (2, 3, 5, 1, 7), (1, 17, 4, 6, 1), (3, 16, 33, 2, 2), (2, 40, 24, 7, 9), (1, 64, 130, 16, 8),
    (5, 7, 19, 3, 4), (2, 130, 64, 13, 12),
]  # fmt: skip
pytestmark = needs_native
each_size_of_filters = pytest.mark.parametrize("filters", [1, 3])


def direct(x: Tensor, weight: Tensor, **_: Any) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[2] // 2)


def conv(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return (conv1x1 if weight.shape[2] == 1 else conv3x3)(x, weight, **options)


def both(filters: int) -> list[tuple[str, str]]:
    return [(f"conv{filters}x{filters}_{name}", "cpu") for name in ("forward", "backward")]


class NativeOf:
    """The native module, for a processor on which another instruction set is the best."""

    def __init__(self, isa: str) -> None:
        self.isa, self._module = lambda: isa, _native.module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def draw(size: tuple[int, ...], dtype: torch.dtype = torch.float32, filters: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """x, a weight and a gradient of y, channels_last."""
    batch, channels, rows, height, width = size
    shapes = ((batch, channels, height, width), (rows, channels, filters, filters), (batch, rows, height, width))
    tensors = (torch.randn(shape).to(dtype) for shape in shapes)
    x, weight, grad_y = (t.contiguous(memory_format=torch.channels_last) for t in tensors)
    return x, weight, grad_y


def run(x: Tensor, weight: Tensor, grad_y: Tensor, operation: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    """y and both gradients."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    y = operation(*leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def check(size: tuple[int, ...], filters: int, dtype: torch.dtype) -> None:
    inputs = draw(size, dtype, filters)
    with dispatch.record() as calls:
        ours = run(*inputs, conv, backend="cpu")
    assert calls == both(filters)
    plain = run(*inputs, direct)
    x, weight, grad_y = (t.double() for t in inputs)
    exact = run(x, weight, grad_y, direct)
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert_close_to_float64(mine, theirs, right)
        assert mine.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("filters", "dtype"), KINDS)
def test_values_and_gradients_against_float64(filters: int, dtype: torch.dtype, size: tuple[int, ...]) -> None:
    check(size, filters, dtype)


@pytest.mark.parametrize(("filters", "dtype"), KINDS)
@pytest.mark.parametrize("isa", ISAS[:-1])
def test_every_instruction_set(isa: str, filters: int, dtype: torch.dtype) -> None:
    with instruction_set(isa):
        for size in ((2, 40, 24, 7, 9), (1, 17, 4, 6, 1)):
            check(size, filters, dtype)


@pytest.mark.parametrize("size", [(8, 64, 64, 16, 8), (4, 128, 256, 12, 10)])
def test_rounding_in_float32(size: tuple[int, ...]) -> None:
    """What the docstring says of it, RMS errors against float64 beside a direct convolution's."""
    inputs = draw(size)
    ours, plain = (run(*inputs, operation) for operation in (conv3x3, direct))
    x, weight, grad_y = (t.double() for t in inputs)
    exact = run(x, weight, grad_y, direct)
    for mine, theirs, right, most in zip(ours, plain, exact, (1.0, 1.0, 4.0), strict=True):
        assert (mine - right).square().mean().sqrt() <= most * (theirs - right).square().mean().sqrt()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images go through the products at a time."""
    monkeypatch.setattr(winograd, "_PLANE", 1)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("size", [(5, 3, 4, 6, 5), (4, 33, 2, 3, 3), (7, 4, 8, 2, 4)])
def test_images_in_parts(size: tuple[int, ...]) -> None:
    x, weight, _ = draw(size)
    assert len(winograd._parts(x, weight)) > 1
    check(size, 3, torch.float32)


@each_size_of_filters
def test_layouts(filters: int) -> None:
    """Any strides of x, weight and the gradient of y give the same numbers."""
    x, weight, grad_y = draw((2, 5, 6, 7, 4), filters=filters)
    expected = run(x, weight, grad_y, conv, backend="cpu")

    def layouts(t: Tensor) -> Iterator[Tensor]:
        yield t.contiguous()
        yield torch.cat([t, t], 3)[..., : t.shape[3]]
        yield t.contiguous().flip(0).flip(0).mT.contiguous().mT

    for each in itertools.product(layouts(x), layouts(weight), layouts(grad_y)):
        before = [t.clone() for t in each]
        for mine, right in zip(run(*each, conv, backend="cpu"), expected, strict=True):
            assert torch.equal(mine, right)
        for t, kept in zip(each, before, strict=True):
            assert torch.equal(t, kept)
    ones = run(x, weight, torch.ones(()).expand(2, 6, 7, 4), conv)
    for mine, right in zip(ones, run(x, weight, torch.ones(2, 6, 7, 4), conv), strict=True):
        assert torch.equal(mine, right)


def test_results_stay_when_the_memory_is_used_again() -> None:
    """Outputs and planes come from a pool: what is still referred to, or saved for a backward pass, is not in it."""
    size = (4, 64, 64, 16, 16)  # large enough for the pool
    kept = [(inputs, run(*inputs, conv3x3)) for inputs in (draw(size) for _ in range(4))]
    leaves = [[t.requires_grad_() for t in draw(size)[:2]] for _ in range(3)]
    outputs = [conv3x3(*pair) for pair in leaves]
    for inputs, found in kept:
        for mine, right in zip(found, run(*inputs, conv3x3), strict=True):
            assert torch.equal(mine, right)
    for pair, y in zip(leaves, outputs, strict=True):
        y.backward(torch.ones_like(y))
        expected = run(*(t.detach() for t in pair), torch.ones_like(y), conv3x3)
        for mine, right in zip((y, *(t.grad for t in pair)), expected, strict=True):
            assert torch.equal(mine, right)  # type: ignore[arg-type]


@each_size_of_filters
def test_defaults_of_torch_change_nothing(filters: int) -> None:
    inputs = draw((3, 5, 4, 6, 5), filters=filters)
    expected = run(*inputs, conv, backend="cpu")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = run(*inputs, conv, backend="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, right in zip(found, expected, strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, right)


@each_size_of_filters
def test_a_gradient_that_is_not_wanted(filters: int) -> None:
    x, weight, grad_y = draw((3, 5, 4, 6, 5), filters=filters)
    _, grad_x, grad_weight = run(x, weight, grad_y, conv)
    (only_x,) = torch.autograd.grad(conv(x.requires_grad_(), weight), x, grad_y)
    (only_weight,) = torch.autograd.grad(conv(x.detach(), weight.requires_grad_()), weight, grad_y)
    assert torch.equal(only_x, grad_x)
    assert torch.equal(only_weight, grad_weight)
    with torch.no_grad():
        assert not conv(x, weight).requires_grad


@each_size_of_filters
def test_a_weight_changed_before_the_backward_pass_is_noticed(filters: int) -> None:
    x, weight, grad_y = draw((1, 3, 3, 4, 4), filters=filters)
    y = conv(x.requires_grad_(), weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad_y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float) -> None:
    """Wherever torch's are not finite ours are not, and further away than the tiles around they spread nowhere."""
    x, weight, grad_y = draw((2, 4, 6, 9, 10))
    x[0, 1, 4, 5] = value
    grad_y[1, 2, 6, 3] = value
    near = torch.zeros(2, 1, 9, 10, dtype=torch.bool)
    near[0, :, 2:7, 3:8] = True
    near[1, :, 4:9, 1:6] = True
    ours, plain = (run(x, weight, grad_y, operation) for operation in (conv3x3, direct))
    for mine, theirs in zip(ours, plain, strict=True):
        assert not (torch.isfinite(mine) & ~torch.isfinite(theirs)).any()
    for mine, theirs in zip(ours[:2], plain[:2], strict=True):
        assert torch.allclose(mine.masked_fill(near, 0), theirs.masked_fill(near, 0), atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    x, weight, _ = draw((2, 5, 6, 4, 4))
    x.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), dispatch.record() as calls:
        y = conv3x3(x.to(dtype), weight, backend="cpu")
        assert calls == both(3)[:1]
        expected = direct(x.to(dtype), weight)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(y, expected, atol=0.1, rtol=0.02)
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.float16), dispatch.record() as calls:
        assert conv3x3(x, weight).dtype == torch.float16
        assert conv1x1(x, weight[..., :1, :1]).dtype == torch.float16
    assert calls == [("conv3x3_forward", "torch"), ("conv1x1_forward", "torch")]


# ---- derivatives of derivatives, and what torch does by itself ----


@each_size_of_filters
def test_second_derivatives(filters: int) -> None:
    inputs = draw((2, 3, 4, 5, 4), filters=filters)
    directions = [torch.randn_like(t) for t in inputs[:2]]

    def seconds(dtype: torch.dtype, operation: Callable[..., Tensor]) -> list[Tensor]:
        x, weight, grad_y = (t.to(dtype).requires_grad_() for t in inputs)
        firsts = torch.autograd.grad(operation(x, weight), (x, weight), grad_y, create_graph=True)
        total = sum((first * d.to(dtype)).sum() for first, d in zip(firsts, directions, strict=True))
        return list(torch.autograd.grad(total, (x, weight, grad_y)))

    ours, plain = seconds(torch.float32, conv), seconds(torch.float32, direct)
    for mine, theirs, right in zip(ours, plain, seconds(torch.float64, direct), strict=True):
        assert_close_to_float64(mine, theirs, right)
        assert right.abs().max() > 0


@each_size_of_filters
def test_many_gradients_at_once(filters: int) -> None:
    x, weight, _ = draw((2, 3, 4, 5, 4), filters=filters)
    y, cotangents = conv(x.requires_grad_(), weight.requires_grad_()), torch.randn(3, 2, 4, 5, 4)
    many = torch.autograd.grad(y, (x, weight), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(y, (x, weight), cotangent, retain_graph=True)
        for mine, right in zip(many, one, strict=True):
            assert torch.allclose(mine[i], right, atol=1e-4)


def taken(call: Callable[[], Any]) -> list[tuple[str, str]]:
    with dispatch.record() as calls:
        call()
    return calls


@each_size_of_filters
def test_where_torch_serves(filters: int) -> None:
    x, weight, _ = draw((2, 3, 4, 5, 4), filters=filters)

    def in_forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(conv(forward_ad.make_dual(x, torch.ones_like(x)), weight)).tangent

    for call in (
        lambda: conv(x.double(), weight.double()),
        lambda: conv(x.half(), weight.half()),
        lambda: conv(x[:0], weight),
        lambda: torch.func.vmap(conv, in_dims=(0, None))(x[None], weight),
        lambda: torch.func.grad(lambda t: conv(t, weight).sum())(x),
        in_forward_mode,
        lambda: conv(x, weight, backend="torch"),
    ):
        assert taken(call) == [(f"conv{filters}x{filters}_forward", "torch")]
    compiled = torch.compile(conv, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, weight), conv(x, weight), atol=1e-4)


def test_bfloat16_where_torch_multiplies_it_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = draw((2, 3, 4, 5, 4))
    for isa, amx in itertools.product(ISAS, (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(convolution._native, "module", NativeOf(isa))
        backend = "torch" if amx or isa == "avx512_bf16" else "cpu"
        assert taken(lambda: conv3x3(x.bfloat16(), weight.bfloat16())) == [("conv3x3_forward", backend)]
        assert taken(lambda: conv3x3(x, weight)) == [("conv3x3_forward", "cpu")]


def test_errors() -> None:
    x, weight, _ = draw((2, 3, 4, 5, 4))
    for call in (
        lambda: conv3x3(x[0], weight),
        lambda: conv3x3(x, weight[:, :2]),
        lambda: conv3x3(x, weight[..., :1]),
        lambda: conv3x3(x, weight[..., :1, :1]),
    ):
        with pytest.raises(ValueError, match=r"x has shape \[.*expected \[B, C, H, W\] and \[O, C, 3, 3\]"):
            call()
    with pytest.raises(ValueError, match=r"expected \[B, C, H, W\] and \[O, C, 1, 1\]"):
        conv1x1(x, weight)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve conv1x1.*it serves float32, not"):
        conv1x1(x.bfloat16(), weight[..., :1, :1].bfloat16(), backend="cpu")
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve conv3x3.*it serves float32, bfloat16, not"):
        conv3x3(x.double(), weight.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve conv3x3: it takes a weight of x's dtype"):
        conv3x3(x, weight.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="there is no cuda kernel for this operation"):
        conv3x3(x, weight, backend="cuda")
