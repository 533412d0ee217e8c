"""Timing on a noisy machine: the candidates take turns, each call is timed, medians are compared within the run."""

import random
import time
from collections.abc import Callable
from statistics import median

import torch

Run = Callable[[], object]


def interleaved(candidates: dict[str, Run], rounds: int) -> dict[str, float]:
    """The median seconds of each candidate over ``rounds`` rounds, in which every one runs once; one warm-up each."""
    return {name: median(values) for name, values in timed(candidates, rounds).items()}


def wall_clock(run: Run) -> float:
    """Seconds of one call, the device's work included."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def timed(
    candidates: dict[str, Run], rounds: int, seconds: float = 0, clock: Callable[[Run], float] = wall_clock
) -> dict[str, list[float]]:
    """The seconds of every call: at least ``rounds`` rounds, and more while they have taken less than ``seconds``.

    The order within a round is drawn anew each time, so that nobody always finds the cache as the same one left it.
    """
    for run in candidates.values():
        run()
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - start < seconds:
        for name in order.sample(list(candidates), len(candidates)):
            times[name].append(clock(candidates[name]))
        done += 1
    return times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sgemm(size: int, device: str, dtype: torch.dtype) -> Run:
    """torch's own matrix product of size³, as the ceiling: 2·size³ operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)
