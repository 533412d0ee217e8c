"""How attention_bench.py measures a setting: agreement first, then peak memory, then an interleaved run of each pass.

The options are those of attention_bench.py's command line.
"""

import argparse
import sys
import time
from itertools import product
from statistics import median, quantiles

import cuda_timing
import torch
from attention_report import Row, threads
from attention_settings import (
    DTYPES,
    FORWARD,
    PASSES,
    TRAINING,
    Case,
    Setting,
    backend_that_ran,
    calls,
    candidate,
    check_agreement,
    draw,
    floor_bytes,
    operations,
)
from peak_memory import fresh_process, peak_bytes
from timing import Run, sgemm, synchronize, timed, wall_clock
from torch import nn

MM_SIZE = 2048
COPY_BYTES = 1 << 30  # read and written by the copy whose rate is the ceiling of device memory
PASS_NAMES = {"forward": [FORWARD], "training": [TRAINING], "both": list(PASSES)}
Key = tuple[str, str]  # dtype, candidate
Traced = tuple[Setting, str, Run]  # a call and its label, for the trace


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def wanted(options: argparse.Namespace) -> list[Key]:
    """What is compared in one setting: ours and the rivals in every dtype; for the targets, bf16 of ours alone."""
    names = ["ours", *options.rivals]
    return [(d, n) for d in options.dtypes for n in names if n == "ours" or not (options.targets and d == "bf16")]


