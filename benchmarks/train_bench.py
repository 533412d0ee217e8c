"""A training step of the network: images a second against the same network written plainly, and where time goes.

    python benchmarks/train_bench.py [--data PATH] [--size 256x128] [--batch 8] [--threads N] [--rounds 3] [--compile]

Candidates take turns: ours as the trainer runs it by default (float32, channels_last, fused optimiser), the same in
NCHW, with bfloat16 autocast and, with --compile, through torch.compile, which takes minutes to start; and plain, NCHW
in float32 with the eager attention that is usually copied, torch's own spectral_norm, batch norm and ReLU and default
SGD. Each round is one step of each, from the images in memory to the new weights; the process keeps freed memory, as
the trainer's does, for the good of all of them. Then one step of each of ours, by the profiler: milliseconds of the
operations of each part, forward and backward; "the rest" is what no operation accounts for, Python mostly. About a
minute on two cores.
"""

import argparse
import copy
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch
from attention_settings import Eager
from timing import interleaved, wall_clock
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import sabmn_ext
from sabmn_ext.data import ImageDataset, TrainTransform, cache_images, load_data, train_batches
from sabmn_ext.host_memory import keep_freed_memory
from sabmn_ext.training.loop import train_step

# The first part whose words an operation's name has; the profiler's own time of each, without what it calls.
PARTS = {
    "attention": ("attention", "softmax", "SelfAttention"),
    "spectral norm": ("spectral_norm", "SpectralNorm"),
    "heads": ("addmm", "linear", "cross_entropy", "nll_loss", "dropout", "bernoulli"),
    "convolutions": ("conv", "Conv", "mkldnn", "aten::mm", "bmm"),  # wide 1×1 and 3×3 ones are products
    "batch norm": ("batch_norm", "BatchNorm"),
}
# Ranges, with all that they call: plain operations, which would be found under "other operations" otherwise.
RANGES = {"data": "data/", "optimiser": "Optimizer.step#SGD.step"}


class PlainBatchNorm(nn.BatchNorm2d):
    """torch's, which our operation takes the place of only where it is no subclass."""


def networks(backbone: str, classes: int) -> dict[str, nn.Module]:
    ours = sabmn_ext.SABMN(classes, backbone=backbone, weights="none", spectral_norm=False)
    nn.init.constant_(ours.attention.gamma, 0.1)
    plain = copy.deepcopy(ours)
    plain.attention = Eager(plain.attention)
    for module in list(plain.modules()):
        if isinstance(module, nn.Conv2d):
            parametrizations.spectral_norm(module)
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = PlainBatchNorm
    sabmn_ext.spectral_norm_model(ours, preserve_eval=False)
    last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    others = {name: copy.deepcopy(last) for name in ("ours, bf16", "ours, compiled")}
    return {"ours": last, "ours, NCHW": ours, **others, "plain": plain}


def stepper(name: str, network: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), 1e-3, 0.9, weight_decay=1e-5, fused=name != "plain" or None)
    model = torch.compile(network) if "compiled" in name else network
    precision = "bf16" if "bf16" in name else "fp32"

    def step() -> None:
        with torch.profiler.record_function("data/"):
            images, labels = next(batches)
        if name not in ("ours, NCHW", "plain"):
            images = images.contiguous(memory_format=torch.channels_last)
        # torch's version would run one power iteration for each reading of a weight
        with parametrize.cached() if name == "plain" else nullcontext():
            train_step(model, images, labels, optimizer, precision=precision)

    return step


def shares(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of one step, part by part."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        total = 1e3 * wall_clock(step)
    found = dict.fromkeys([*RANGES, *PARTS, "other operations"], 0.0)
    events = {event.key: event for event in profile.key_averages()}
    for key, event in events.items():
        part = next((part for part, words in PARTS.items() if any(word in key for word in words)), "other operations")
        found[part] += event.self_cpu_time_total / 1e3
    for part, key in RANGES.items():
        found[part] = events[key].cpu_time_total / 1e3
        found["other operations"] -= found[part]
    found["the rest"] = total - sum(found.values())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="demo")
    parser.add_argument("--size", default="256x128", help="HxW of the images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--compile", action="store_true", help="time torch.compile too")
    options = parser.parse_args()
    size = re.fullmatch(r"(\d+)x(\d+)", options.size)
    if not size:
        parser.error(f"--size {options.size}: expected HxW in pixels, such as 256x128")
    height, width = map(int, size.groups())
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    data = load_data(options.data)
    dataset = ImageDataset(data.train, data.train_labels(), height, width)
    cache_images(dataset, "ram")
    transform = TrainTransform(height, width)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            epoch += 1
            yield from train_batches(dataset, batch_size=options.batch, seed=0, epoch=epoch, transform=transform)

    made = networks(options.backbone, data.num_train_identities)
    if not options.compile:
        del made["ours, compiled"]
    steps = {name: stepper(name, network, batches()) for name, network in made.items()}
    times = interleaved(steps, options.rounds)
    print(f"{options.backbone}, batch {options.batch} of {height}×{width}, {options.threads} threads,", end=" ")
    print(f"torch {torch.__version__}")
    print(f"{'':28s}{'images/s':>10s}{'ms a step':>11s}{'plain / it':>12s}")
    for name, seconds in times.items():
        print(f"{name:28s}{options.batch / seconds:10.2f}{1e3 * seconds:11.0f}{times['plain'] / seconds:12.2f}")
    print("\nwhere a step's time goes, ms (%)")
    tables = {name: shares(step) for name, step in steps.items() if name != "plain"}
    print(f"{'':18s}" + "".join(f"{name:>28s}" for name in tables))
    for part in next(iter(tables.values())):
        cells = (f"{table[part]:.0f} ({table[part] / sum(table.values()):.0%})" for table in tables.values())
        print(f"{part:18s}" + "".join(f"{cell:>28s}" for cell in cells))


if __name__ == "__main__":
    main()
