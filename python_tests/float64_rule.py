"""The one rule by which every kernel is compared with float64."""

import torch
from torch import Tensor


def assert_close_to_float64(
    ours: Tensor, plain: Tensor, reference: Tensor, float64_floor: float = 128 * torch.finfo(torch.float64).eps
) -> None:
    """``ours`` may be as far from the float64 ``reference`` as ``plain`` torch at the same precision, and little more.

    max|ours − ref| ≤ 3·max|plain − ref| + 2·max(eps, 5e-6)·(1 + max|ref|), where eps is that of ours' dtype; and the
    RMS error ≤ 1.5 × plain torch's where that is above rounding. In float64 the reference has rounding errors of its
    own, and ``float64_floor`` takes the place of 2·max(eps, 5e-6).
    """
    assert ours.shape == reference.shape, f"shape {list(ours.shape)}, expected {list(reference.shape)}"
    assert ours.dtype == plain.dtype, f"dtype {ours.dtype}, expected {plain.dtype}"
    if reference.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    relative = float64_floor if ours.dtype == torch.float64 else 2 * max(eps, 5e-6)
    floor = relative * (1 + reference.abs().max().item())
    our_error = (ours.double() - reference).abs()
    plain_error = (plain.double() - reference).abs()
    assert torch.isfinite(ours).all(), "not finite"
    worst, allowed = our_error.max().item(), 3 * plain_error.max().item() + floor
    assert worst <= allowed, f"largest error {worst:.3g}, allowed {allowed:.3g}"
    rms, plain_rms = our_error.square().mean().sqrt().item(), plain_error.square().mean().sqrt().item()
    if rms > floor / 2:
        assert rms <= 1.5 * plain_rms, f"RMS error {rms:.3g}, plain torch's {plain_rms:.3g}"
