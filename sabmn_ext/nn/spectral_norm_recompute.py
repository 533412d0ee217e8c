"""Spectral normalisation under gradient checkpointing: which u and v a recomputed forward may use.

Checkpointing runs a part of the forward again while a backward pass runs, and needs the weights of that forward once
more. They follow from u and v, as long as no later forward has changed these. Autograd numbers its nodes in the order
in which they are made, so the node that asks for a recomputation tells how old the forward is that it belongs to.
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def is_running() -> bool:
    """Whether a backward pass runs in this thread, and what is read now is recomputed; compiled code cannot tell."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Generation:
    """Which nodes of the graph belong to the forward that updated a layer's u and v last."""

    def __init__(self) -> None:
        self.first = 0  # they are numbered from here on
        self.ended = 0  # where the forward of that update ended
        self.region: Callable[[], Any] | None = None  # the checkpointed region that the update was made in

    def update(self) -> None:
        """u and v change: earlier nodes can no longer be recomputed."""
        region = _checkpointed_region()
        if region is not None and self.region is not None and self.region() is region:
            self.first = sys.maxsize  # one region with two updates: no u and v serve both
        elif self.region is None:
            # Not the present number: use_reentrant=True makes its node before it runs the forward.
            self.first = self.ended
        else:
            self.first = torch._C._autograd._get_sequence_nr()  # that region may go on behind the end of the forward
        self.region = None if region is None else weakref.ref(region)

    def end(self) -> None:
        self.ended = torch._C._autograd._get_sequence_nr()

    def check(self, name: str) -> None:
        """Raise a RuntimeError where the recomputation that runs now belongs to an earlier forward."""
        node = torch._C._current_autograd_node()
        if node is not None and node._sequence_nr() < self.first:
            raise RuntimeError(
                f"gradient checkpointing recomputes a forward that used {name}, but a later forward in train mode has "
                "changed its u and v since. Run the backward pass before the next forward, or do not checkpoint the "
                "normalised layers"
            )


def _checkpointed_region() -> Any:
    """What identifies the innermost region that ``checkpoint(use_reentrant=False)`` records now; None outside."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint" else None


def outside_of_checkpoints() -> AbstractContextManager[None]:
    """Inside this context autograd keeps the tensors that it saves away from saved-tensor hooks.

    Checkpointing counts the tensors that a region saves. A weight is normalised before the region in the forward and
    inside it in the recomputation.
    """
    if torch.compiler.is_compiling() or torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # autograd leaves this to the hooks
        raise RuntimeError("a weight was changed in place after the forward and before the backward pass that needs it")
    return tensor
