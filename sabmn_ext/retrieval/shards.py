"""What processes exchange that each hold a part of the gallery: small arrays, never features."""

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")


class Alone:
    """One process with the whole gallery."""

    rank = 0

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        """The arrays of all processes, in rank order."""
        return [array]

    def add(self, array: np.ndarray) -> np.ndarray:
        """The sum of all processes' integer arrays, of one shape."""
        return array

    def run(self, step: Callable[[], T]) -> T:
        """The result of ``step``; if it fails in one process, all of them raise."""
        return step()


class Shards(Alone):
    """The processes of a ``torch.distributed`` group. A process that has ended is a RuntimeError in the others."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError("group: torch.distributed is not initialised; call init_process_group first")
        self.dist, self.group = dist, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: this process does not belong to it")
        self.device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"

    def gather(self, array: np.ndarray) -> list[np.ndarray]:
        own = torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        self._call(self.dist.all_gather, lengths, torch.tensor([len(own)], device=self.device))
        longest = max(int(length) for length in lengths)
        parts = [own.new_empty(longest) for _ in range(self.size)]
        self._call(self.dist.all_gather, parts, torch.cat((own, own.new_zeros(longest - len(own)))))
        return [part[: int(length)].cpu().numpy() for part, length in zip(parts, lengths, strict=True)]

    def add(self, array: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(array).to(self.device, copy=True)
        self._call(self.dist.all_reduce, total)
        return total.cpu().numpy()

    def run(self, step: Callable[[], T]) -> T:
        error: Exception | None = None
        try:
            result = step()
        except Exception as raised:
            error = raised
        message = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        messages = self.gather(np.frombuffer(message, np.uint8).copy())
        if error is not None:
            raise error
        for rank, text in enumerate(messages):
            if len(text):
                raise RuntimeError(f"process {rank} of {self.size} has failed: {text.tobytes().decode()}")
        return result

    def _call(self, collective: Callable[..., Any], *arguments: Any) -> None:
        try:
            collective(*arguments, group=self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size}: another process of the evaluation has ended or cannot be "
                f"reached ({str(error).splitlines()[0]})"
            ) from error
