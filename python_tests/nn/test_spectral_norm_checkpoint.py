"""Gradient checkpointing of normalised networks: exact, or a clear error."""

import gc
import threading
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import torch
from spectral_norm_twins import images, network, normalize_ours, singular_vectors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sabmn_ext.nn.spectral_norm import spectral_norm

STALE = "gradient checkpointing recomputes a forward that used"

Wrap = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


def plain(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def nested(outer: bool, inner: bool, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(lambda y: checkpoint(function, y, use_reentrant=inner), x, use_reentrant=outer)


WRAPS: dict[str, Wrap] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "no random state": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "reentrant in reentrant": partial(nested, True, True),
    "reentrant in the other": partial(nested, False, True),
    "the other in reentrant": partial(nested, True, False),
    "the other in itself": partial(nested, False, False),
}


class Checkpointed(nn.Module):
    """A network whose middle part is run by ``wrap``."""

    def __init__(self, wrap: Wrap, dropout: float = 0.3) -> None:
        super().__init__()
        self.wrap = wrap
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Dropout(dropout), nn.ConvTranspose2d(4, 5, 2), nn.LayerNorm(6)
        )
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.wrap(self.block, self.stem(x)))


def make(wrap: Wrap, dropout: float = 0.3) -> nn.Module:
    torch.manual_seed(3)
    return normalize_ours(Checkpointed(wrap, dropout).double())


def trained(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Tensor]:
    """The state after some steps; the input needs a gradient, which reentrant checkpoints of a whole network want."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        run(model, images().requires_grad_()).square().sum().backward()
        optimizer.step()
    return model.state_dict()


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """But for rounding: gradients are hundreds, sums of them near 0 among them."""
    for key, value in expected.items():
        assert torch.allclose(ours[key], value, rtol=1e-11, atol=1e-11), key


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_part_of_the_network(wrap: str) -> None:
    dropout = 0.0 if wrap == "no random state" else 0.3
    expected = trained(make(plain, dropout), lambda model, x: model(x))
    assert_same(trained(make(WRAPS[wrap], dropout), lambda model, x: model(x)), expected)


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_the_whole_network(wrap: str) -> None:
    expected = trained(make(plain), lambda model, x: model(x))
    assert_same(trained(make(plain), WRAPS[wrap]), expected)


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_a_layer_that_is_a_root_of_its_own(wrap: str) -> None:
    def run(through: Wrap) -> dict[str, Tensor]:
        torch.manual_seed(3)
        layers = nn.ModuleList([spectral_norm(nn.Conv2d(3, 3, 3, padding=1)) for _ in range(2)]).double()
        return trained(layers, lambda m, x: through(lambda y: m[1](m[0](y).tanh()), x))

    assert_same(run(WRAPS[wrap]), run(plain))


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_parts_of_a_network_whose_own_forward_is_not_called(wrap: str) -> None:
    def run(through: Wrap) -> dict[str, Tensor]:
        torch.manual_seed(3)
        model = normalize_ours(network())
        return trained(model, lambda m, x: through(lambda y: m[4](m[3](m[0](y))), x))

    assert_same(run(WRAPS[wrap]), run(plain))


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_a_layer_that_is_used_twice_in_one_forward(wrap: str) -> None:
    class Twice(nn.Module):
        def __init__(self, wrap: Wrap) -> None:
            super().__init__()
            self.conv, self.wrap = nn.Conv2d(3, 3, 3, padding=1), wrap

        def forward(self, x: Tensor) -> Tensor:
            return self.wrap(lambda y: self.conv(self.conv(y).tanh()), x)

    def run(through: Wrap) -> dict[str, Tensor]:
        torch.manual_seed(3)
        return trained(normalize_ours(Twice(through).double()), lambda model, x: model(x))

    assert_same(run(WRAPS[wrap]), run(plain))


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_the_newer_of_two_forwards_recomputes_and_the_older_one_is_an_error(wrap: str) -> None:
    model, twin = make(WRAPS[wrap], 0.0), make(plain, 0.0)
    x, y = images(), images()
    old, new = model(x).square().sum(), model(y).square().sum()
    twin(x)
    new.backward()
    twin(y).square().sum().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-11, atol=1e-12)
    with pytest.raises(RuntimeError, match=STALE):
        old.backward()
    with pytest.raises(RuntimeError, match=STALE):
        (model(x).square().sum() - model(y).square().sum()).backward()
    model(x).square().sum().backward()  # and on it goes


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_forward_without_gradients_makes_the_older_one_stale_too(wrap: str, whole: bool) -> None:
    model = make(plain if whole else WRAPS[wrap])
    x = images().requires_grad_()
    # What follows the network in the region has later nodes than the network.
    loss = WRAPS[wrap](lambda x: model(x).square().sum(), x) if whole else model(x).square().sum()
    with torch.no_grad():
        model(images())
    with pytest.raises(RuntimeError, match=STALE):
        loss.backward()


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_a_part_called_alone_makes_the_older_one_stale_too(wrap: str) -> None:
    model = normalize_ours(network())
    x = images().requires_grad_()
    old, new = WRAPS[wrap](model[0], x).sum(), WRAPS[wrap](model[0], x).square().sum()
    new.backward()
    with pytest.raises(RuntimeError, match=STALE):
        old.backward()


def test_a_backward_pass_inside_a_forward() -> None:
    class Inner(nn.Module):
        """Its output is the gradient of a checkpointed layer, and of an older forward's where there is one."""

        def __init__(self, wrap: Wrap) -> None:
            super().__init__()
            self.conv, self.wrap = nn.Conv2d(3, 3, 1), wrap
            self.older: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            x = x.requires_grad_()
            (gradient,) = torch.autograd.grad(self.wrap(self.conv, x).tanh().sum(), x, create_graph=True)
            if self.older is not None:
                self.older.backward()
            return gradient

    x = images()
    results = []
    for through in (WRAPS["not reentrant"], plain):
        torch.manual_seed(3)
        model = normalize_ours(Inner(through).double())
        model(x.clone()).square().sum().backward()
        results.append(model.conv.parametrizations.weight.original.grad)
    assert torch.allclose(results[0], results[1], atol=1e-12)
    model = normalize_ours(Inner(WRAPS["not reentrant"]).double())
    model.older = model(x.clone()).sum()
    with pytest.raises(RuntimeError, match=STALE):
        model(x.clone())


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_forwards_in_eval_mode_make_nothing_stale(wrap: str) -> None:
    model, twin = make(WRAPS[wrap], 0.0).eval(), make(plain, 0.0).eval()
    x, y = images(), images()
    for one in (model, twin):
        (one(x).square().sum() - one(y).square().sum()).backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant"])
