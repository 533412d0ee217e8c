"""Whether a kernel without a schema may serve a call: one of plain tensors, that nobody looks into."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_PLAIN = (Tensor, nn.Parameter)


def why_not_plain(x: Tensor, *others: Tensor | None) -> str | None:
    """Why not, for operations that torch's transformations, modes and tracers do not know; None where it may.

    ``x`` and the others, where there are any, must be plain tensors on x's device. Whether a compiler is at work is to
    be asked before: what stands here cannot be compiled.
    """
    if torch._C._get_tracing_state() is not None:
        return "the call is being traced"
    if torch._C._functorch.peek_interpreter_stack() is not None or torch._C._len_torch_dispatch_stack():
        return "a transformation of torch.func or a dispatch mode is at work"
    if forward_ad._current_level >= 0:
        return "it has no derivative in forward mode"
    for tensor in (x, *others):
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.device != x.device):
            return f"it takes plain tensors on {x.device}, not {type(tensor).__name__} on {tensor.device}"
    return None
