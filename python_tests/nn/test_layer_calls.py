"""A ResNet's layers by faster operations, where the modules are plain ones."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from instruction_sets import needs_native
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sabmn_ext
from sabmn_ext.nn.layer_calls import convolve
from sabmn_ext.nn.resnet import BasicBlock, Bottleneck, Downsample, ResNet
from sabmn_ext.ops import dispatch

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def block(kind: type[BasicBlock] | type[Bottleneck] = BasicBlock) -> nn.Module:
    width = 6 * kind.expansion
    made = kind(4, 6, 2, Downsample(nn.Conv2d(4, width, 1, 2, bias=False), nn.BatchNorm2d(width)))
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return made


@contextmanager
def plain_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, batch norms are torch's own operations."""
    monkeypatch.setenv("SABMN_BACKEND", "torch")
    yield
    monkeypatch.delenv("SABMN_BACKEND")


def fused(call: Callable[[], Any]) -> int:
    """In how many batch norms the kernel served."""
    with dispatch.record() as calls:
        call()
    return Counter(calls)["batch_norm_act_forward", "cpu"]


def same(ours: nn.Module, other: nn.Module, tolerance: float) -> None:
    for (name, mine), theirs in zip(ours.named_buffers(), other.buffers(), strict=True):
        assert (mine - theirs).double().norm() <= tolerance * theirs.double().norm(), name


