"""Whose forward it is: roots in roots, shared layers, threads, interrupts, hooks, and what happens between forwards."""

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from spectral_norm_twins import (
    Twins,
    images,
    network,
    network_twins,
    normalize_ours,
    normalize_theirs,
    singular_vectors,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sabmn_ext.nn import spectral_norm_group
from sabmn_ext.nn.spectral_norm import remove_spectral_norm, spectral_norm, spectral_norm_model
from sabmn_ext.nn.spectral_norm_layer import running
from sabmn_ext.ops import dispatch
from sabmn_ext.ops import spectral_norm as operation


def squared(x: Tensor) -> Any:
    return lambda model: model(x).square().mean()


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[bool]:
    """For every u and v, whether it has changed."""
    now = singular_vectors(model)
    return [not torch.equal(now[key], before[key]) for key in before]


# ---- which forward updates what ----


class Shared(nn.Module):
    """One layer used twice, and two layers with the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 3, padding=1)
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        return self.left(x) + self.right(x.tanh())


def test_shared_layers_and_shared_parameters(seed: int) -> None:
    twins = Twins(lambda: Shared().double(), normalize_ours, normalize_theirs, seed)
    assert len(list(twins.ours.parameters())) == len(list(twins.theirs.parameters())) == 5
    twins.train([squared(images()) for _ in range(4)])


def test_roots_in_roots_are_updated_once_by_the_outermost(seed: int) -> None:
    def nested(one: Any) -> Any:
        def normalize(model: nn.Module) -> None:
            one(model[1])
            one(model)

        return normalize

    def make() -> nn.Module:
        inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1))
        return nn.Sequential(nn.Conv2d(3, 8, 3), inner, nn.Tanh(), inner, nn.Conv2d(8, 2, 1)).double()

    def theirs(model: nn.Module) -> None:
        for layer in (*model[1], model[0], model[4]):
            parametrizations.spectral_norm(layer)

    twins = Twins(make, nested(normalize_ours), theirs, seed)
    twins.train([squared(images()) for _ in range(3)])
    twins.ours.train()
    twins.theirs.train()
    x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
    twins.backward(lambda model: model[1](x).square().sum())  # the inner root alone
    twins.assert_equal()


def test_another_network_inside_the_forward_is_updated_once(seed: int) -> None:
    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return other(self.conv(x)) + other(x)

    caller = normalize_ours(Caller().double())
    other = normalize_ours(network())
    twin = copy.deepcopy(other)
    caller(images())
    twin(images())
    expected = singular_vectors(twin)
    assert all(torch.allclose(t, expected[key], atol=1e-12) for key, t in singular_vectors(other).items())


def test_a_forward_that_calls_itself(seed: int) -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.late = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            x = self.conv(x).tanh()
            return self.late(self(x, depth - 1) if depth else x)

    twins = Twins(lambda: Recursive().double(), normalize_ours, normalize_theirs, seed)
    twins.train([squared(images()) for _ in range(3)])


def test_parts_called_alone(seed: int) -> None:
    twins = network_twins(seed)
    x = images()

    def part(model: nn.Module) -> Tensor:
        return model[4](model[3](model[0](x))).square().mean()

    for _ in range(3):
        twins.step(part)
        twins.step(squared(x))
    twins.assert_equal()


def test_weights_read_outside_of_a_forward_update_as_torch_s(seed: int) -> None:
    twins = network_twins(seed)
    for _ in range(3):
        assert torch.allclose(twins.ours[0].weight, twins.theirs[0].weight, atol=1e-12)
    twins.assert_equal()
    twins.ours.eval()
    twins.theirs.eval()
    assert torch.equal(twins.ours[0].weight, twins.ours[0].weight)
    twins.assert_equal()


def test_no_grad_forwards_in_train_mode_update_once(seed: int) -> None:
    twins = network_twins(seed)
    with torch.no_grad(), parametrize.cached():
        assert torch.allclose(twins.ours(images()[:0]), twins.theirs(images()[:0]))
        twins.assert_equal()


def test_frozen_weights_keep_updating_u_and_v(seed: int) -> None:
    twins = network_twins(seed)
    for model in (twins.ours, twins.theirs):
        for layer in (model[0], model[4]):
            layer.requires_grad_(False)
    before = singular_vectors(twins.ours)
    twins.train([squared(images()) for _ in range(3)])
    assert sum(moved(twins.ours, before)) == 6
    assert twins.ours[0].parametrizations.weight.original.grad is None


def test_an_unused_layer_has_no_gradient_and_still_updates() -> None:
    model = normalize_ours(network())
    model.forward = lambda x: model[0](x)
    before = singular_vectors(model)
    model(images()).sum().backward()
    assert model[0].parametrizations.weight.original.grad is not None
    assert model[4].parametrizations.weight.original.grad is None
    assert all(moved(model, before))


def test_two_forwards_before_one_backward(seed: int) -> None:
    twins = network_twins(seed)
    x, y = images(), images()
    for model in (twins.ours, twins.theirs):
        with parametrize.cached():
            first = model(x).square().mean()
        with parametrize.cached():
            second = model(y).square().mean()
        (first - second).backward()
    for ours, theirs in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


def test_functional_call(seed: int) -> None:
    twins = network_twins(seed)
    x = images()
    results = []
    for model in (twins.ours, twins.theirs):
        values = {key: t.detach().clone() for key, t in model.state_dict().items()}
        parameters = {key: values[key] * 1.5 for key, _ in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], model: nn.Module = model, values: Any = values) -> Tensor:
            with parametrize.cached():
                return torch.func.functional_call(model, {**values, **parameters}, (x,)).square().mean()

        leaves = {key: p.requires_grad_() for key, p in parameters.items()}
        gradients = torch.autograd.grad(loss(leaves), list(leaves.values()))
        results.append((gradients, values))
    for ours, theirs in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    for key, value in results[1][1].items():
        assert torch.allclose(results[0][1][key], value, atol=1e-12), key
    twins.assert_equal()  # the networks' own parameters and buffers have not moved


def test_a_forward_under_no_grad_with_a_part_that_has_gradients() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.conv(x)

    model = spectral_norm_model(Part(), preserve_eval=False).double()
    twin = copy.deepcopy(model)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        output = model(x)
    output.square().sum().backward()
    twin(x).square().sum().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, atol=1e-12)


# ---- hooks, errors, interrupts, threads ----


def test_hooks_see_the_weights_of_the_forward() -> None:
    model = network()
    seen: list[str] = []
    model.register_forward_pre_hook(lambda *_: seen.append(f"early {running.depth}"))
    normalize_ours(model)
    model.register_forward_pre_hook(lambda *_: seen.append(f"late {running.depth}"))
    model[3].register_forward_hook(lambda module, *_: seen.append(f"inside {running.depth}"))
    model.register_forward_hook(lambda *_: seen.append(f"after {running.depth}"))
    model(images())
    assert seen == ["early 0", "late 1", "inside 1", "after 0"]


class Failure(Exception):
    pass


class Interrupt(BaseException):
    """Like KeyboardInterrupt: ``nn.Module`` runs no hook for it."""


def fail(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error

    return hook


@pytest.mark.parametrize("error", [Failure, Interrupt])
@pytest.mark.parametrize("where", ["before", "begin", "inside", "after"])
@pytest.mark.parametrize("then", ["forward", "part", "remove"])
def test_a_forward_that_did_not_end_leaves_nothing_behind(error: type[BaseException], where: str, then: str) -> None:
    model = network()
    if where == "before":
        handle = model.register_forward_pre_hook(fail(error))
    normalize_ours(model)
    if where == "begin":
        handle = model.register_forward_pre_hook(fail(error))
    if where == "inside":
        handle = model[2].register_forward_pre_hook(fail(error))
    if where == "after":
        handle = model[4].register_forward_hook(fail(error))
    with pytest.raises(error):
        model(images())
    assert error is Interrupt or not (running.depth or running.normalized)
    handle.remove()
    twin = copy.deepcopy(model)
    for one in (model, twin):
        with torch.no_grad():
            one[0].parametrizations.weight.original.mul_(3).add_(0.1)
    # The twin's forward never failed, as it runs in a thread of its own.
    x = images()

    def go_on(one: nn.Module) -> Tensor:
        if then == "remove":
            return remove_spectral_norm(one)[0](x)
        return one(x) if then == "forward" else one[0](x)

    expected: list[Tensor] = []
    thread = threading.Thread(target=lambda: expected.append(go_on(twin)))
    thread.start()
    thread.join()
    with dispatch.record() as calls:
        assert torch.allclose(go_on(model), expected[0], atol=1e-12)
    assert then != "forward" or len(calls) == 1
    assert running.depth == 0
    assert not running.normalized


def test_a_failing_hook_of_an_inner_root_does_not_end_the_outer_forward() -> None:
    inner = normalize_ours(nn.Sequential(nn.Conv2d(3, 3, 1)))
    inner[0].register_forward_pre_hook(fail(Failure))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.conv = inner, nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            with pytest.raises(Failure):
                self.inner(x)
            return self.conv(self.conv(x))

    model = normalize_ours(Outer())
    with dispatch.record() as calls:
        model(torch.randn(1, 3, 4, 4))
    assert [name for name, _ in calls] == ["spectral_norm_forward"] * 2  # conv; and inner's, whose group is its own


def test_threads_evaluate_side_by_side() -> None:
    model = normalize_ours(network()).eval()
    inputs = [images() for _ in range(4)]
    expected = [model(x) for x in inputs]
    gradients = torch.autograd.grad(expected[0].sum(), model[0].parametrizations.weight.original, retain_graph=True)
    start = threading.Barrier(4)
    failures: list[object] = []

    def evaluate(i: int) -> None:
        start.wait()
        try:
            for _ in range(20):
                output = model(inputs[i])
                assert torch.equal(output, expected[i])
                if i == 0:
                    weight = model[0].parametrizations.weight.original
                    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], gradients[0])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- between forwards ----


def test_data_writes_and_fused_optimizers_are_seen(seed: int) -> None:
    twins = network_twins(seed)
    twins.optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True) for m in (twins.ours, twins.theirs)
    ]
    twins.train([squared(images()) for _ in range(3)])
    for model in (twins.ours, twins.theirs):
        model.train()
        model[4].parametrizations.weight.original.data.mul_(2).add_(0.3)
    twins.train([squared(images())])


def test_fused_adam(seed: int) -> None:
    def make() -> nn.Module:
        # Without a batch norm, behind which a bias has a gradient of rounding errors only, which Adam makes large.
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 2, 2)).double()

    twins = Twins(make, normalize_ours, normalize_theirs, seed)
    twins.optimizers = [torch.optim.Adam(m.parameters(), lr=0.01, fused=True) for m in (twins.ours, twins.theirs)]
    twins.train([squared(images()) for _ in range(3)])


def test_dtype_and_memory_format_conversions(seed: int) -> None:
    twins = network_twins(seed)
    for convert in (
        lambda m: m.float().double(),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.to(memory_format=torch.contiguous_format),
    ):
        for model in (twins.ours, twins.theirs):
            convert(model.train())
        twins.train([squared(images().contiguous(memory_format=torch.channels_last))])


def test_on_the_meta_device() -> None:
    model = normalize_ours(network()).to("meta")
    output = model(images().to("meta"))
    assert output.device.type == "meta"
    assert output.shape == (2, 2, 7, 6)


def test_a_copy_at_any_time_is_independent(seed: int) -> None:
    copies: list[nn.Module] = []
    model = normalize_ours(network())
    handle = model[3].register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    loss = model(images()).sum()
    handle.remove()
    copies.append(copy.deepcopy(model))
    loss.backward()
    copies.append(copy.deepcopy(model))
    for twin in copies:
        twin[3]._forward_hooks.clear()
        before = singular_vectors(model)
        start = singular_vectors(twin)
        twin(images()).sum().backward()
        assert not any(moved(model, before))
        assert all(moved(twin, start))


def test_state_dicts_go_both_ways(seed: int) -> None:
    twins = network_twins(seed)
    twins.train([squared(images()) for _ in range(2)])
    for source in (twins.ours, twins.theirs):
        state = pickle.loads(pickle.dumps(source.state_dict()))
        for make in (normalize_ours, normalize_theirs):
            model = network()
            make(model)
            assert str(model.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
            x = images()
            assert torch.allclose(model.eval()(x), twins.theirs(x), atol=1e-12)


def test_old_keys_load_at_any_depth() -> None:
    def make() -> nn.Module:
        inner = nn.ModuleDict({"b": nn.ConvTranspose2d(5, 2, 3)})
        return nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 5, 3), inner)})

    old, new = make().double(), make().double()
    for layer in (old["a"][0], old["a"][1]["b"]):
        nn.utils.spectral_norm(layer)
        layer(torch.randn(1, layer.in_channels, 4, 4, dtype=torch.float64))
    normalize_ours(new)
    assert str(new.load_state_dict(old.state_dict(), strict=True)) == "<All keys matched successfully>"
    x = images()
    expected = old.eval()["a"][1]["b"](old["a"][0](x))
    assert torch.allclose(new.eval()["a"][1]["b"](new["a"][0](x)), expected, atol=1e-12)


@pytest.mark.parametrize("first", [True, False])
def test_parametrizations_of_other_kinds_beside_ours(seed: int, first: bool) -> None:
    class Shift(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1

    def make() -> nn.Module:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2)).double()

    def normalize(one: Any) -> Any:
        def both(model: nn.Module) -> None:
            if first:
                parametrize.register_parametrization(model[0], "weight", Shift())
            one(model)
            if not first:
                parametrize.register_parametrization(model[0], "weight", Shift())

        return both

    def theirs(model: nn.Module) -> None:
        parametrizations.spectral_norm(model[0])
        parametrizations.spectral_norm(model[3])

    def ours(model: nn.Module) -> None:
        spectral_norm_model(model, types=(nn.Linear,), preserve_eval=False)

    twins = Twins(make, normalize(ours), normalize(theirs), seed)
    # torch reads a weight with two parametrizations once more while it registers the second.
    twins.theirs.load_state_dict(twins.ours.state_dict())
    twins.train([squared(torch.randn(2, 3, dtype=torch.float64)) for _ in range(3)])


def test_a_parametrization_that_torch_removed_is_forgotten() -> None:
    model = normalize_ours(network())
    parametrize.remove_parametrizations(model[0], "weight")
    with torch.no_grad():
        nn.init.zeros_(model[0].weight)  # an error, were it still normalised
    model(images())
    (group,) = (group for _, group in spectral_norm_group.groups(model))
    assert [member.layer.name for member in group.members] == ["3.weight", "4.weight"]


def test_one_of_two_parametrizations_that_torch_removed_is_forgotten() -> None:
    model = nn.Sequential(nn.LSTM(3, 4))
    for name in ("weight_ih_l0", "weight_hh_l0"):
        spectral_norm(model[0], name)
    parametrize.remove_parametrizations(model[0], "weight_ih_l0")
    nn.init.zeros_(model[0].weight_ih_l0)  # an error, were it still normalised
    model(torch.randn(5, 2, 3))
    assert [len(group.members) for _, group in spectral_norm_group.groups(model)] == [0, 1]


# ---- devices that the host does not wait for ----


class Copies:
    """σ as it comes from a GPU: there only when ``arrived``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.arrived, self.started = False, 0
        monkeypatch.setattr(operation, "check_sigma", lambda names, sigma: None)  # which runs on the CPU only
        monkeypatch.setattr(spectral_norm_group, "copy_to_host", self.start)

    def start(self, sigma: Tensor) -> tuple[Tensor, Any]:
        self.started += 1
        return sigma.clone(), lambda: self.arrived


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_an_error_that_is_found_later(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    copies = Copies(monkeypatch)
    model = normalize_ours(network())
    good = copy.deepcopy(model.state_dict())
    model(images())
    model(images())
    assert copies.started == 1  # one on its way is enough
    copies.arrived = True
    with torch.no_grad():
        model[4].parametrizations.weight.original.fill_(value)
    model(images())  # looks at the first, and starts the second
    assert copies.started == 2
    with pytest.raises(RuntimeError, match=r"in an earlier forward the largest singular value of 4\.weight is (0|nan)"):
        model(images())
    model.load_state_dict(good)
    model(images())
    model(images())  # the error came once


def test_a_copy_of_a_network_does_not_wait_for_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    Copies(monkeypatch)
    model = normalize_ours(network())
    model(images())
    (group,), (twin,) = ([g for _, g in spectral_norm_group.groups(m)] for m in (model, copy.deepcopy(model)))
    assert len(group.deferred.pending) == 1
    assert not twin.deferred.pending
