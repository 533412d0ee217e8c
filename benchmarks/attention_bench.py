"""The self-attention block against the copied eager module, SDPA and torch.compile; by default at ResNet-50's stages.

    python benchmarks/attention_bench.py
    python benchmarks/attention_bench.py --shapes stage3 8x512x24x8:64 --dtypes fp32 bf16 --threads 1 2
    python benchmarks/attention_bench.py --rivals eager compile --csv runs/attention.csv --plot runs/attention.png
    python benchmarks/attention_bench.py --targets

The candidates take turns; times are medians. Operations are counted as 2BN(4Cd + 2Nd) forward and three times that for
forward + backward. "of mm" is the share of the rate of torch's own 2048³ product in the same dtype and rounds, "/ ours"
a rival's time over ours, "peak MB" the extra memory at the worst moment (10⁶ bytes, results included, inputs not; see
peak_memory.py). On a GPU: CUDA graphs between device events, inputs rotated past the L2 cache, and "of copy", the share
of the rate of a copy in device memory for the bytes that any implementation must move. Before anything is timed, every
rival must agree with ours in the output and all gradients, and the dispatcher's record must name one backend.
"""

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import NoReturn

import cuda_timing
import torch
from attention_cases import (
    DTYPES,
    FORMATS,
    FORWARD,
    PASSES,
    STAGES,
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
    parse_shape,
    rivals_on,
)
from attention_report import Row, plot, table, threads, write_csv
from attention_targets import target_table, targets
from peak_memory import fresh_process, peak_bytes
from timing import Run, sgemm, synchronize, timed, wall_clock
from torch import nn

from sabmn_ext.ops import dispatch

MM_SIZE = 2048
COPY_BYTES = 1 << 30  # read and written by the copy whose rate is the ceiling of device memory
PASS_NAMES = {"forward": [FORWARD], "training": [TRAINING], "both": list(PASSES)}
Key = tuple[str, str]  # dtype, candidate


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options, checked before minutes are spent: a mistake is one line on stderr and status 2."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--shapes", nargs="+", default=list(STAGES), metavar="SHAPE", help="stage1 … stage4, or BxCxHxW[:d] (d = C/8)")
    add("--batch", type=int, metavar="B", help="images at the stages (default 4; on a GPU 64)")
    add("--dtypes", nargs="+", choices=list(DTYPES), metavar="DTYPE", help=f"of {', '.join(DTYPES)} (default fp32)")
    add("--formats", nargs="+", choices=list(FORMATS), default=["contiguous"], metavar="FORMAT", help="channels_last")
    add("--passes", choices=list(PASS_NAMES), default="both", help="training is forward + backward (default both)")
    add("--threads", type=int, nargs="+", metavar="N", help="one after another (default: torch's own number)")
    add("--rivals", nargs="*", metavar="RIVAL", help="eager, sdpa-…, compile (default: all of the device but compile)")
    add("--form", choices=["paper", "gan"], default="paper", help="gan: biases, C value channels, no output projection")
    add("--backend", choices=["auto", *dispatch.BACKENDS], default="auto", help="of ours")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--matmul-precision", choices=["highest", "high", "medium"], help="torch.set_float32_matmul_precision")
    add("--rounds", type=int, default=15, help="at least so many (default 15)")
    add("--seconds", type=float, default=2.0, help="more rounds as long as a comparison has taken less (default 2)")
    add("--no-graph", action="store_true", help="on a GPU: launch call by call, with no CUDA graph")
    add("--no-memory", action="store_true", help="leave peak memory out")
    add("--targets", action="store_true", help="hold a CPU run, fp32 and bf16, one thread and two, against our targets")
    add("--csv", type=Path, metavar="FILE")
    add("--plot", type=Path, metavar="FILE.png", help="needs matplotlib")
    add("--profile", type=Path, metavar="FILE.json", help="a trace of one call of each, for Perfetto")
    options = parser.parse_args(arguments)

    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device here; expected cpu")
    if options.targets and on_gpu:
        parser.error("--targets are those of a CPU; expected --device cpu")
    if options.batch is None:
        options.batch = 64 if on_gpu else 4
    if options.dtypes is None:
        options.dtypes = ["fp32", "bf16"] if options.targets and torch.cpu._is_avx512_bf16_supported() else ["fp32"]
    if options.threads is None:
        options.threads = [1, 2] if options.targets else [torch.get_num_threads()]
    available = rivals_on(options.device)
    if options.rivals is None:
        options.rivals = available[:-1]
    for rival in options.rivals:
        if rival not in available:
            parser.error(f"rival '{rival}' is not there on {options.device}; expected some of {', '.join(available)}")
    for name, least in (("batch", [options.batch]), ("threads", options.threads), ("rounds", [options.rounds])):
        if min(least) < 1:
            parser.error(f"--{name} is {min(least)}; expected at least 1")
    try:
        options.shapes = [parse_shape(text, options.batch) for text in options.shapes]
    except ValueError as error:
        parser.error(str(error))
    for path in (options.csv, options.plot, options.profile):
        if path is not None and not path.parent.is_dir():
            parser.error(f"'{path}' cannot be written: there is no folder '{path.parent}'")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed; run: pip install matplotlib")
    return options


