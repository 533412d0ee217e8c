"""Whether 16 bits pay on this processor: a convolution is timed in them and in float32, when a run that asks begins."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLEAR = 1.1  # a smaller difference may be the machine's noise


def times_as_long(precision: str, rounds: int = 3) -> float:
    """A 3×3 convolution on the CPU, forward and backward, under autocast over the same in float32; the fastest of each.

    It is small, since float16 can take hundreds of times as long.
    """
    x = torch.randn(4, 64, 16, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    fastest = dict.fromkeys(("fp32", precision), float("inf"))
    for number in range(1 + rounds):
        for name in fastest:
            start = time.perf_counter()
            with torch.autocast("cpu", dtype=DTYPES[name], enabled=name != "fp32"):
                y = F.conv2d(x, weight, padding=1)
            torch.autograd.grad(y.float().sum(), (x, weight))
            if number > 0:  # the first round prepares the kernels
                fastest[name] = min(fastest[name], time.perf_counter() - start)
    return fastest[precision] / fastest["fp32"]


def slow_precision(precision: str, device: torch.device) -> str | None:
    """What to tell a user who asks for a precision that is slower than float32 here; None where there is nothing."""
    if precision == "fp32" or device.type != "cpu":
        return None
    ratio = times_as_long(precision)
    if ratio < CLEAR:
        return None
    return (
        f"run.precision = {precision}: on this processor a convolution takes {ratio:.1f} times as long in it as in"
        " float32 (timed just now); --precision fp32 is faster, and more exact"
    )