def test_two_forwards_in_one_region_are_an_error(wrap: str) -> None:
    model = make(plain)
    x = images().requires_grad_()
    loss = WRAPS[wrap](lambda x: model(x).sum() - model(2 * x).square().sum(), x)
    with pytest.raises(RuntimeError, match=STALE):
        loss.backward()


def test_a_second_backward_of_the_same_graph() -> None:
    model, twin = make(WRAPS["not reentrant"], 0.0), make(plain, 0.0)
    x = images()
    for one in (model, twin):
        loss = one(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("wrap", ["reentrant", "not reentrant", "the other in itself"])
def test_a_backward_pass_in_another_thread(wrap: str) -> None:
    """As on a GPU, where autograd has threads of its own."""
    model, twin = make(WRAPS[wrap], 0.0), make(plain, 0.0)
    x = images()
    loss = model(x).square().sum()
    errors: list[BaseException] = []

    def backward() -> None:
        try:
            loss.backward()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert not errors
    twin(x).square().sum().backward()
    for ours, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, expected.grad, rtol=1e-11, atol=1e-12)


def test_a_weight_that_changes_before_the_backward_pass_is_noticed() -> None:
    layer = spectral_norm(nn.Conv2d(3, 3, 3).double())
    for through in (plain, WRAPS["not reentrant"]):
        loss = through(layer, images()).sum()
        with torch.no_grad():
            layer.parametrizations.weight.original.add_(1)
        with pytest.raises(RuntimeError, match=r"in place|inplace"):
            loss.backward()


@pytest.mark.parametrize("wrap", ["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("backward", [False, True])
def test_no_normalized_weight_outlives_the_backward_pass_or_the_graph(wrap: str, backward: bool) -> None:
    model = make(WRAPS.get(wrap, plain))
    weights = []
    for layer in (model.block[0], model.block[3], model.head):
        layer.register_forward_hook(lambda module, _, output: weights.append(weakref.ref(module.weight)))
    loss = model(images()).sum()
    if wrap == "plain":
        assert all(weight() is not None for weight in weights)
    if backward:
        loss.backward()
    else:
        del loss
    gc.collect()
    assert weights
    assert all(weight() is None for weight in weights)


def test_u_and_v_move_once_a_step() -> None:
    model = make(WRAPS["not reentrant"])
    loss = model(images()).sum()
    after_forward = singular_vectors(model)
    loss.backward()
    assert all(torch.equal(t, after_forward[key]) for key, t in singular_vectors(model).items())