def note(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    for count, memory_format, shape in product(options.threads, options.formats, options.shapes):
        yield Setting(shape, memory_format, count, options.device, options.form, options.backend)


def wanted(options: argparse.Namespace) -> list[Key]:
    """What is compared in one setting: ours and the rivals in every dtype; for the targets, bf16 of ours alone."""
    names = ["ours", *options.rivals]
    return [(d, n) for d in options.dtypes for n in names if n == "ours" or not (options.targets and d == "bf16")]


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


def measure(setting: Setting, options: argparse.Namespace, traced: list[tuple[Setting, str, Run]]) -> list[Row]:
    """The rows of one setting: each pass is one interleaved run of all dtypes and candidates. Adds to ``traced`` one
    call of each, with its label."""
    torch.set_num_threads(setting.threads)
    torch.compiler.reset()  # for these threads; and torch compiles a function for a few shapes only, then no more
    cases, modules = prepare(setting, wanted(options))
    passes = PASS_NAMES[options.passes]
    memory = {} if options.no_memory else peaks(setting, list(product(passes, modules)))
    rows = []
    for pass_ in passes:
        backends = {dtype: backend_that_ran(case, pass_, setting.backend) for dtype, case in cases.items()}
        runs = {key: calls(cases[key[0]], module, pass_) for key, module in modules.items()}
        traced += [(setting, f"{pass_} {' '.join(key)}", run[0]) for key, run in runs.items()]
        times, ceilings = time_them(runs, setting.device, options)
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
    runs: dict[Key, list[Run]], device: str, options: argparse.Namespace
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
    times = timed(launched, options.rounds, options.seconds, clock)
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


def write_trace(traced: list[tuple[Setting, str, Run]], path: Path) -> None:
    """One call of every candidate under its own label, and before it one to warm up (or to compile)."""
    with torch.profiler.profile() as profile:
        for setting, label, run in traced:
            torch.set_num_threads(setting.threads)
            torch.compiler.reset()
            where = f"{setting.shape.name} {setting.memory_format} {threads(setting.threads)}"
            for call in ("warm-up", f"{where}: {label}"):
                with torch.profiler.record_function(call):
                    run()
                    synchronize()
    profile.export_chrome_trace(str(path))


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        launch = "call by call" if options.no_graph else "CUDA graphs"
        name = f"{torch.cuda.get_device_name()}, {launch}, L2 cache {cuda_timing.cache_bytes() / 1e6:.0f} MB"
    else:
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} processors"
    return f"torch {torch.__version__}, {name}, float32 products: {torch.get_float32_matmul_precision()}"


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.matmul_precision:
        torch.set_float32_matmul_precision(options.matmul_precision)
    print(machine(options))
    rows: list[Row] = []
    traced: list[tuple[Setting, str, Run]] = []
    plan, start = list(settings(options)), time.perf_counter()
    for i, setting in enumerate(plan, start=1):
        shape, elapsed = setting.shape, time.perf_counter() - start
        note(f"[{i}/{len(plan)}, {elapsed:.0f} s] {shape.name}, {setting.memory_format}, {threads(setting.threads)}")
        found = measure(setting, options, traced)
        if not options.profile:
            traced.clear()  # and with it the tensors
        print(f"\n{table(found)}", flush=True)
        rows += found
    if options.targets:
        print(f"\n{target_table(targets(rows))}")
    if options.csv:
        write_csv(rows, options.csv)
    if options.plot:
        plot(rows, options.plot)
    if options.profile:
        write_trace(traced, options.profile)
    note(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
