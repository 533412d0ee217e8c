"""Spectral normalisation of modules: equal to torch's parametrization, and what torch's does not have."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.resnet import ResNet
from sabmn_ext.nn.spectral_norm import is_normalized, remove_spectral_norm, spectral_norm, spectral_norm_model
from sabmn_ext.nn.spectral_norm_layer import running
from sabmn_ext.ops import dispatch

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 9, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 5, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 2)),
}


class Twins:
    """The same network twice, normalised by this package and by torch, from the same random state."""

    def __init__(self, make: object, ours: object, theirs: object) -> None:
        results = []
        for normalize in (ours, theirs):
            torch.manual_seed(0)
            network = make()
            torch.manual_seed(1)
            results.append(normalize(network) or network)
        self.ours, self.theirs = results


def normalize_all_with_torch(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            parametrizations.spectral_norm(module)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2), nn.Conv2d(5, 2, 1)
    ).double()


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_type_equals_torch(layer: str) -> None:
    make, shape = LAYERS[layer]
    twins = Twins(lambda: make().double(), spectral_norm, parametrizations.spectral_norm)
    assert list(twins.ours.state_dict()) == list(twins.theirs.state_dict())
    for key, value in twins.theirs.state_dict().items():
        assert torch.allclose(twins.ours.state_dict()[key], value, atol=1e-12), key
    for train in (True, True, False):
        twins.ours.train(train)
        twins.theirs.train(train)
        x = torch.randn(shape, dtype=torch.float64)
        with parametrize.cached():
            expected = twins.theirs(x)
        assert torch.allclose(twins.ours(x), expected, atol=1e-12)


def test_several_training_steps_equal_torch() -> None:
    twins = Twins(network, lambda m: spectral_norm_model(m, preserve_eval=False), normalize_all_with_torch)
    assert set(twins.ours.state_dict()) == set(twins.theirs.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (twins.ours, twins.theirs)]
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        x = torch.randn(4, 3, 6, 5, generator=generator, dtype=torch.float64)
        for model, optimizer in zip((twins.ours, twins.theirs), optimizers, strict=True):
            optimizer.zero_grad()
            with parametrize.cached():
                model(x).square().mean().backward()
            optimizer.step()
    for key, value in twins.theirs.state_dict().items():
        assert torch.allclose(twins.ours.state_dict()[key], value, atol=1e-11), key


def test_one_update_for_all_weights_per_forward_of_the_root() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    u = [module.parametrizations.weight[0]._u for module in (model[0], model[3], model[4])]
    before = [t.clone() for t in u]
    with dispatch.record() as calls, torch.no_grad():
        model(torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert [name for name, _ in calls] == ["spectral_norm_forward"]
    # One output channel aside, every vector has moved, in the registered buffers themselves.
    assert not any(torch.equal(now, then) for now, then in zip(u, before, strict=True))
    frozen = [t.clone() for t in u]
    model.eval()(torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert all(torch.equal(now, then) for now, then in zip(u, frozen, strict=True))


def test_two_forwards_before_one_backward() -> None:
    twins = Twins(network, lambda m: spectral_norm_model(m, preserve_eval=False), normalize_all_with_torch)
    x, y = torch.randn(2, 2, 3, 6, 5, dtype=torch.float64)
    for model in (twins.ours, twins.theirs):
        with parametrize.cached():
            first = model(x).square().mean()
        with parametrize.cached():
            second = model(y).square().mean()
        (first - second).backward()
    for ours, theirs in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-12)


def test_a_submodule_called_alone_updates_its_own_weight_only() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    others = [model[3].parametrizations.weight[0]._u.clone(), model[4].parametrizations.weight[0]._u.clone()]
    own = model[0].parametrizations.weight[0]._u.clone()
    model[0](torch.randn(2, 3, 6, 5, dtype=torch.float64))
    assert not torch.equal(own, model[0].parametrizations.weight[0]._u)
    assert torch.equal(others[0], model[3].parametrizations.weight[0]._u)
    assert torch.equal(others[1], model[4].parametrizations.weight[0]._u)


def test_a_deep_copy_is_independent() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    twin(x)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not torch.equal(
        twin[0].parametrizations.weight[0]._u, model[0].parametrizations.weight[0]._u
    )


def test_an_error_inside_the_forward_leaves_no_stale_weight() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 6, 5, dtype=torch.float64))
    assert not running.normalized
    with torch.no_grad():
        model[0].parametrizations.weight.original.mul_(3)
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    model.eval()
    assert torch.allclose(torch.linalg.matrix_norm(model[0].weight.flatten(1), 2), torch.ones((), dtype=x.dtype), 0.05)


def test_old_keys_load() -> None:
    torch.manual_seed(0)
    old = nn.utils.spectral_norm(nn.Conv2d(3, 5, 3)).eval()
    new = spectral_norm(nn.Conv2d(3, 5, 3)).eval()
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 3, 6, 6)
    assert torch.allclose(new(x), old(x), atol=1e-6)


def test_idempotent_and_skips_what_torch_normalised() -> None:
    model = network()
    parametrizations.spectral_norm(model[4])
    spectral_norm_model(model, preserve_eval=False)
    keys = list(model.state_dict())
    spectral_norm_model(model, preserve_eval=False)
    assert list(model.state_dict()) == keys
    assert len(model[4].parametrizations.weight) == 1
    assert all(is_normalized(model[i]) for i in (0, 3, 4))
    assert len(model._forward_pre_hooks) == 1


def test_exclude_and_types() -> None:
    model = network()
    spectral_norm_model(model, exclude=["3", model[4]], types=(nn.Conv2d, nn.ConvTranspose2d), preserve_eval=False)
    assert [is_normalized(m) for m in (model[0], model[3], model[4])] == [True, False, False]
    with pytest.raises(ValueError, match="exclude names 'layer9'"):
        spectral_norm_model(network(), exclude=["layer9"])


def test_remove_bakes_the_weight_in() -> None:
    model = spectral_norm_model(network(), preserve_eval=False).eval()
    x = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    expected = model(x)
    plain_keys = list(network().state_dict())
    remove_spectral_norm(model.train())
    assert sorted(model.state_dict()) == sorted(plain_keys)
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert torch.allclose(model.eval()(x), expected, atol=1e-12)
    plain = network()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain.eval()(x))


def test_remove_from_a_part_leaves_the_rest() -> None:
    model = spectral_norm_model(network(), preserve_eval=False)
    remove_spectral_norm(model[0])
    assert [is_normalized(m) for m in (model[0], model[3], model[4])] == [False, True, True]
    u = model[3].parametrizations.weight[0]._u.clone()
    model(torch.randn(2, 3, 6, 5, dtype=torch.float64)).sum().backward()
    assert not torch.equal(u, model[3].parametrizations.weight[0]._u)
    assert model[0].weight.grad is not None
    (group,) = {hook.__self__ for hook in model._forward_pre_hooks.values()}
    assert [layer.name for *_, layer in group.members] == ["3.weight", "4.weight"]


def test_zero_weight_is_named() -> None:
    model = network()
    nn.init.zeros_(model[4].weight)
    spectral_norm_model(model, preserve_eval=False)
    with pytest.raises(RuntimeError, match=r"4\.weight is 0"):
        model(torch.randn(2, 3, 6, 5, dtype=torch.float64))


def test_clear_errors() -> None:
    with pytest.raises(ValueError, match="Linear has no parameter 'kernel'"):
        spectral_norm(nn.Linear(3, 3), "kernel")
    with pytest.raises(ValueError, match="n_power_iterations is 0"):
        spectral_norm(nn.Linear(3, 3), n_power_iterations=0)
    with pytest.raises(ValueError, match="dim is 2"):
        spectral_norm(nn.Linear(3, 3), dim=2)


def test_a_vector_is_divided_by_its_length() -> None:
    module = nn.LayerNorm(6)
    nn.init.normal_(module.weight)
    expected = module.weight.detach() / module.weight.detach().norm()
    assert torch.allclose(spectral_norm(module).weight, expected)


def test_compile_fullgraph() -> None:
    model = spectral_norm_model(network().float(), preserve_eval=False)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(2, 3, 6, 5)
        compiled(x).square().mean().backward()
        twin(x).square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.allclose(model[0].parametrizations.weight[0]._u, twin[0].parametrizations.weight[0]._u, atol=1e-6)


def trained(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Some forwards in train mode, so that the running statistics are the model's own."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_preserve_eval_on_a_resnet(architecture: str) -> None:
    torch.manual_seed(3)
    model = trained(ResNet(architecture), (4, 3, 64, 32))
    x = torch.randn(2, 3, 64, 32)
    expected = model(x)
    careless = spectral_norm_model(copy.deepcopy(model), preserve_eval=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral_norm_model(model)
    assert sum(is_normalized(m) for m in model.modules()) == {"resnet18": 20, "resnet50": 53}[architecture]
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 1e-3
    assert (careless(x) - expected).norm() / expected.norm() > 0.1  # the test can fail


class Awkward(nn.Module):
    """Convolutions whose successors differ in how well they can be known."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(3, 4, 1, bias=True), nn.BatchNorm2d(4)
        self.free = nn.Conv2d(4, 4, 1)
        self.first, self.second, self.shared_norm = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.forked, self.forked_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.free(self.plain_norm(self.plain(x)).relu())
        x = self.shared_norm(self.first(x)) + self.shared_norm(self.second(x))
        z = self.forked(x)
        return self.forked_norm(z) + z


