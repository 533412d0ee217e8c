"""The processes that train together: those that torchrun started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from sabmn_ext.retrieval.shards import Alone, Shards

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """This process's place among ``size``. All of them call the methods, ``part`` aside, in the same order."""

    exchange: Alone
    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    group: Any = None

    def run(self, step: Callable[[], T]) -> T:
        """The result of ``step``; if it fails in one process, all of them raise."""
        return self.exchange.run(step)

    def first(self, step: Callable[[], T]) -> T:
        """The result of ``step``, which the other processes begin when the first one has done it."""
        result = self.run(step) if self.rank == 0 else self.run(lambda: None)
        return self.run((lambda: result) if self.rank == 0 else step)  # type: ignore[return-value, arg-type]

    def largest(self, *numbers: int) -> list[int]:
        """The largest value that any process gives, in each place."""
        given = np.array(numbers, np.int64)
        return np.max(self.exchange.gather(given), axis=0).tolist()

    def text_of_first(self, text: str) -> str:
        return self.exchange.gather(np.frombuffer(text.encode(), np.uint8).copy())[0].tobytes().decode()

    def part(self, count: int, batch: int) -> range:
        """This process's share of ``count`` items: consecutive, and whole batches as one process would make them."""
        batches = -(-count // batch)
        first, end = (min(count, batch * (rank * batches // self.size)) for rank in (self.rank, self.rank + 1))
        return range(first, end)

    def copy_buffers(self, model: nn.Module) -> None:
        """Give every process the first one's buffers: statistics of batch norms follow each process's own images."""
        if self.group is not None:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0, group=self.group)


ALONE = Job(Alone())


@contextmanager
def joined() -> Iterator[Job]:
    """The job that torchrun's environment variables tell of; this process alone where there are none."""
    size = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist
    import torch.distributed.nn.functional  # its functions would keep a group that is there before them for ever

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if gpus := torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus and dist.is_nccl_available() else "gloo")
    group = dist.group.WORLD
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    yield Job(Shards(group), dist.get_rank(), size, local_rank, local_size, group)
    dist.destroy_process_group()  # not after an error: another process may be gone, and it would be waited for


def is_lost(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached; torch has no type of its own for gloo's."""
    words = ("gloo", "NCCL", "Connection closed", "Connection reset", "another process of the evaluation")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)
