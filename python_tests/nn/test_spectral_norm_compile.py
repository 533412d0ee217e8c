"""Normalised networks under torch.compile: one graph, compiled once for each mode, with the eager results."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from spectral_norm_twins import images, network, normalize_ours
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sabmn_ext.nn.spectral_norm_layer import running

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.heavy)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def assert_trains_like(
    compiled: Callable[[Tensor], Tensor], model: nn.Module, twin: nn.Module, tolerance: float = 1e-10
) -> None:
    """Steps of ``model``, run by ``compiled``, and of its eager ``twin``."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    for _ in range(3):
        x = images()
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for key, expected in twin.state_dict().items():
        assert torch.allclose(model.state_dict()[key], expected, atol=tolerance), key
    assert running.depth == 0
    assert not running.normalized


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_and_evaluation(backend: str) -> None:
    model = normalize_ours(network())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_trains_like(compiled, model, twin)
    model.eval()
    twin.eval()
    x = images()
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.allclose(compiled(x), twin(x), atol=1e-10)
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(2)
        twin[0].parametrizations.weight.original.mul_(2)
        assert torch.allclose(compiled(x), twin(x), atol=1e-10)


def test_a_network_whose_weights_need_no_gradient() -> None:
    model = normalize_ours(network()).requires_grad_(False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images()
    assert torch.allclose(compiled(x), twin(x), atol=1e-10)


def test_a_compiled_layer_of_an_eager_network() -> None:
    model = normalize_ours(network())
    twin = copy.deepcopy(model)
    model[3].compile(fullgraph=True, backend="aot_eager")
    assert_trains_like(model, model, twin)


class Broken(nn.Module):
    """Its forward cannot be compiled in one piece."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        return self.layers[4](self.layers[3](x))


def test_a_forward_with_a_break() -> None:
    model = normalize_ours(Broken())
    twin = copy.deepcopy(model)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert_trains_like(torch.compile(model, backend="aot_eager"), model, twin)


def test_roots_in_roots() -> None:
    inner = normalize_ours(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()))
    model = normalize_ours(nn.Sequential(nn.Conv2d(3, 8, 3), inner, inner)).double()
    twin = copy.deepcopy(model)
    assert_trains_like(torch.compile(model, fullgraph=True, backend="aot_eager"), model, twin)


def test_a_checkpoint_inside_a_compiled_network() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[4](checkpoint(self.layers[3], self.layers[0](x), use_reentrant=False))

    model = normalize_ours(Checkpointed())
    twin = copy.deepcopy(model)
    assert_trains_like(torch.compile(model, fullgraph=True, backend="aot_eager"), model, twin)


def test_autocast() -> None:
    model = normalize_ours(network().float())
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = images().float()
    for run in (compiled, twin):
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = run(x)
            output.float().square().mean().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, atol=0.02 * float(expected.grad.abs().max()) + 1e-3)
    for ours, expected in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(ours, expected, atol=1e-2)
