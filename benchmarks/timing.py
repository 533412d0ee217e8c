"""Timing on a noisy machine: the candidates take turns, each call is timed, medians are compared within the run."""

import time
from collections.abc import Callable
from statistics import median

import torch


def interleaved(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each candidate over ``rounds`` rounds, in which every one runs once; one warm-up each."""
    for run in candidates.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            synchronize()
            start = time.perf_counter()
            run()
            synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def sgemm(size: int, device: str, dtype: torch.dtype) -> Callable[[], object]:
    """torch's own matrix product of size³, as the ceiling: 2·size³ operations."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.mm(a, b)
