"""What attention_bench.py measures: the shapes, the block and its rivals with the same weights, the two passes.

The rivals compute the block's formula, y = γ·a + x, from the same parameters: as it is usually copied (convolutions,
two batched products, a softmax), that under torch.compile, and on torch's scaled_dot_product_attention.
"""

import copy
import re
import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

import sabmn_ext
from sabmn_ext.ops import dispatch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD, TRAINING = "forward", "forward + backward"
PASSES = (FORWARD, TRAINING)
SDPA_BACKENDS = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
STAGES = {"stage1": (256, 64, 32), "stage2": (512, 32, 16), "stage3": (1024, 16, 8), "stage4": (2048, 16, 8)}  # C, H, W


def rivals_on(device: str) -> list[str]:
    """The rivals that the device has; the last one, torch.compile, takes long to start."""
    sdpa = list(SDPA_BACKENDS) if device.startswith("cuda") else ["sdpa-math", "sdpa-flash"]
    return ["eager", *sdpa, "compile"]


class Shape(NamedTuple):
    """x is [batch, channels, height, width]; query and key have ``reduced`` channels."""

    name: str
    batch: int
    channels: int
    height: int
    width: int
    reduced: int

    @property
    def positions(self) -> int:
        return self.height * self.width

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.positions


def parse_shape(text: str, batch: int) -> Shape:
    """``stage1`` … ``stage4`` (ResNet-50's at 256×128 pixels, with ``batch`` images) or ``BxCxHxW[:d]``, d = C/8."""
    if text in STAGES:
        channels, height, width = STAGES[text]
        return Shape(text, batch, channels, height, width, channels // 8)
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)(?::(\d+))?", text)
    if match is None:
        raise ValueError(f"shape '{text}' is unknown; expected stage1, stage2, stage3, stage4 or BxCxHxW[:d]")
    b, channels, height, width = (int(part) for part in match.groups()[:4])
    reduced = int(match[5]) if match[5] else channels // 8
    if min(b, channels, height, width, reduced) < 1 or channels % reduced:
        raise ValueError(f"shape '{text}' cannot be; expected sizes of at least 1 and a d that divides C (default C/8)")
    return Shape(text, b, channels, height, width, reduced)


def operations(shape: Shape, form: str, pass_: str) -> int:
    """Multiplications and additions: 2BN(4Cd + 2Nd) forward, three times that for both; recomputation is not counted.

    The copied module's form has C value channels and no output projection: 2BN(2Cd + C² + N(d + C)).
    """
    _, batch, channels, _, _, d = shape
    n = shape.positions
    forward = 4 * channels * d + 2 * n * d if form == "paper" else 2 * channels * d + channels**2 + n * (d + channels)
    return 2 * batch * n * forward * (1 if pass_ == FORWARD else 3)


def floor_bytes(shape: Shape, pass_: str, dtype: str) -> int:
    """What any implementation must move: x in and y out; the backward pass x and dy in, dx out."""
    return shape.elements * DTYPES[dtype].itemsize * (2 if pass_ == FORWARD else 5)


# ---- the block and its rivals ----


class Eager(nn.Module):
    """The block as it is usually written."""

    def __init__(self, block: sabmn_ext.SelfAttention2d) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)

    def forward(self, x: Tensor) -> Tensor:
        b, (batch, _, height, width) = self.block, x.shape
        query, key, value = (layer(x).flatten(2) for layer in (b.query, b.key, b.value))  # [B, d, N]
        attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)  # [B, N, N]
        out = torch.bmm(value, attention.transpose(1, 2)).view(batch, -1, height, width)
        return b.gamma * (out if b.out is None else b.out(out)) + x


class Sdpa(Eager):
    """On scaled_dot_product_attention with scale 1, with the projections that suit it best.

    The fused backends want rows of channels side by side, [B, N, d]. A product gives them that from either memory
    format; a convolution and a copy take longer.
    """

    def __init__(self, block: sabmn_ext.SelfAttention2d, backend: SDPBackend) -> None:
        super().__init__(block)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        b, tokens = self.block, x.flatten(2).mT  # [B, N, C]
        query, key, value = (_project(tokens, layer).unsqueeze(1) for layer in (b.query, b.key, b.value))
        with sdpa_kernel(self.backend):
            out = functional.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)  # [B, N, d]
        if b.out is not None and tokens.is_contiguous():
            out = _project(out, b.out)
        elif b.out is not None:
            out = torch.bmm(b.out.weight.flatten(1).expand(len(x), -1, -1), out.mT).mT
            out = out if b.out.bias is None else out + b.out.bias
        return b.gamma * out.mT.unflatten(2, x.shape[2:]) + x


def _project(tokens: Tensor, layer: nn.Conv2d) -> Tensor:
    """[B, N, C] → [B, N, d], without a copy of tokens that are not contiguous."""
    weight = layer.weight.flatten(1)
    if tokens.is_contiguous():
        return functional.linear(tokens, weight, layer.bias)
    product = torch.bmm(tokens, weight.mT.expand(len(tokens), -1, -1))
    return product if layer.bias is None else product + layer.bias


def candidate(name: str, block: sabmn_ext.SelfAttention2d) -> nn.Module:
    """The module called ``name``, with the block's weights."""
    if name == "ours":
        return block
    if name == "compile":
        return torch.compile(Eager(block), fullgraph=True, dynamic=False)  # type: ignore[return-value]
    return Eager(block) if name == "eager" else Sdpa(block, SDPA_BACKENDS[name])


# ---- one case ----


class Setting(NamedTuple):
    """All that the candidates of one comparison share, but for the dtype."""

    shape: Shape
    memory_format: str
    threads: int
    device: str
    form: str
    backend: str
    logits: float | None = None  # their standard deviation, where the weights' initialisation does not say


