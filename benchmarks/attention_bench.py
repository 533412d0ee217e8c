"""The self-attention block against the copied eager module and an SDPA-based one, at ResNet-50's four stages.

    python benchmarks/attention_bench.py [--stages 1 2 3 4] [--batch 4] [--threads N] [--device cuda] [--profile FILE]

Operations are counted as 2BN(4Cd + 2Nd) forward and three times that for forward + backward; "of mm" is the share of
the rate of torch's own 2048³ product, measured in the same run. γ is 0.7: at 0 the block would be the identity.
"""

import argparse
import copy
from functools import partial

import torch
from timing import interleaved, sgemm
from torch import Tensor, nn
from torch.nn import functional

import sabmn_ext
from sabmn_ext.ops import dispatch

STAGES = {1: (64, 32, 256), 2: (32, 16, 512), 3: (16, 8, 1024), 4: (16, 8, 2048)}  # H, W, C for 256×128 pixels
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class Eager(nn.Module):
    """The block as it is usually written: convolutions, two batched products, softmax."""

    def __init__(self, block: sabmn_ext.SelfAttention2d) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attention = torch.softmax(query.transpose(1, 2) @ key, dim=-1)  # [B, N, N]
        return value @ attention.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        b = self.block
        query, key, value = (layer(x).flatten(2) for layer in (b.query, b.key, b.value))
        assert b.out is not None
        return b.gamma * b.out(self.attend(query, key, value).view(x.shape[0], -1, *x.shape[2:])) + x


class Sdpa(Eager):
    """The same with torch's scaled_dot_product_attention, scale 1."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2).unsqueeze(1) for t in (query, key, value))
        return functional.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(1).transpose(1, 2)


def forward_pass(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        module(x)


def training_pass(module: nn.Module, x: Tensor, grad_y: Tensor) -> None:
    torch.autograd.grad(module(x), [x, *module.parameters()], grad_y)


def measure(stage: int, options: argparse.Namespace) -> None:
    """Print a line for each pass of one stage."""
    dtype, (height, width, channels) = DTYPES[options.dtype], STAGES[stage]
    block = sabmn_ext.SelfAttention2d(channels).to(options.device, dtype)
    with torch.no_grad():
        block.gamma.fill_(0.7)
    modules = {"ours": block, "eager": Eager(block), "sdpa": Sdpa(block)}
    x = torch.randn(options.batch, channels, height, width, device=options.device, dtype=dtype)
    if options.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(block(x), modules["eager"](x), rtol=0.05, atol=0.05)
    x.requires_grad_()
    grad_y = torch.randn_like(x)

    positions, reduced = height * width, channels // 8
    operations = 2 * options.batch * positions * (4 * channels * reduced + 2 * positions * reduced)
    passes = {
        "forward": (1, {key: partial(forward_pass, module, x) for key, module in modules.items()}),
        "forward + backward": (3, {key: partial(training_pass, module, x, grad_y) for key, module in modules.items()}),
    }
    for name, (factor, runs) in passes.items():
        with dispatch.record() as calls:
            seconds = interleaved({**runs, "mm": sgemm(2048, options.device, dtype)}, options.rounds)
        rate, ceiling = factor * operations / seconds["ours"], 2 * 2048**3 / seconds["mm"]
        columns = [f"{1e3 * seconds[key]:>9.2f}" for key in modules]
        columns += [f"{seconds[key] / seconds['ours']:>8.2f}" for key in ("eager", "sdpa")]
        print(f"{stage:>5} {name:>18} {calls[0][1]:>8} {' '.join(columns)} {rate / 1e9:>7.1f} {rate / ceiling:>6.2f}")
    if options.profile:
        with torch.profiler.profile() as profile:
            for run in passes["forward + backward"][1].values():
                run()
        profile.export_chrome_trace(f"{options.profile}.stage{stage}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--profile", metavar="FILE", help="write a trace of one training pass of each, for each stage")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setting = f"{options.device}, {options.dtype}, {options.threads} threads, B = {options.batch}"
    print(f"torch {torch.__version__}, {setting}")
    print("stage               pass  backend   ours ms  eager ms   SDPA ms  x eager   x SDPA    GF/s  of mm")
    for stage in options.stages:
        measure(stage, options)


if __name__ == "__main__":
    main()
