"""Which gradients a backward pass may write over, because nothing else refers to them.

Autograd itself takes such a gradient over as ``.grad`` instead of copying it. Writing the result where the gradient
stood saves as much memory as the weights take, and a page fault for every 4 KB of it.
"""

import functools
import sys
from typing import Any

import torch
from torch import Tensor


def unshared(gradients: tuple[Tensor | None, ...]) -> list[bool]:
    """For each gradient that the ``backward`` of an autograd.Function was given, as ``*gradients``: may it be changed?

    Never while the backward pass is differentiated itself, nor inside torch.func: there, tensors share memory unseen.
    """
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None or not _can_count():
        return [False] * len(gradients)
    alone = _references_of_a_fresh_gradient()
    return [references == alone for references in _references(gradients)]


def _can_count() -> bool:
    counters = ("_storage_Use_Count", "_storage_address")
    return hasattr(Tensor, "_use_count") and all(hasattr(torch._C, name) for name in counters)


def _references(gradients: tuple[Tensor | None, ...]) -> list[tuple[int, int, int] | None]:
    """How many times each is referred to by Python, as a tensor by C++, and as memory by tensors.

    None for what is not a plain tensor on the CPU. A loop and no function for one of them: the call would refer to it.
    """
    found: list[tuple[int, int, int] | None] = []
    for gradient in gradients:
        if type(gradient) is Tensor and gradient.device.type == "cpu" and torch._C._has_storage(gradient):
            # Not by untyped_storage(): autograd adds to no gradient in place whose storage Python has once referred to.
            storage = torch._C._storage_Use_Count(torch._C._storage_address(gradient))  # type: ignore[attr-defined]
            found.append((sys.getrefcount(gradient), gradient._use_count(), storage))  # type: ignore[attr-defined]
        else:
            found.append(None)
    return found


@functools.lru_cache
def _references_of_a_fresh_gradient() -> tuple[int, int, int] | None:
    found: list[tuple[int, int, int] | None] = []

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            found.extend(_references(gradients))
            return gradients[0]

    with torch.enable_grad():
        (Probe.apply(torch.ones(1, requires_grad=True)) * 2).backward()  # the product makes a gradient of its own
    return found[0]
