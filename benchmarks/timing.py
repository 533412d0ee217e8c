"""Timing on a noisy machine: the candidates take turns, each call is timed, medians are compared within the run."""

import math
import random
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import torch

Run = Callable[[], object]
Name = TypeVar("Name")

MIN_ROUNDS = 3


def interleaved(candidates: dict[Name, Run], rounds: int) -> dict[Name, float]:
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
    candidates: dict[Name, Run],
    rounds: int,
    seconds: float = 0,
    limit: float = math.inf,
    clock: Callable[[Run], float] = wall_clock,
) -> dict[Name, list[float]]:
    """The seconds of every call: ``rounds`` rounds, and more while they have taken less than ``seconds``; fewer, but
    ``MIN_ROUNDS``, where they take more than ``limit`` seconds.

    The order within a round is drawn anew each time, so that nobody always finds the cache as the same one left it.
    """
    for run in candidates.values():
        clock(run)
    order = random.Random(0)
    times: dict[Name, list[float]] = {name: [] for name in candidates}
    start, done, elapsed = time.perf_counter(), 0, 0.0
    while done < min(rounds, MIN_ROUNDS) or (elapsed < limit and (done < rounds or elapsed < seconds)):
        for name in order.sample(list(candidates), len(candidates)):
            times[name].append(clock(candidates[name]))
        done, elapsed = done + 1, time.perf_counter() - start
    return times


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sgemm(size: int, device: str, dtype: torch.dtype) -> Run:
    """torch's own matrix product of size³, as the ceiling: 2·size³ operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)
