"""The self-attention block against the copied eager module, SDPA and torch.compile; by default at ResNet-50's stages.

    python benchmarks/attention_bench.py
    python benchmarks/attention_bench.py --shapes stage3 8x512x24x8:64 --dtypes fp32 bf16 --threads 1 2
    python benchmarks/attention_bench.py --rivals eager compile --csv runs/attention.csv --plot runs/attention.png
    python benchmarks/attention_bench.py --dtypes fp32 bf16 --isa avx512_bf16
    python benchmarks/attention_bench.py --logits 30
    python benchmarks/attention_bench.py --targets

The candidates take turns; times are medians, "± %" half the distance of the quartiles. Operations are counted as
2BN(4Cd + 2Nd) forward and three times that for forward + backward. "of mm" is the share of the rate of torch's own
2048³ product in the same dtype and rounds, "/ ours" a rival's time over ours, "peak MB" the extra memory at the worst
moment (10⁶ bytes, results included, inputs not; see peak_memory.py). On a GPU: CUDA graphs between device events,
inputs rotated past the L2 cache, and "of copy", the share of the rate of a copy in device memory for the bytes that
any implementation must move. Before anything is timed, every rival must agree with ours in the output and all
gradients, and the dispatcher's record must name one backend.

--logits 30 is the block as it stands in a network that trains: rows of the map are nearly one-hot, and many of their
numbers are below float32's smallest normal one, which Intel's processors multiply slowly.
"""

import argparse
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NoReturn

import cuda_timing
import torch
from attention_measure import PASS_NAMES, Traced, measure, note, write_trace
from attention_report import Row, plot, table, threads, write_csv
from attention_settings import DTYPES, FORMATS, STAGES, Setting, parse_shape, rivals_on
from attention_targets import target_table, targets

from sabmn_ext import _native
from sabmn_ext.ops import dispatch

PLOTS = (".png", ".pdf", ".svg")


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
    add(
        "--formats",
        nargs="+",
        choices=list(FORMATS),
        default=["contiguous"],
        metavar="FORMAT",
        help="contiguous (default), channels_last",
    )
    add("--passes", choices=list(PASS_NAMES), default="both", help="training is forward + backward (default both)")
    add("--threads", type=int, nargs="+", metavar="N", help="one after another (default: torch's own number)")
    add("--rivals", nargs="*", metavar="RIVAL", help="eager, sdpa-…, compile (default: all of the device but compile)")
    add("--form", choices=["paper", "gan"], default="paper", help="gan: biases, C value channels, no output projection")
    add("--logits", type=float, metavar="STD", help="scale the query for logits of this standard deviation")
    add("--backend", choices=["auto", *dispatch.BACKENDS], default="auto", help="of ours")
    add("--isa", metavar="NAME", help="instruction set of ours on a CPU: baseline, avx2, avx512, avx512_bf16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--matmul-precision", choices=["highest", "high", "medium"], help="torch.set_float32_matmul_precision")
    add("--rounds", type=int, metavar="N", help="of every comparison (default 15, fewer at the --limit)")
    add("--seconds", type=float, default=2.0, help="more rounds as long as a comparison has taken less (default 2)")
    add("--limit", type=float, metavar="SECONDS", help="of the whole run, kept by giving up rounds "
        "(default 20 a setting and dtype; none with --rounds or --targets)")  # fmt: skip
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
    if options.isa is not None:
        if _native.module is None:
            parser.error(f"--isa names a form of the native module, but {_native.missing_reason}")
        try:
            _native.module.set_isa(options.isa)
        except ValueError as error:
            parser.error(str(error))
    if options.batch is None:
        options.batch = 64 if on_gpu else 4
    if options.dtypes is None:
        options.dtypes = ["fp32", "bf16"] if options.targets and torch.cpu._is_avx512_bf16_supported() else ["fp32"]
    if options.limit is None:
        settings = len(options.shapes) * len(options.formats) * len(options.threads or [1]) * len(options.dtypes)
        options.limit = math.inf if options.rounds or options.targets else 20 * settings
    options.rounds = 15 if options.rounds is None else options.rounds
    if options.threads is None:
        options.threads = [1, 2] if options.targets else [torch.get_num_threads()]
    available = rivals_on(options.device)
    if options.rivals is None:
        options.rivals = available[:-1]
    for rival in options.rivals:
        if rival not in available:
            parser.error(f"rival '{rival}' is not there on {options.device}; expected some of {', '.join(available)}")
    if options.logits is not None and not 0 < options.logits < math.inf:
        parser.error(f"--logits is {options.logits}; expected a standard deviation above 0")
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
    if options.plot is not None and options.plot.suffix not in PLOTS:
        parser.error(f"--plot is '{options.plot}'; expected a name that ends in {', '.join(PLOTS)}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed; run: pip install matplotlib")
    return options


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    for count, memory_format, shape in product(options.threads, options.formats, options.shapes):
        yield Setting(shape, memory_format, count, options.device, options.form, options.backend, options.logits)


def machine(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        launch = "call by call" if options.no_graph else "CUDA graphs"
        name = f"{torch.cuda.get_device_name()}, {launch}, L2 cache {cuda_timing.cache_bytes() / 1e6:.0f} MB"
    else:
        ours = f", ours {_native.module.isa()}" if _native.module else ""
        name = f"CPU ({torch.backends.cpu.get_cpu_capability()}{ours}), {os.cpu_count()} processors"
    return f"torch {torch.__version__}, {name}, float32 products: {torch.get_float32_matmul_precision()}"


def main(arguments: list[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.matmul_precision:
        torch.set_float32_matmul_precision(options.matmul_precision)
    # By default cuDNN's convolutions, which are the rivals' projections, take TF32 where matrix products do not.
    torch.backends.cudnn.allow_tf32 = torch.get_float32_matmul_precision() != "highest"
    print(machine(options))
    rows: list[Row] = []
    traced: list[Traced] = []
    plan, start = list(settings(options)), time.perf_counter()
    for i, setting in enumerate(plan, start=1):
        shape, elapsed = setting.shape, time.perf_counter() - start
        note(f"[{i}/{len(plan)}, {elapsed:.0f} s] {shape.name}, {setting.memory_format}, {threads(setting.threads)}")
        found = measure(setting, options, start + options.limit, traced)
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
        write_trace(traced, options)
    note(f"done in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
