"""A call of known peak memory, in a module of its own: a fresh process must be able to import it."""

import torch
from peak_memory import peak_bytes


def peak_of_two_blocks(megabytes: int) -> int | None:
    """The peak of a call that holds two blocks at once, and before that one as long as both."""
    return peak_bytes(lambda: _two_blocks(megabytes << 20))


def _two_blocks(size: int) -> None:
    first = torch.zeros(size, dtype=torch.uint8)
    del first
    second, third = (torch.ones(size // 2, dtype=torch.uint8) for _ in range(2))
    second.add_(third)
