"""Batch normalisation, residual and ReLU as one operation: against float64 and, where it is exact, against torch."""

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

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.batch_norm import batch_norm_act

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [
    (2, 1, 16, 8), (1, 3, 7, 1), (5, 3, 1, 1), (5, 17, 7, 1), (2, 64, 16, 8), (1, 130, 7, 3), (67, 5, 3, 1),
    (3, 2, 33, 37),
]  # fmt: skip
CASES = [(True, False), (True, True), (False, False), (False, True)]  # relu, residual
BOTH = [("batch_norm_act_forward", "cpu"), ("batch_norm_act_backward", "cpu")]

pytestmark = needs_native

Inputs = dict[str, Tensor]


def draw(size: tuple[int, ...], dtype: torch.dtype, form: str, residual: bool, mean: float = 0.0) -> Inputs:
    def image() -> Tensor:
        return torch.randn(size).contiguous(memory_format=FORMATS[form])

    channels = size[1]
    x = (image() * (0.5 + torch.rand(channels, 1, 1)) + mean * torch.randn(channels, 1, 1).sign()).to(dtype)
    weight = (0.5 + torch.rand(channels)) * torch.randn(channels).sign()
    inputs = {"x": x, "weight": weight, "bias": torch.randn(channels)}
    return inputs | {"residual": image().to(dtype)} if residual else inputs


def run(inputs: Inputs, grad_y: Tensor, operation: Callable[..., Tensor], **options: Any) -> list[Tensor]:
    """y, and the gradients in the order of ``inputs``."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    y = operation(**leaves, **options)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad_y)]


def certain(inputs: Inputs, relu: bool) -> Tensor:
    """Where roundings cannot move y over the ReLU's threshold."""
    y = reference.batch_norm_act(**{name: t.double() for name, t in inputs.items()}, relu=False)
    margin = 0.01 if inputs["x"].dtype == torch.float32 else 0.1
    return (y.abs() > margin) | torch.tensor(not relu)


def check(size: tuple[int, ...], dtype: torch.dtype, form: str, relu: bool, residual: bool, mean: float = 0.0) -> None:
    inputs = draw(size, dtype, form, residual, mean)
    grad_y = (torch.randn(size) * certain(inputs, relu)).to(dtype).contiguous(memory_format=FORMATS[form])
    with dispatch.record() as calls:
        ours = run(inputs, grad_y, batch_norm_act, relu=relu)
    assert calls == BOTH
    plain = run(inputs, grad_y, reference.batch_norm_act, relu=relu)
    exact = run({n: t.double() for n, t in inputs.items()}, grad_y.double(), reference.batch_norm_act, relu=relu)
    for mine, theirs, right, name in zip(ours, plain, exact, ["y", *inputs], strict=True):
        assert_close_to_float64(mine, theirs, right)
        assert name not in ("y", "x", "residual") or mine.stride() == inputs["x"].stride()


@pytest.mark.parametrize(("relu", "residual"), CASES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_against_float64(dtype: torch.dtype, form: str, relu: bool, residual: bool) -> None:
    for size in SIZES:
        check(size, dtype, form, relu, residual)


@pytest.mark.parametrize("form", FORMATS)
def test_a_mean_far_from_zero(form: str) -> None:
    for size in [(2, 64, 16, 8), (67, 5, 3, 1), (3, 2, 33, 37)]:
        check(size, torch.float32, form, relu=True, residual=False, mean=1000.0)


@pytest.fixture(params=ISAS[:-1])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with instruction_set(request.param):
        yield request.param


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype, form: str) -> None:
    for size, (relu, residual) in itertools.product([(5, 17, 7, 1), (1, 130, 7, 3)], CASES):
        check(size, dtype, form, relu, residual)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_passes_where_y_is_positive(isa: str, dtype: torch.dtype, form: str) -> None:
    """To the bit: by the ReLU's own output, where the values are so small that many round to 0 too."""
    inputs = draw((3, 7, 9, 5), dtype, form, residual=False)
    inputs["weight"] *= torch.tensor([1, 0, 1e-2, 1, 1e-7, 1e-20, 1e-38])
    inputs["bias"] = torch.tensor([0, -0.0, 1e-8, 1, 0, 0, 0])
    y, _, _, grad_bias = run(inputs, torch.ones_like(inputs["x"]), batch_norm_act)
    assert torch.equal(grad_bias, (y > 0).sum((0, 2, 3)).float())
    assert 0 < grad_bias.sum() < y.numel()
    y, *_, grad_residual = run(inputs | {"residual": -y.roll(1, 0)}, torch.ones_like(y), batch_norm_act)
    assert torch.equal(grad_residual, (y > 0).to(dtype))


