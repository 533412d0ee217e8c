"""A backward pass writes over the gradients that it alone has, and over no others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sabmn_ext import _native
from sabmn_ext.ops import reference
from sabmn_ext.ops.cpu.unshared import unshared
from sabmn_ext.ops.spectral_norm import spectral_norm

pytestmark = pytest.mark.skipif(_native.module is None, reason="the native module is not built")

SHAPES = [(33, 65), (7, 5, 3, 3)]
KEPT: list[Tensor] = []


def draw() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    weights = [torch.randn(shape) for shape in SHAPES]
    pairs = [
        reference.power_iteration(w.flatten(1), torch.randn(w.shape[0]), torch.randn(w[0].numel()), 5, 1e-12)
        for w in weights
    ]
    return weights, [u for u, _ in pairs], [v for _, v in pairs]


def gradients_of(loss: Callable[[list[Tensor]], Tensor], backend: str) -> list[Tensor | None]:
    torch.manual_seed(5)
    weights, u, v = draw()
    for weight in weights:
        weight.requires_grad_()
    loss(spectral_norm(weights, u, v, backend=backend)[0]).backward()
    return [weight.grad for weight in weights]


def squares(normalized: list[Tensor]) -> Tensor:
    return sum((n.square() * 0.3).sum() for n in normalized)  # type: ignore[return-value]


def kept_by_a_hook(normalized: list[Tensor]) -> Tensor:
    for n in normalized:
        n.register_hook(lambda gradient: KEPT.append(gradient))
    return squares(normalized)


def kept_as_grad(normalized: list[Tensor]) -> Tensor:
    for n in normalized:
        n.retain_grad()
    KEPT.extend(normalized)
    return squares(normalized)


def kept_by_a_node(normalized: list[Tensor]) -> Tensor:
    for n in normalized:
        assert n.grad_fn is not None
        n.grad_fn.register_prehook(lambda gradients: KEPT.extend(g for g in gradients if g is not None))
    return squares(normalized)


@pytest.mark.parametrize(
    "loss",
    [
        squares,
        kept_by_a_hook,
        kept_as_grad,
        kept_by_a_node,
        pytest.param(lambda ns: ns[0].sum() + 2 * ns[1].sum(), id="expanded"),
        pytest.param(lambda ns: torch.cat([n.flatten() for n in ns]).square().sum(), id="views-of-one-gradient"),
        pytest.param(lambda ns: (ns[0].t() * torch.arange(33.0)).square().sum(), id="transposed, one unused"),
        pytest.param(lambda ns: (ns[0][1:] * 3).square().sum() + ns[1][..., 1].square().sum(), id="sliced"),
        pytest.param(lambda ns: sum((n.double() ** 3).sum() for n in ns), id="of a cast"),
    ],
)
def test_gradients_equal_those_of_the_reference(loss: Callable[[list[Tensor]], Tensor]) -> None:
    KEPT.clear()
    ours = gradients_of(loss, "cpu")
    kept = [tensor.grad if tensor.grad_fn is not None else tensor for tensor in KEPT]
    KEPT.clear()
    theirs = gradients_of(loss, "torch")
    for mine, expected in zip(ours, theirs, strict=True):
        if expected is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)
    # What somebody kept is what it was when it was handed out: the reference writes over nothing.
    expected_kept = [tensor.grad if tensor.grad_fn is not None else tensor for tensor in KEPT]
    assert len(kept) == len(expected_kept)
    for mine, expected in zip(kept, expected_kept, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("create_graph", [False, True])
def test_only_what_nobody_else_has_is_written_over(create_graph: bool) -> None:
    weights, u, v = draw()
    for weight in weights:
        weight.requires_grad_()
    addresses = []
    normalized = spectral_norm(weights, u, v, backend="cpu")[0]
    for n in normalized:
        n.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    gradients = torch.autograd.grad(squares(normalized), weights, create_graph=create_graph)
    written_over = {g.data_ptr() for g in gradients} & set(addresses)
    assert len(written_over) == (0 if create_graph else len(weights))


def test_gradients_that_the_caller_hands_in_stay_as_they_are() -> None:
    weights, u, v = draw()
    for weight in weights:
        weight.requires_grad_()
    normalized = spectral_norm(weights, u, v, backend="cpu")[0]
    given = [torch.randn_like(n) for n in normalized]
    before = [g.clone() for g in given]
    with_inputs = torch.autograd.grad(normalized, [*normalized, *weights], given, retain_graph=True)
    torch.autograd.backward(normalized, given)
    for g, b, same, weight, again in zip(
        given, before, with_inputs[: len(given)], weights, with_inputs[len(given) :], strict=True
    ):
        assert torch.equal(g, b)
        assert torch.equal(same, b)
        assert weight.grad is not None
        assert torch.equal(weight.grad, again)


def test_autograd_may_still_add_to_a_gradient_in_place() -> None:
    """Counting refers to no storage: where one has been, autograd adds the next gradient out of place."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, residual: Tensor) -> Tensor:
            return x + residual

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
            assert unshared(gradients) == [True]
            return gradients[0].clone(), gradients[0]

    x = torch.randn(10, requires_grad=True) * 1
    y = Sum.apply(x.sin(), x) * 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y.backward(torch.ones(10))
    names = {event.key for event in profile.key_averages()}
    assert "aten::add_" in names
    assert "aten::add" not in names
