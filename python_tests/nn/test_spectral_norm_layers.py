"""Every type of layer, normalised by this package and by torch, over several training steps and in eval mode."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from spectral_norm_twins import Twins
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from sabmn_ext.nn.spectral_norm import spectral_norm, spectral_norm_model
from sabmn_ext.nn.spectral_norm_group import parametrizations as lists_of

Loss = Callable[[nn.Module], Tensor]


def dense(*shape: int) -> Callable[[], Loss]:
    """The loss on a fresh random input of the given shape."""

    def draw() -> Loss:
        x = torch.randn(shape, dtype=torch.float64)
        return lambda module: first(module(x)).square().mean()

    return draw


def first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def indices(*shape: int) -> Callable[[], Loss]:
    def draw() -> Loss:
        x = torch.randint(0, 7, shape)
        return lambda module: module(x).square().mean()

    return draw


def draw_pair() -> Loss:
    x, y = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    return lambda module: module(x, y).square().mean()


def draw_attention() -> Loss:
    x = torch.randn(4, 2, 6, dtype=torch.float64)
    return lambda module: module(x, x, x)[0].square().mean()


def draw_step() -> Loss:
    x, h = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    return lambda module: module(x, (h, h))[0].square().mean()


def orthogonal() -> nn.Module:
    """Every singular value of the weight is 1."""
    module = nn.Linear(5, 7)
    nn.init.orthogonal_(module.weight)
    return module


# name: (layer, loss, arguments of spectral_norm)
CASES = {
    "linear": (lambda: nn.Linear(5, 7), dense(3, 5), {}),
    "linear, rows in dim 1": (lambda: nn.Linear(5, 7), dense(3, 5), {"dim": 1}),
    "linear, one output": (lambda: nn.Linear(5, 1), dense(3, 5), {}),
    "three iterations": (lambda: nn.Linear(5, 7), dense(3, 5), {"n_power_iterations": 3}),
    "vectors shorter than eps": (orthogonal, dense(3, 5), {"eps": 1.02}),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), dense(2, 4, 9), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, stride=(1, 2)), dense(2, 4, 9, 5), {}),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), dense(2, 4, 6, 5), {}),
    "conv2d, rows in dim -1": (lambda: nn.Conv2d(4, 6, (3, 2)), dense(2, 4, 9, 5), {"dim": -1}),
    "conv2d, channels last": (
        lambda: nn.Conv2d(4, 6, (3, 2)).to(memory_format=torch.channels_last),
        dense(2, 4, 9, 5),
        {},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), dense(2, 2, 4, 5, 3), {}),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3), dense(2, 4, 9), {}),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2), dense(2, 4, 5, 4), {}),
    "transposed2d, rows in dim 0": (lambda: nn.ConvTranspose2d(4, 6, 3), dense(2, 4, 5, 4), {"dim": 0}),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 3, 2), dense(2, 2, 3, 3, 2), {}),
    "embedding": (lambda: nn.Embedding(7, 3, padding_idx=2), indices(4, 5), {}),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), indices(4, 5), {}),
    "bilinear": (lambda: nn.Bilinear(5, 4, 3), draw_pair, {}),
    "attention": (lambda: nn.MultiheadAttention(6, 2), draw_attention, {"name": "in_proj_weight"}),
    "rnn": (lambda: nn.RNN(3, 4), dense(5, 2, 3), {"name": "weight_hh_l0"}),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2), dense(5, 2, 3), {"name": "weight_hh_l1"}),
    "gru": (lambda: nn.GRU(3, 4, bidirectional=True), dense(5, 2, 3), {"name": "weight_ih_l0_reverse"}),
    "lstm cell": (lambda: nn.LSTMCell(3, 4), draw_step, {"name": "weight_hh"}),
    "vector": (lambda: nn.LayerNorm(6), dense(3, 6), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_layer_trains_as_torch_s(case: str, seed: int) -> None:
    make, draw, options = CASES[case]

    def start() -> nn.Module:
        module = make().double()
        if case == "vector":
            nn.init.normal_(module.weight)
        return module

    twins = Twins(
        start, partial(spectral_norm, **options), partial(parametrizations.spectral_norm, **options), seed
    )
    twins.assert_equal()
    before = {key: value.clone() for key, value in twins.ours.state_dict().items()}
    twins.train([draw() for _ in range(4)])
    after = twins.ours.state_dict()
    assert all(not torch.equal(before[key], after[key]) for key in before if key.endswith("original"))  # it did train


def test_a_layer_registered_in_eval_mode_equals_torch_s(seed: int) -> None:
    twins = Twins(lambda: nn.Linear(5, 7).double().eval(), spectral_norm, parametrizations.spectral_norm, seed)
    twins.assert_equal()
    twins.ours.train()
    twins.theirs.train()
    twins.train([dense(3, 5)() for _ in range(2)])


def test_a_single_weight_becomes_its_sign() -> None:
    module = spectral_norm(nn.Linear(1, 1).double())
    module(torch.ones(1, 1, dtype=torch.float64)).sum().backward()
    original = module.parametrizations.weight.original
    assert torch.allclose(module.weight, original.sign())
    assert original.grad.abs().max() < 1e-12


def test_two_weights_of_a_layer(seed: int) -> None:
    def normalize(module: nn.Module, one: Callable[..., nn.Module]) -> None:
        for name in ("weight_ih_l0", "weight_hh_l0"):
            one(module, name)

    twins = Twins(
        lambda: nn.LSTM(3, 4).double(),
        lambda m: normalize(m, spectral_norm),
        lambda m: normalize(m, parametrizations.spectral_norm),
        seed,
    )
    twins.train([dense(5, 2, 3)() for _ in range(3)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype: torch.dtype) -> None:
    module = spectral_norm(nn.Linear(33, 20).to(dtype))
    exact = nn.Linear(33, 20).double()
    with torch.no_grad():
        exact.weight.copy_(module.parametrizations.weight.original)
    for _ in range(30):
        module.zero_grad()
        module(torch.ones(2, 33, dtype=dtype)).sum().backward()
    assert module.weight.dtype == module.parametrizations.weight.original.grad.dtype == dtype
    sigma = torch.linalg.matrix_norm(exact.weight.detach(), 2)
    assert torch.allclose(module.eval().weight.double(), exact.weight / sigma, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_extreme_scales(scale: float) -> None:
    module = nn.Linear(33, 20)
    with torch.no_grad():
        module.weight.mul_(scale)
    module = spectral_norm(module, eps=1e-30)
    original = module.parametrizations.weight.original
    for _ in range(30):
        module(torch.ones(2, 33)).sum().backward()
        assert torch.isfinite(original.grad).all()
    largest = torch.linalg.matrix_norm(module.eval().weight.double(), 2)
    assert abs(largest - 1) < 0.02


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_norm_is_named_and_nothing_changes(value: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3).double())
    for layer in model:
        spectral_norm(layer)
    list_of_weights = lists_of(model[1])["weight"]
    with torch.no_grad():
        list_of_weights.original[1, 2] = value
        if value == 0:
            list_of_weights.original.zero_()
    before = {key: t.clone() for key, t in model[1].state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the largest singular value of weight is (0\.0|nan|inf)"):
        model[1](torch.ones(1, 4, dtype=torch.float64))
    for key, t in model[1].state_dict().items():
        assert torch.equal(t, before[key]) or torch.equal(t.isnan(), before[key].isnan()), key
    assert torch.equal(before["parametrizations.weight.0._u"], model[1].state_dict()["parametrizations.weight.0._u"])


def test_weights_of_other_kinds_keep_their_vectors_when_one_fails() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(4, 3), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(x) + self.wide(x.double())

    for broken in ("narrow", "wide"):
        model = spectral_norm_model(Mixed(), types=(nn.Linear,), preserve_eval=False)
        before = {key: b.clone() for key, b in model.named_buffers()}
        nn.init.zeros_(lists_of(getattr(model, broken))["weight"].original)
        with pytest.raises(RuntimeError, match=f"{broken}.weight is 0"):
            model(torch.ones(1, 4))
        assert all(torch.equal(b, before[key]) for key, b in model.named_buffers())