def use_threads(count: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(count)
    if "compile" in options.rivals:  # for so many threads; and torch compiles a function for a few settings, no more
        torch.compiler.reset()


def prepare(setting: Setting, keys: list[Key]) -> tuple[dict[str, Case], dict[Key, nn.Module]]:
    """The cases by dtype, and the candidates that can serve them and agree with ours."""
    sets = 1
    if setting.device == "cuda":
        bytes_ = 2 * setting.shape.elements * min(DTYPES[dtype].itemsize for dtype, _ in keys)
        sets = cuda_timing.sets_past_cache(bytes_, cuda_timing.cache_bytes())
    cases = {dtype: draw(setting, dtype, sets) for dtype in dict.fromkeys(dtype for dtype, _ in keys)}
    modules = {}
    for dtype, name in keys:
        module = candidate(name, cases[dtype].block)
        if name != "ours":
            try:
                worst = check_agreement(cases[dtype], module, dtype, name)
            except RuntimeError as error:  # a backend of SDPA that cannot serve this, a lack of memory, no compiler
                note(f"  {name} is left out in {dtype}: {str(error).strip().splitlines()[0]}")
                continue
            note(f"  {name} agrees with ours in {dtype}: the largest difference is {worst:.0e} of the norm")
        modules[dtype, name] = module
    return cases, modules


def measure(setting: Setting, options: argparse.Namespace, deadline: float, traced: list[Traced]) -> list[Row]:
    """The rows of one setting: each pass is one interleaved run of all dtypes and candidates.

    A run may take a third of the time that is left until ``deadline`` (of time.perf_counter). Adds to ``traced`` one
    call of each candidate, with its label.
    """
    use_threads(setting.threads, options)
    cases, modules = prepare(setting, wanted(options))
    passes = PASS_NAMES[options.passes]
    memory = {} if options.no_memory else peaks(setting, list(product(passes, modules)))
    rows = []
    for pass_ in passes:
        backends = {dtype: backend_that_ran(case, pass_, setting.backend) for dtype, case in cases.items()}
        runs = {key: calls(cases[key[0]], module, pass_) for key, module in modules.items()}
        traced += [(setting, f"{pass_} {' '.join(key)}", run[0]) for key, run in runs.items()]
        limit = max(deadline - time.perf_counter(), 0) / 3
        times, ceilings = time_them(runs, setting.device, limit, options)
        for (dtype, name), seconds in times.items():
            lower, middle, upper = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
            rate, ours = operations(setting.shape, setting.form, pass_) / middle, median(times[dtype, "ours"])
            floor = floor_bytes(setting.shape, pass_, dtype)
            rows.append(Row(
                *setting.shape, setting.form, setting.memory_format, setting.device, setting.threads, dtype, pass_,
                candidate=name, backend=backends[dtype] if name == "ours" else None, rounds=len(seconds),
                milliseconds=1e3 * middle, lower_quartile_ms=1e3 * lower, upper_quartile_ms=1e3 * upper,
                gflops=rate / 1e9, mm_gflops=ceilings[dtype] / 1e9, share_of_mm=rate / ceilings[dtype],
                share_of_copy=floor / ceilings["copy"] / middle if "copy" in ceilings else None,
                times_ours=None if name == "ours" else middle / ours,
                peak_bytes=memory.get((pass_, (dtype, name))),
            ))  # fmt: skip
    return rows


def time_them(
    runs: dict[Key, list[Run]], device: str, limit: float, options: argparse.Namespace
) -> tuple[dict[Key, list[float]], dict[str, float]]:
    """Seconds of one call of each candidate, round by round; and the ceilings: each dtype's product in operations a
    second, on a GPU the copy in bytes a second."""
    products = {dtype: sgemm(MM_SIZE, device, DTYPES[dtype]) for dtype, _ in runs}
    together: dict[Key, list[Run]] = runs | {(dtype, "mm"): [run] for dtype, run in products.items()}
    clock = wall_clock
    if device == "cuda":
        source, target = (torch.empty(COPY_BYTES // 2, dtype=torch.uint8, device=device) for _ in range(2))
        together["", "copy"] = [lambda: target.copy_(source)]
        together = {key: cuda_timing.rotation(run) for key, run in together.items()}
        clock = cuda_timing.device_clock
    launched = {}
    for key, run in together.items():
        try:
            launched[key] = one_run(run, graph=device == "cuda" and not options.no_graph)
        except torch.OutOfMemoryError as error:
            if key not in runs or key[1] == "ours":
                raise
            note(f"  {key[1]} is left out in {key[0]}: {str(error).splitlines()[0]}")
    times = timed(launched, options.rounds, options.seconds, limit, clock)
    times = {key: [second / len(together[key]) for second in seconds] for key, seconds in times.items()}
    ceilings = {dtype: 2 * MM_SIZE**3 / median(times[dtype, "mm"]) for dtype in products}
    if device == "cuda":
        ceilings["copy"] = COPY_BYTES / median(times["", "copy"])
    return {key: times[key] for key in runs if key in times}, ceilings


def one_run(together: list[Run], graph: bool) -> Run:
    if graph:
        return cuda_timing.captured(together)
    return together[0] if len(together) == 1 else lambda: [run() for run in together]


def peaks(setting: Setting, wanted: list[tuple[str, Key]]) -> dict[tuple[str, Key], int | None]:
    """Peak extra memory of each pass and candidate; on a CPU in a fresh process."""
    if setting.device == "cuda":
        return {(pass_, key): peak(setting, pass_, key) for pass_, key in wanted}
    with fresh_process() as process:
        return {(pass_, key): process.submit(peak, setting, pass_, key).result() for pass_, key in wanted}


def peak(setting: Setting, pass_: str, key: Key) -> int | None:
    torch.set_num_threads(setting.threads)
    case = draw(setting, key[0])
    return peak_bytes(calls(case, candidate(key[1], case.block), pass_)[0], setting.device)


def write_trace(traced: list[Traced], options: argparse.Namespace) -> None:
    """One call of every candidate under its own label, and before it one to warm up (or to compile)."""
    with torch.profiler.profile() as profile:
        for setting, label, run in traced:
            use_threads(setting.threads, options)
            where = f"{setting.shape.name} {setting.memory_format} {threads(setting.threads)}"
            for call in ("warm-up", f"{where}: {label}"):
                with torch.profiler.record_function(call):
                    run()
                    synchronize()
    profile.export_chrome_trace(str(options.profile))
