"""Normalised networks under autocast."""

import copy
from collections.abc import Callable

import pytest
import torch
from float64_rule import assert_close_to_float64
from spectral_norm_twins import singular_vectors
from torch import Tensor, nn
from torch.nn import functional as F

from sabmn_ext.nn.spectral_norm import remove_spectral_norm, spectral_norm_model
from sabmn_ext.nn.spectral_norm_group import parametrizations
from sabmn_ext.ops import reference

HALF = [torch.bfloat16, torch.float16]


def autocast(dtype: torch.dtype, enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype, enabled=enabled)


class Net(nn.Module):
    """Records the dtype in which every layer got its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.turned, self.head = nn.Conv2d(3, 9, 3), nn.ConvTranspose2d(9, 5, 3), nn.Linear(5, 4)
        self.embedding = nn.Embedding(4, 4)
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.conv, self.turned, self.head, self.embedding)
        self.dtypes = [layer.weight.dtype for layer in layers]
        x = self.turned(self.conv(x).tanh())
        return self.head(x.mean((2, 3))) + self.embedding(torch.arange(x.shape[0]))


TYPES = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.Embedding)


def make() -> nn.Module:
    return spectral_norm_model(Net(), types=TYPES, preserve_eval=False)


def normalized_first(model: nn.Module, x: Tensor) -> Tensor:
    """The forward of ``Net`` in plain torch: weights are normalised in their own precision, autocast does the rest."""
    weights = []
    with autocast(torch.bfloat16, False):
        for layer in (model.conv, model.turned, model.head, model.embedding):
            (owner,) = parametrizations(layer).values()
            weight, norm = owner.original, owner[0]
            turned = norm.rows_first(weight)
            weights.append(norm.rows_back(reference.spectral_norm(turned, norm._u, norm._v, 1, norm.eps)[0]))
    x = F.conv2d(x, weights[0], model.conv.bias).tanh()
    x = F.conv_transpose2d(x, weights[1], model.turned.bias)
    return F.linear(x.mean((2, 3)), weights[2], model.head.bias) + weights[3][: x.shape[0]]


def gradients(
    model: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], x: Tensor, scale: float
) -> list[Tensor]:
    model.zero_grad()
    (forward(model, x).to(torch.float64).square().sum() * scale).backward()
    return [p.grad / scale for p in model.parameters()]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_those_of_normalizing_first_and_casting_then(dtype: torch.dtype, scale: float) -> None:
    model = make()
    x = torch.randn(4, 3, 8, 7)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    with autocast(dtype):
        ours = gradients(model, lambda m, x: m(x), x, scale)
        rounded = gradients(plain, normalized_first, x, scale)
    references = gradients(exact, normalized_first, x.double(), scale)
    assert model.dtypes == [dtype, dtype, dtype, torch.float32]
    for mine, theirs, reference_gradient in zip(ours, rounded, references, strict=True):
        assert mine.dtype == torch.float32
        # The weight was rounded to 16 bits: float32's own rounding is 1e-6 at most, float16's may be as little as 8e-5.
        assert (theirs - reference_gradient).abs().max() > 1e-5 * reference_gradient.abs().max() or theirs.dim() == 1
        assert_close_to_float64(mine, theirs, reference_gradient)


def test_u_and_v_are_those_without_autocast() -> None:
    model = make()
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 7)
    for _ in range(3):
        with autocast(torch.bfloat16):
            model(x)
        twin(x)
    for key, value in singular_vectors(twin).items():
        assert torch.equal(singular_vectors(model)[key], value)


def test_autocast_is_off_where_plain_torch_normalizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it would round the products with u and v."""
    monkeypatch.setenv("SABMN_BACKEND", "torch")
    specification, states = reference.spectral_norm, []

    def recorded(*args: object) -> object:
        states.append(torch.is_autocast_enabled("cpu"))
        return specification(*args)

    monkeypatch.setattr(reference, "spectral_norm", recorded)
    with autocast(torch.bfloat16):
        make()(torch.randn(4, 3, 8, 7))
        assert torch.is_autocast_enabled("cpu")
    assert states == [False] * 4


class Islands(nn.Module):
    """Autocast is off in a part of the forward, or on in a part only."""

    def __init__(self, outer: bool, inner: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 5, 3)
        self.outer, self.inner = outer, inner
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with autocast(torch.bfloat16, self.inner):
            self.dtypes = [self.second.weight.dtype]
            if not self.inner:
                x = x.float()
            x = self.second(x)
            self.dtypes.append(x.dtype)
        return x


@pytest.mark.parametrize("outer", [True, False])
def test_a_part_where_autocast_differs(outer: bool) -> None:
    model = spectral_norm_model(Islands(outer, not outer), preserve_eval=False)
    before = singular_vectors(model)
    x = torch.randn(2, 3, 8, 7)
    with autocast(torch.bfloat16, outer):
        model(x).float().square().sum().backward()
    # Read in float32 either way; autocast then casts it by itself where it is on.
    assert model.dtypes == [torch.float32, torch.float32 if outer else torch.bfloat16]
    (owner,) = parametrizations(model.second).values()
    norm = owner[0]
    with torch.no_grad():
        u, v = before["second.parametrizations.weight.0._u"], before["second.parametrizations.weight.0._v"]
        expected = reference.spectral_norm(owner.original, u, v, 1, 1e-12)
        assert torch.allclose(norm._u, expected[1], atol=1e-6)  # one update
        assert torch.allclose(model.eval().second.weight, expected[0], atol=1e-6)
    plain = copy.deepcopy(model)
    remove_spectral_norm(plain)
    gradient = torch.autograd.grad(
        F.conv2d(F.conv2d(x, plain.first.weight, plain.first.bias), plain.second.weight, plain.second.bias)
        .square()
        .sum(),
        plain.second.weight,
    )[0]
    tangent = reference.spectral_norm_backward(gradient, owner.original.detach(), norm._u, norm._v)
    assert (owner.original.grad - tangent).norm() < 0.03 * tangent.norm()


def test_weights_read_outside_of_the_forward_keep_their_dtype() -> None:
    model = make().eval()
    with autocast(torch.bfloat16):
        assert model.conv.weight.dtype == torch.float32