def test_layers_whose_successor_cannot_be_decided_are_reported() -> None:
    torch.manual_seed(6)
    model = trained(Awkward(), (4, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = model.plain_norm(model.plain(x))
    with pytest.warns(UserWarning, match="in eval mode") as caught:
        spectral_norm_model(model)
    (message,) = [str(w.message) for w in caught]
    assert "plain:" not in message
    assert "free: no batch norm follows" in message
    assert "first: its batch norm serves other layers too" in message
    assert "second: its batch norm serves other layers too" in message
    assert "forked: its output goes to a batch norm and elsewhere" in message
    assert torch.allclose(model.plain_norm(model.plain(x)), expected, atol=1e-5)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.conv(x))) if bool(x.sum() > -1e9) else x


def test_module_order_serves_where_tracing_fails() -> None:
    torch.manual_seed(7)
    model = trained(Untraceable(), (4, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    expected = model.norm(model.conv(x))
    with pytest.warns(UserWarning, match="last: the model cannot be traced"):
        spectral_norm_model(model)
    assert torch.allclose(model.norm(model.conv(x)), expected, atol=1e-5)


def test_variances_near_eps_are_reported() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_var.fill_(1e-7)
    with pytest.warns(UserWarning, match=r"near the batch norm's eps 1e-05 in 4 of 4 channels"):
        spectral_norm_model(model)


def test_a_block_that_is_normalised_already_is_updated_once() -> None:
    block = SelfAttention2d(8, 2, spectral_norm=True)
    model = spectral_norm_model(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), block), preserve_eval=False)
    assert len(block.query.parametrizations.weight) == 1
    with dispatch.record() as calls:
        model(torch.randn(2, 3, 6, 5))
    assert [name for name, _ in calls] == ["spectral_norm_forward", "spectral_norm_forward", "attention_forward"]
    assert all(is_normalized(m) for m in model.modules() if isinstance(m, nn.Conv2d))