@pytest.mark.parametrize("form", FORMATS)
def test_values_that_are_not_finite_spread_as_torchs_do(form: str) -> None:
    for residual in (False, True):
        inputs = draw((3, 4, 5, 2), torch.float32, form, residual)
        inputs["x"][1, 0, 2, 1], inputs["x"][0, 1, 0, 0] = float("nan"), float("inf")
        if residual:
            inputs["residual"][0, 2, 0, 0] = float("nan")
            inputs["residual"][1, 2, 0, 0] = float("inf")
        grad_y = torch.ones_like(inputs["x"])
        ours, theirs = (run(inputs, grad_y, f) for f in (batch_norm_act, reference.batch_norm_act))
        assert torch.isnan(ours[0][:, :2]).all()
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.allclose(mine, other, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("form", FORMATS)
def test_channels_of_one_value(form: str) -> None:
    inputs = draw((3, 6, 5, 7), torch.float32, form, residual=False)
    inputs["x"][:] = torch.tensor([0, 1, -1000.1, 1e-3, 1e10, 3.3]).reshape(-1, 1, 1)
    y, grad_x, *_ = run(inputs, torch.randn(3, 6, 5, 7), batch_norm_act, relu=False)
    # What is left of a number beside its rounding, times 1/√eps.
    allowed = 1e-6 + 400 * 1e-7 * inputs["x"].abs() * inputs["weight"].abs().reshape(-1, 1, 1)
    assert ((y - inputs["bias"].reshape(-1, 1, 1)).abs() <= allowed).all()
    assert torch.isfinite(grad_x).all()
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        batch_norm_act(torch.randn(1, 3, 1, 1))


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics(dtype: torch.dtype, form: str, momentum: float) -> None:
    for size in SIZES:
        x = draw(size, dtype, form, residual=False, mean=3.0)["x"]
        start = torch.stack([torch.randn(size[1]), torch.rand(size[1])])
        ours, plain, exact = start.clone(), start.clone(), start.double()
        batch_norm_act(x, running_mean=ours[0], running_var=ours[1], momentum=momentum)
        F.batch_norm(x, plain[0], plain[1], training=True, momentum=momentum)
        F.batch_norm(x.double(), exact[0], exact[1], training=True, momentum=momentum)
        assert_close_to_float64(ours, plain, exact)
        assert (ours - exact).abs().max() <= 1e-6 * (1 + exact.abs().max())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_threads_do_not_change_a_bit(form: str, residual: bool) -> None:
    inputs = draw((4, 70, 37, 31), torch.float32, form, residual)  # several blocks of rows
    grad_y = torch.randn_like(inputs["x"])
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(run(inputs, grad_y, batch_norm_act))
    finally:
        torch.set_num_threads(threads)
    for one, two, five in zip(*results, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, five)


@pytest.mark.parametrize(("relu", "residual"), CASES)
@pytest.mark.parametrize("form", FORMATS)
def test_gradients_and_residuals_in_any_layout(form: str, relu: bool, residual: bool) -> None:
    size = (3, 5, 4, 6)
    inputs = draw(size, torch.float32, form, residual)
    other = "contiguous" if form == "channels_last" else "channels_last"
    grad_y = torch.randn(size).contiguous(memory_format=FORMATS[form])
    expected = run(inputs, grad_y, batch_norm_act, relu=relu)
    turned = dict(inputs)
    if residual:
        turned["residual"] = inputs["residual"].contiguous(memory_format=FORMATS[other])
    for given in (grad_y.contiguous(memory_format=FORMATS[other]), torch.cat([grad_y, grad_y], 3)[..., :6]):
        before = given.clone()
        for mine, right in zip(run(turned, given, batch_norm_act, relu=relu), expected, strict=True):
            assert torch.equal(mine, right)
        assert torch.equal(given, before)
    ones = run(inputs, torch.ones(()).expand(size), batch_norm_act, relu=relu)
    for mine, right in zip(ones, run(inputs, torch.ones(size), batch_norm_act, relu=relu), strict=True):
        assert torch.equal(mine, right)


@pytest.mark.parametrize(("relu", "residual"), CASES)
def test_only_gradients_that_nothing_else_refers_to_are_written_over(relu: bool, residual: bool) -> None:
    inputs = draw((3, 5, 4, 6), torch.float32, "contiguous", residual)
    grad_y = torch.randn(3, 5, 4, 6)
    expected = run(inputs, grad_y, batch_norm_act, relu=relu)[1:]

    def backward(keep: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
        y, kept = batch_norm_act(**leaves, relu=relu), []
        if keep:
            y.register_hook(kept.append)
        (y * 1).backward(grad_y)  # the product makes a gradient of its own
        return [leaf.grad for leaf in leaves.values() if leaf.grad is not None], kept

    for keep in (False, True):
        found, kept = backward(keep)
        for mine, right in zip(found, expected, strict=True):
            assert torch.equal(mine, right)
        assert all(torch.equal(each, grad_y) for each in kept)
        assert len(kept) == keep


def test_a_gradient_that_is_not_wanted() -> None:
    inputs = draw((3, 5, 4, 6), torch.float32, "channels_last", residual=True)
    grad_y = torch.randn_like(inputs["x"])
    expected = dict(zip(inputs, run(inputs, grad_y, batch_norm_act)[1:], strict=True))
    for wanted in inputs:
        leaves = {name: t.detach().requires_grad_(name == wanted) for name, t in inputs.items()}
        batch_norm_act(**leaves).backward(grad_y)
        for name, leaf in leaves.items():
            assert leaf.grad is None if name != wanted else torch.equal(leaf.grad, expected[name])  # type: ignore[arg-type]
    plain = batch_norm_act(inputs["x"])
    ones = {"weight": torch.ones(5), "bias": torch.zeros(5)}
    assert torch.equal(plain, batch_norm_act(inputs["x"], **ones))


# ---- derivatives of derivatives, and what torch does by itself ----


@pytest.mark.parametrize(("relu", "residual"), CASES)
def test_second_derivatives(relu: bool, residual: bool) -> None:
    inputs = draw((3, 4, 5, 2), torch.float32, "channels_last", residual)
    grad_y = torch.randn(3, 4, 5, 2) * certain(inputs, relu)
    directions = [torch.randn_like(t) for t in (*inputs.values(), grad_y)][: len(inputs) + 1]

    def seconds(dtype: torch.dtype, operation: Callable[..., Tensor]) -> list[Tensor]:
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in inputs.items()}
        cotangent = grad_y.to(dtype).requires_grad_()
        y = operation(**leaves, relu=relu)
        firsts = torch.autograd.grad(y, list(leaves.values()), cotangent, create_graph=True)
        total = sum((first * d.to(dtype)).sum() for first, d in zip(firsts, directions, strict=False))
        return list(torch.autograd.grad(total, [leaves["x"], leaves["weight"], cotangent]))

    with dispatch.record() as calls:
        ours = seconds(torch.float32, batch_norm_act)
    assert calls == BOTH[:1], "the forward pass is ours, the rest torch's"
    plain, exact = (seconds(dtype, reference.batch_norm_act) for dtype in (torch.float32, torch.float64))
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert_close_to_float64(mine, theirs, right)
        assert right.abs().max() > 0


@pytest.mark.parametrize(("relu", "residual"), CASES)
def test_gradcheck(relu: bool, residual: bool) -> None:
    """Of the formula that second derivatives take, in float64."""
    inputs = {n: t.double() for n, t in draw((2, 3, 3, 2), torch.float32, "contiguous", residual).items()}
    grad_y = torch.randn(2, 3, 3, 2, dtype=torch.float64)
    kept = reference.batch_norm_act(**inputs) > 0 if relu else None
    ours = reference.batch_norm_act_backward(grad_y, inputs["x"], inputs["weight"], kept, 1e-5)
    named = dict(zip(("x", "residual", "weight", "bias"), ours, strict=True))
    for name, right in zip(inputs, run(inputs, grad_y, reference.batch_norm_act, relu=relu)[1:], strict=True):
        assert torch.allclose(named[name], right)
    leaves = [t.requires_grad_() for t in (grad_y, inputs["x"], inputs["weight"])]
    assert torch.autograd.gradcheck(lambda g, x, w: reference.batch_norm_act_backward(g, x, w, kept, 1e-5), leaves)


def test_many_gradients_at_once() -> None:
    inputs = draw((2, 3, 4, 5), torch.float32, "channels_last", residual=True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    y, cotangents = batch_norm_act(**leaves), torch.randn(3, 2, 3, 4, 5)
    many = torch.autograd.grad(y, list(leaves.values()), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        one = torch.autograd.grad(y, list(leaves.values()), cotangent, retain_graph=True)
        for mine, right in zip(many, one, strict=True):
            assert torch.allclose(mine[i], right, atol=1e-5)


def test_where_torch_serves() -> None:
    x = torch.randn(2, 3, 4, 5)
    half = torch.randn(3).bfloat16()

    def in_forward_mode() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(batch_norm_act(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    def taken(call: Callable[[], Any]) -> list[tuple[str, str]]:
        with dispatch.record() as calls:
            call()
        return calls

    for call in (
        lambda: batch_norm_act(x.double()),
        lambda: batch_norm_act(torch.randn(2, 3, 4, 9)[..., 2:7]),
        lambda: batch_norm_act(x, residual=x.double()),
        lambda: batch_norm_act(x.bfloat16(), half, half),
        lambda: batch_norm_act(x[:0]),
        lambda: torch.func.vmap(batch_norm_act)(x[None]),
        lambda: torch.func.grad(lambda t: batch_norm_act(t).sum())(x),
        in_forward_mode,
    ):
        assert taken(call)[0] == ("batch_norm_act_forward", "torch")
    assert taken(lambda: batch_norm_act(x, backend="torch")) == [("batch_norm_act_forward", "torch")]
    assert taken(lambda: batch_norm_act(x, backend="cpu")) == [("batch_norm_act_forward", "cpu")]
    compiled = torch.compile(batch_norm_act, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), batch_norm_act(x), atol=1e-5)


def test_errors() -> None:
    x = torch.randn(2, 3, 4, 5)
    for call, message in (
        (lambda: batch_norm_act(x[0]), r"x has shape \[3, 4, 5\]; expected images \[B, C, H, W\]"),
        (lambda: batch_norm_act(x, torch.ones(4)), r"weight has shape \[4\]; expected \[3\], x's channels"),
        (lambda: batch_norm_act(x, residual=x[:1]), r"residual has shape \[1, 3, 4, 5\]; expected x's, \[2, 3, 4, 5\]"),
        (lambda: batch_norm_act(x, running_mean=torch.ones(3)), "one of running_mean and running_var is None"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(RuntimeError, match=r"backend 'cpu' cannot serve batch_norm_act.*it serves float32, bfl"):
        batch_norm_act(x.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot serve batch_norm_act: it serves contiguous or chan"):
        batch_norm_act(torch.randn(2, 3, 4, 9)[..., 2:7], backend="cpu")
    with pytest.raises(RuntimeError, match="there is no cuda kernel for this operation"):
        batch_norm_act(x, backend="cuda")
