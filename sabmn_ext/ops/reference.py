"""The specification of every operation in plain torch, in any floating dtype and on any device.

The kernels are tested against these functions in float64, and an operation falls back to them where no kernel serves.
"""

import torch
from torch import Tensor

# ---- spectral normalisation (Miyato et al., 2018; the order of torch's parametrization) ----


def power_iteration(matrix: Tensor, u: Tensor, v: Tensor, iterations: int, eps: float) -> tuple[Tensor, Tensor]:
    """``iterations`` times u ← Wv/‖Wv‖, v ← Wᵀu/‖Wᵀu‖, without a gradient.

    Args:
        matrix: W, [rows, columns]. u: [rows]. v: [columns]. eps: the smallest length that is divided by.
    """
    with torch.no_grad():
        for _ in range(iterations):
            u = torch.nn.functional.normalize(torch.mv(matrix, v), dim=0, eps=eps)
            v = torch.nn.functional.normalize(torch.mv(matrix.t(), u), dim=0, eps=eps)
        return u.clone(), v.clone()


def spectral_norm(
    weight: Tensor, u: Tensor, v: Tensor, n_power_iterations: int = 1, eps: float = 1e-12
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``weight`` divided by σ = uᵀWv, after ``n_power_iterations`` updates of u and v. W is ``weight.flatten(1)``.

    Returns:
        normalised weight (the shape of ``weight``), u [rows], v [columns], σ []; u and v are constants of the gradient.
    """
    matrix = weight.flatten(1)
    u, v = power_iteration(matrix.detach(), u, v, n_power_iterations, eps)
    sigma = torch.dot(u, torch.mv(matrix, v))
    return weight / sigma, u, v, sigma


def spectral_norm_backward(gradient: Tensor, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """dW = (G − ⟨G, W⟩/σ · u vᵀ)/σ for the gradient G of the normalised weight; σ = uᵀWv with constant u and v."""
    matrix, g = weight.flatten(1), gradient.flatten(1)
    sigma = torch.dot(u, torch.mv(matrix, v))
    return ((g - (g * matrix).sum() / sigma * torch.outer(u, v)) / sigma).view_as(weight)
