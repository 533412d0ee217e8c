"""Timing on an NVIDIA GPU: CUDA graphs between device events, over inputs that the L2 cache has forgotten.

A candidate is a list of calls, one for each set of inputs in turn. They are captured into one graph, so that launching
costs the host nothing, and the graph is timed by events on the device.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Run = Callable[[], object]
Item = TypeVar("Item")

MAX_SETS = 256  # of inputs so small that even these stay in the cache, as they would in a network
CALLS = 20  # in one graph, at least: the event and the launch at its start, a few µs, are shared by that many


def sets_past_cache(set_bytes: int, cache_bytes: int) -> int:
    """How many sets of inputs, used in turn: between two uses of one, twice the cache's size of others is read."""
    return min(1 - (-2 * cache_bytes // max(set_bytes, 1)), MAX_SETS)


def rotation(sets: Sequence[Item], calls: int = CALLS) -> list[Item]:
    """Every set once, in order, and again until there are at least ``calls`` of them; each equally often."""
    return list(sets) * -(-calls // len(sets))


def cache_bytes() -> int:
    """The size of the current GPU's L2 cache."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def captured(calls: Sequence[Run]) -> Run:
    """The calls as one CUDA graph; warmed up on a side stream first, as capture asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def device_clock(run: Run) -> float:
    """Seconds on the device between the start and the end of one run."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * float(start.elapsed_time(end))