@dataclass
class Case:
    """One setting in one dtype: the block, and inputs (x, grad_y), each [B, C, H, W], one set or several."""

    block: sabmn_ext.SelfAttention2d
    inputs: list[tuple[Tensor, Tensor]]


def draw(setting: Setting, dtype: str, sets: int = 1) -> Case:
    """The same weights and inputs every time; γ is drawn from ±[0.5, 2], since at 0 the block is the identity."""
    shape, generator = setting.shape, torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    gan = {"out_proj": False, "bias": True} if setting.form == "gan" else {}
    backend = None if setting.backend == "auto" else setting.backend
    block = sabmn_ext.SelfAttention2d(shape.channels, shape.channels // shape.reduced, backend=backend, **gan)
    sign = -1 if torch.rand((), generator=generator) < 0.5 else 1
    nn.init.constant_(block.gamma, sign * (0.5 + 1.5 * torch.rand((), generator=generator).item()))
    block.to(setting.device, DTYPES[dtype])

    def image() -> Tensor:
        size = (shape.batch, shape.channels, shape.height, shape.width)
        drawn = torch.randn(size, generator=generator).to(setting.device, DTYPES[dtype])
        return drawn.contiguous(memory_format=FORMATS[setting.memory_format])

    inputs = [(image().requires_grad_(), image()) for _ in range(sets)]
    if setting.logits is not None:
        scale_logits(block, inputs[0][0][:1], setting.logits)
    return Case(block, inputs)


@torch.no_grad()
def scale_logits(block: sabmn_ext.SelfAttention2d, x: Tensor, deviation: float) -> None:
    """Scales the query so that x's logits have this standard deviation."""
    query, key = (layer(x).flatten(2).float() for layer in (block.query, block.key))
    factor = deviation / (query.mT @ key).std()
    for parameter in block.query.parameters():
        parameter.mul_(factor)


def forward_pass(module: nn.Module, x: Tensor, grad_y: Tensor) -> None:
    with torch.no_grad():
        module(x)


def training_pass(module: nn.Module, x: Tensor, grad_y: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(module(x), [x, *module.parameters()], grad_y)


def calls(case: Case, module: nn.Module, pass_: str) -> list[partial[object]]:
    """The pass over each set of inputs."""
    run = forward_pass if pass_ == FORWARD else training_pass
    return [partial(run, module, x, grad_y) for x, grad_y in case.inputs]


def backend_that_ran(case: Case, pass_: str, asked: str) -> str:
    """The backend that the dispatcher recorded for our block in this pass; all its calls must have had the same."""
    with dispatch.record() as recorded:
        calls(case, case.block, pass_)[0]()
    expected = ["attention_forward"] + ["attention_backward"] * (pass_ == TRAINING)
    backend = recorded[0][1] if recorded and asked == "auto" else asked
    if recorded != [(operation, backend) for operation in expected]:
        raise AssertionError(f"the {pass_} pass ran {recorded}; expected {expected} on one backend, {asked}")
    return backend


# ---- agreement ----


def disagreement(case: Case, module: nn.Module) -> dict[str, float]:
    """How far the module's results are from our block's, ‖theirs − ours‖ / ‖ours‖, for y and every gradient.

    Of y and of x's gradient the residual is taken away first, which would hide the rest; where what is left is so
    small that it is lost in their rounding, they are held against that. γ's gradient is one number, a sum of products
    dy·a that may cancel: it is held against ‖a‖. A key bias cancels in the softmax; its gradient is rounding alone, and
    left out.
    """
    x, grad_y = case.inputs[0]
    names = ["x", *(name for name, _ in case.block.named_parameters())]
    eps = torch.finfo(x.dtype).eps
    results = []
    for m in (case.block, module):
        with torch.no_grad():
            y = m(x)
        results.append([y, *training_pass(m, x, grad_y)])
    attention = (results[0][0].double() - x.detach().double()).norm().item() / abs(case.block.gamma.item())
    found = {}
    for name, our, their in zip(["y", *names], *results, strict=True):
        if name == "key.bias":
            continue
        residual = {"y": x.detach(), "x": grad_y}.get(name, torch.zeros_like(our)).double()
        scale = max((our.double() - residual).norm().item(), eps**0.5 * residual.norm().item())
        scale = attention if name == "gamma" else scale
        difference = (their.double() - our.double()).norm().item()
        found[name if name == "y" else f"the gradient of {name}"] = difference / scale if difference else 0.0
    return found


def tolerance(dtype: str) -> float:
    """Half of a dtype's digits: 3e-4 in fp32, 0.03 in fp16, 0.09 in bf16, where rivals round the N×N map. In fp32 those
    of the products, where they are allowed to be less precise."""
    eps = torch.finfo(DTYPES[dtype]).eps
    if dtype == "fp32":
        eps = {"high": 2**-10, "medium": 2**-7}.get(torch.get_float32_matmul_precision(), eps)
    return float(eps**0.5)


def check_agreement(case: Case, module: nn.Module, dtype: str, name: str) -> float:
    """The largest disagreement; an error where it is more than rounding."""
    with warnings.catch_warnings():  # torch warns why a backend of SDPA cannot serve, and then says it in the error
        warnings.simplefilter("ignore")
        found = disagreement(case, module)
    what, worst = max(found.items(), key=lambda item: item[1] if item[1] == item[1] else float("inf"))
    if not worst <= tolerance(dtype):
        raise AssertionError(
            f"{name} and ours disagree in {dtype}: {what} differs by {worst:.1e} of its norm, "
            f"allowed {tolerance(dtype):.1e}"
        )
    return worst