@needs_native
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_a_training_step_is_that_of_the_plain_modules(
    architecture: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong residual or ReLU changes gradients by as much as they are; a ReLU that rounding turns, by a part."""
    ours = ResNet(architecture, last_stride=1).to(memory_format=FORMATS[form])
    for module in ours.modules():  # residuals as in a network that has been trained: else its depth amplifies rounding
        if isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.constant_((module.bn2 if isinstance(module, BasicBlock) else module.bn3).weight, 0.2)
    other = copy.deepcopy(ours)
    images = torch.randn(4, 3, 64, 64).contiguous(memory_format=FORMATS[form])
    direction = torch.randn(4, ours.channels[3], 4, 4)
    with dispatch.record() as calls:
        y = ours(images)
        y.backward(direction)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in ours.modules())
    passes = ("batch_norm_act_forward", "batch_norm_act_backward")
    expected_calls = {(name, "cpu"): norms for name in passes}
    if form == "channels_last":
        convolutions = [m for m in ours.modules() if isinstance(m, nn.Conv2d) and m.stride == (1, 1)]
        sizes = Counter(m.kernel_size[0] for m in convolutions)
        expected_calls |= {
            (f"conv{size}x{size}_{name}", "cpu"): sizes[size] for size in (1, 3) for name in ("forward", "backward")
        }
    assert Counter(calls) == expected_calls
    with plain_modules(monkeypatch):
        expected = other(images)
        expected.backward(direction)
    assert (y - expected).norm() <= 1e-4 * expected.norm()
    same(ours, other, 1e-4)
    for (name, mine), theirs in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 0.1 * theirs.grad.norm(), name


class Doubled(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def double(*arguments: Any) -> Tensor:
    return 2 * arguments[-1]  # type: ignore[no-any-return]


def replace_forward(norm: nn.Module) -> None:
    forward = norm.forward
    norm.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {  # and how many of the block's three the kernel still serves
    "nothing": (lambda b: None, 3),
    "forward hook": (lambda b: b.bn1.register_forward_hook(double), 2),
    "forward pre-hook": (lambda b: b.bn2.register_forward_pre_hook(lambda _, x: (2 * x[0] + 1,)), 2),
    "hook of the ReLU": (lambda b: b.relu.register_forward_hook(double), 1),
    "backward hook": (lambda b: b.bn2.register_full_backward_hook(lambda _, grads, __: (2 * grads[0],)), 2),
    "backward pre-hook": (lambda b: b.bn2.register_full_backward_pre_hook(lambda _, grads: (2 * grads[0],)), 2),
    "subclass": (lambda b: setattr(b, "bn1", Doubled(6)), 2),
    "forward": (lambda b: replace_forward(b.bn1), 2),
    "another activation": (lambda b: setattr(b, "relu", nn.LeakyReLU(0.5)), 1),
    "eval": (lambda b: b.eval(), 0),
    "frozen": (lambda b: b.bn2.eval(), 2),
    "float64": (lambda b: b.double(), 0),
}


@needs_native
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_do_what_they_did(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alter, served = CHANGES[change]
    ours = block()
    other = copy.deepcopy(ours)
    alter(ours)
    alter(other)
    dtype = next(ours.parameters()).dtype
    x = torch.randn(5, 4, 9, 7, dtype=dtype, requires_grad=True)
    found: list[Tensor] = []
    assert fused(lambda: found.append(ours(x))) == served
    (found_gradient,) = torch.autograd.grad(found[0].square().sum(), x)
    with plain_modules(monkeypatch):
        expected = other(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    assert torch.allclose(found[0], expected, atol=1e-4)
    assert (found_gradient - gradient).norm() <= 0.02 * gradient.norm()


@needs_native
def test_global_hooks_are_called() -> None:
    called: list[str] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    try:
        assert fused(lambda: block()(torch.randn(5, 4, 9, 7))) == 0
    finally:
        hook.remove()
    assert Counter(called)["BatchNorm2d"] == 3
    assert Counter(called)["ReLU"] == 2


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"momentum": 0.5}, {"track_running_stats": False}])
def test_running_statistics(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = block()
    ours.bn1, ours.bn2 = nn.BatchNorm2d(6, **options), nn.BatchNorm2d(6, affine=False, **options)
    other = copy.deepcopy(ours)
    for _ in range(3):
        x = torch.randn(5, 4, 9, 7)
        ours(x)
        with plain_modules(monkeypatch):
            other(x)
    same(ours, other, 1e-5)
    assert options.get("track_running_stats") is not None or int(ours.bn1.num_batches_tracked) == 3


@needs_native
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recomputed forward moves the running statistics once more, as torch's batch norm does."""
    ours = block(Bottleneck)
    whole, other = copy.deepcopy(ours), copy.deepcopy(ours)
    x = torch.randn(5, 4, 9, 7, requires_grad=True)

    def gradients(model: nn.Module, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x.grad = None
        forward(x * 1).square().sum().backward()
        return [each.grad for each in (x, *model.parameters()) if each.grad is not None]

    found: list[Tensor] = []
    assert fused(lambda: found.extend(gradients(ours, lambda t: checkpoint(ours, t, use_reentrant=reentrant)))) == 8
    for mine, right in zip(found, gradients(whole, whole), strict=True):
        assert torch.equal(mine, right)
    with plain_modules(monkeypatch):
        gradients(other, lambda t: checkpoint(other, t, use_reentrant=reentrant))
    same(ours, other, 1e-5)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = block()
    other = copy.deepcopy(ours)
    x = torch.randn(5, 4, 9, 7)
    found: list[Tensor] = []
    with torch.autocast("cpu", dtype=dtype):
        assert fused(lambda: found.append(ours(x))) == 3
        with plain_modules(monkeypatch):
            expected = other(x)
    assert found[0].dtype == expected.dtype == dtype
    assert (found[0] - expected).norm() <= 0.05 * expected.norm()
    same(ours, other, 0.01)
    found[0].float().square().sum().backward()
    expected.float().square().sum().backward()
    for mine, theirs in zip(ours.parameters(), other.parameters(), strict=True):
        assert mine.grad is not None
        assert theirs.grad is not None
        assert (mine.grad - theirs.grad).norm() <= 0.2 * theirs.grad.norm()


def with_gradients(model: nn.Module, x: Tensor, leaf: Tensor) -> tuple[list[Tensor], list[tuple[str, str]]]:
    """y, gradients of the leaf that x is made of and of the parameters; and what served the convolutions."""
    with dispatch.record() as calls:
        y = model(x)
        found = [y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])]
    return found, [call for call in calls if "conv" in call[0]]


