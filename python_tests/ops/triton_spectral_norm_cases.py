"""Spectral normalisation by the Triton kernels against float64: on a GPU, or with TRITON_INTERPRET=1 on the CPU.

Triton reads the variable when it is imported: ``test_triton_spectral_norm.py`` runs this file in a process of its own.
"""

import os

import pytest
import torch
from float64_rule import assert_close_to_float64
from torch import Tensor

from sabmn_ext.ops import dispatch, reference
from sabmn_ext.ops.spectral_norm import spectral_norm
from sabmn_ext.ops.triton import spectral_norm as kernels

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
# Blocks have 8 rows; tiles 512 columns, 256 in float64, and 2048 elements where they do not follow the columns.
SHAPES = [(1, 1), (1, 17), (19, 1), (3, 2, 3, 3), (8, 512), (13, 1031), (23, 32)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]


def draw(
    shapes: list[tuple[int, ...]], dtype: torch.dtype, scale: float = 1.0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, and u and v after one iteration: for random ones σ may vanish, and everything is ill-conditioned."""
    weights = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    vectors = []
    for weight in weights:
        v = torch.randn(weight[0].numel(), dtype=torch.float64)
        _, u, v, _ = reference.spectral_norm(weight, v.new_zeros(len(weight)), v, 1)
        vectors.append((u.to(DEVICE, dtype), v.to(DEVICE, dtype)))
    return [(scale * w).to(DEVICE, dtype) for w in weights], [u for u, _ in vectors], [v for _, v in vectors]


def check(
    weights: list[Tensor],
    u: list[Tensor],
    v: list[Tensor],
    out: torch.dtype | None = None,
    iterations: int = 1,
    scale: float = 1.0,
) -> None:
    before = [t.clone() for t in (*weights, *u, *v)]
    leaves = [w.detach().requires_grad_() for w in weights]
    with dispatch.record() as calls:
        normalized, u_new, v_new, sigma = spectral_norm(
            leaves, u, v, n_power_iterations=iterations, dtype=out, backend="triton"
        )
        cotangents = [torch.randn_like(w) for w in normalized]
        gradients = torch.autograd.grad(normalized, leaves, cotangents)
    assert calls == [("spectral_norm_forward", "triton"), ("spectral_norm_backward", "triton")]
    assert all(map(torch.equal, (*weights, *u, *v), before)), "an input was written to"
    for i, weight in enumerate(weights):
        exact_weight = weight.double().requires_grad_()
        exact = reference.spectral_norm(exact_weight, u[i].double(), v[i].double(), iterations)
        (exact_gradient,) = torch.autograd.grad(exact[0], exact_weight, cotangents[i].double())
        plain_weight = weight.clone().requires_grad_()
        plain = reference.spectral_norm(plain_weight, u[i], v[i], iterations, dtype=out)
        (plain_gradient,) = torch.autograd.grad(plain[0], plain_weight, cotangents[i])
        ours = (normalized[i], u_new[i], v_new[i], sigma[i] / scale, gradients[i] * scale)
        plain = (*plain[:3], plain[3] / scale, plain_gradient * scale)
        exact = (*exact[:3], exact[3] / scale, exact_gradient * scale)
        for our_part, plain_part, exact_part in zip(ours, plain, exact, strict=True):
            assert_close_to_float64(our_part.detach(), plain_part.detach(), exact_part.detach())


@pytest.mark.parametrize(
    ("dtype", "out", "iterations"),
    [*((*types, 1) for types in DTYPES), *((*DTYPES[0], n) for n in (0, 3)), (*DTYPES[-1], 3)],
)
def test_forward_and_backward_against_float64(dtype: torch.dtype, out: torch.dtype, iterations: int) -> None:
    check(*draw(SHAPES, dtype), out, iterations)


@pytest.mark.heavy
@pytest.mark.parametrize("iterations", [0, 1, 2, 5])
@pytest.mark.parametrize(("dtype", "out"), DTYPES)
def test_random_shapes(dtype: torch.dtype, out: torch.dtype, iterations: int) -> None:
    shapes = [tuple(torch.randint(1, most, [2]).tolist()) for most in (4, 30, 100)]
    check(*draw([*SHAPES, *shapes], dtype), out, iterations)


def test_more_blocks_than_are_summed_at_once() -> None:
    check(*draw([(8 * 33, 3)], torch.float32))


def test_more_weights_than_a_group_and_the_same_bits_in_any_company() -> None:
    weights, u, v = draw([(3 + i % 4, 5 + i) for i in range(35)], torch.float32)
    together = spectral_norm(weights, u, v, backend="triton")
    for i in (0, 1, 33, 34):
        alone = spectral_norm(weights[i : i + 1], u[i : i + 1], v[i : i + 1], backend="triton")
        for ours, expected in zip(together[:3], alone[:3], strict=True):
            assert torch.equal(ours[i], expected[0])
        assert torch.equal(together[3][i], alone[3][0])
    check(weights, u, v)


LAYOUTS = {
    "channels_last": lambda w: w.to(memory_format=torch.channels_last),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "at an address that no vector load takes": lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view_as(w),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("iterations", [0, 2])
def test_any_layout(layout: str, iterations: int) -> None:
    weights, u, v = draw([(6, 5, 3, 2), (11, 4, 3, 3), (9, 1, 2, 2)], torch.float32)
    check([LAYOUTS[layout](w) for w in weights], u, v, iterations=iterations)


@pytest.mark.parametrize("scale", [2.0**-50, 2.0**50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_far_from_one(dtype: torch.dtype, scale: float) -> None:
    check(*draw([(13, 7), (20, 33)], dtype, scale), scale=scale)


@pytest.mark.parametrize("iterations", [0, 1])
def test_sigma_of_zero_and_nan(iterations: int) -> None:
    weights, u, v = draw([(9, 7), (9, 7), (9, 7)], torch.float32)
    weights[0].zero_()
    weights[1][8, 3] = float("nan")
    sigma = torch.empty(3, device=DEVICE)
    outputs = [[torch.empty_like(t) for t in tensors] for tensors in (weights, u, v)]
    kernels.forward(weights, u, v, *outputs, [7, 7, 7], sigma, iterations, 1e-12)
    assert sigma[0] == 0
    assert sigma[1].isnan()
    assert sigma[2] > 0