@needs_native
@pytest.mark.parametrize("normalized", [False, True])
def test_1x1_convolutions_are_products(normalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, of channels_last images, with a bias too; the module is called where it has a hook."""
    images = torch.randn(3, 64, 5, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = nn.Sequential(nn.Conv2d(64, 72, 1, bias=not normalized)).to(memory_format=torch.channels_last)
    if normalized:
        sabmn_ext.spectral_norm_model(ours, preserve_eval=False)
    other = copy.deepcopy(ours)
    monkeypatch.setattr(ours, "forward", lambda x: convolve(ours[0], x))  # within the root's hooks

    def run(model: nn.Module, x: Tensor = images) -> tuple[list[Tensor], list[tuple[str, str]]]:
        return with_gradients(model, x, images)

    found, calls = run(ours)
    assert calls == [("conv1x1_forward", "cpu"), ("conv1x1_backward", "cpu")]
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    for mine, right in zip(found, run(other)[0], strict=True):
        assert torch.allclose(mine, right, atol=1e-4 * right.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not run(ours)[1]
    hooked = ours[0].register_forward_hook(double)
    assert not run(ours)[1]
    hooked.remove()
    for x in (images.contiguous(), images[..., :2]):
        assert not run(ours, x)[1]
    with torch.inference_mode(), dispatch.record() as calls:
        features = ours.eval()(images)
    assert ("conv1x1_forward", "cpu") in calls
    assert torch.allclose(features, ours[0](images), atol=1e-4)


@needs_native
@pytest.mark.parametrize("normalized", [False, True])
def test_3x3_convolutions_go_by_winograds_products(normalized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of channels_last images, many channels and positions; the module is called where it is not plain."""
    images = torch.randn(2, 64, 8, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    ours = nn.Sequential(nn.Conv2d(64, 72, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    if normalized:
        sabmn_ext.spectral_norm_model(ours, preserve_eval=False)
    other = copy.deepcopy(ours)
    monkeypatch.setattr(ours, "forward", lambda x: convolve(ours[0], x))  # within the root's hooks

    def run(model: nn.Module, x: Tensor = images) -> tuple[list[Tensor], list[tuple[str, str]]]:
        return with_gradients(model, x, images)

    found, calls = run(ours)
    assert calls == [("conv3x3_forward", "cpu"), ("conv3x3_backward", "cpu")]
    for mine, right in zip(found, run(other)[0], strict=True):
        assert torch.allclose(mine, right, atol=1e-4 * right.abs().max().item())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(ours, images.bfloat16())[0][0]
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), other(images), atol=0.1)
    hooked = ours[0].register_forward_hook(double)
    assert not run(ours)[1]
    hooked.remove()
    for x in (images.contiguous(), images[:1, :, :2]):
        assert not run(ours, x)[1]
    ours.to(memory_format=torch.contiguous_format)
    assert not run(ours)[1]
    ours.to(memory_format=torch.channels_last).eval()
    with torch.inference_mode(), dispatch.record() as calls:
        features = ours(images)
    assert ("conv3x3_forward", "cpu") in calls
    assert torch.allclose(features, ours[0](images), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"stride": 2}, {"padding": 0}, {"dilation": 2}, {"groups": 2}, {"bias": True}, {"padding_mode": "circular"},
     {"padding": "same"}, {"kernel_size": 5}, {"out_channels": 63}, {"kernel_size": 1},
     {"kernel_size": 1, "padding": 0, "stride": 2}, {"kernel_size": 1, "padding": 0, "out_channels": 63}],
)  # fmt: skip
def test_other_convolutions_are_called(options: dict[str, Any]) -> None:
    defaults = {"in_channels": 64, "out_channels": 64, "kernel_size": 3, "padding": 1, "bias": False}
    convolution = nn.Conv2d(**(defaults | options)).to(memory_format=torch.channels_last)  # type: ignore[arg-type]
    x = torch.randn(2, 64, 9, 8).contiguous(memory_format=torch.channels_last)
    with dispatch.record() as calls:
        assert torch.equal(convolve(convolution, x), convolution(x))
    assert not calls


def test_traced_and_compiled_networks_hold_the_modules() -> None:
    network = ResNet("resnet18")
    graph = torch.fx.symbolic_trace(network).graph
    kinds = Counter(type(network.get_submodule(n.target)) for n in graph.nodes if n.op == "call_module")
    assert kinds[nn.BatchNorm2d] == 20
    assert kinds[nn.ReLU] == 17
    model, x = block(), torch.randn(5, 4, 9, 7)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    assert fused(lambda: compiled(x)) == 0
    assert torch.allclose(compiled(x), model(x), atol=1e-4)


def test_a_backend_for_gpus_leaves_the_cpu_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SABMN_BACKEND", "triton")
    assert torch.isfinite(block()(torch.randn(5, 4, 9, 7))).all()
