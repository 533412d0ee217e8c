"""Eval mode before and after normalisation: batch norm's statistics move along, and what resists is reported."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sabmn_ext.nn.resnet import ResNet
from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.nn.spectral_norm import is_normalized, spectral_norm_model


def trained(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Some forwards in train mode, so that the running statistics are the model's own."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        for _ in range(3):
            model.train()(torch.randn(shape, generator=generator).to(next(model.parameters()).dtype))
    return model.eval()


def assert_preserved(model: nn.Module, x: Tensor, tolerance: float = 1e-3, careless: float = 0.1) -> None:
    """Eval mode computes the same on ``x``, without a warning, and would not were the statistics left alone."""
    with torch.no_grad():
        expected = model(x)
        untouched = spectral_norm_model(copy.deepcopy(model), preserve_eval=False)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spectral_norm_model(model)
        assert (model(x) - expected).norm() <= tolerance * expected.norm()
    assert (untouched - expected).norm() > careless * expected.norm()


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ("resnet18", 20),
        ("resnet50", 53),
        pytest.param("resnet34", 36, marks=pytest.mark.heavy),
        pytest.param("resnet101", 104, marks=pytest.mark.heavy),
        pytest.param("resnet152", 155, marks=pytest.mark.heavy),
    ],
)
def test_a_resnet(architecture: str, layers: int) -> None:
    model = trained(ResNet(architecture).double(), (2, 3, 64, 32))
    assert_preserved(model, torch.randn(1, 3, 64, 32, dtype=torch.float64), tolerance=1e-8)
    assert sum(is_normalized(m) for m in model.modules()) == layers


@pytest.mark.parametrize("architecture", ["resnet18", "resnet50"])
def test_a_resnet_in_single_precision(architecture: str) -> None:
    # Random networks of 101 and 152 layers enlarge float32's rounding errors to about 1e-3 by themselves.
    assert_preserved(trained(ResNet(architecture), (4, 3, 64, 32)), torch.randn(2, 3, 64, 32))


def test_sabmn() -> None:
    """All up to the added convolution, which makes the features: these keep their direction."""
    plain = trained(SABMN(5, backbone="resnet18", weights="none", spectral_norm=False), (4, 3, 64, 32))
    normalized = copy.deepcopy(plain)
    normalized._normalize()
    x = torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        expected = F.normalize(plain(x))
        assert (F.normalize(normalized(x)) - expected).norm() < 1e-3 * expected.norm()
        spectral_norm_model(plain, preserve_eval=False)
        assert (F.normalize(plain(x)) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg11_bn", "shufflenet_v2_x1_0"])
def test_torchvision(name: str) -> None:
    try:
        from torchvision import models
    except Exception:  # its wheel must match torch's exactly
        pytest.skip("torchvision is not here or does not belong to this torch")
    model = trained(getattr(models, name)().double(), (4, 3, 64, 64))
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="spectral normalisation changes")  # variances near eps
            spectral_norm_model(model)
        assert (model(x) - expected).norm() < 1e-6 * expected.norm()


class Depthwise(nn.Module):
    """MobileNet's block: 1×1, depthwise and 1×1 convolutions, each with its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, groups=12, bias=False),
            nn.Identity(),
            nn.BatchNorm2d(12),
            nn.ReLU6(),
            nn.Conv2d(12, 5, 1),
            nn.BatchNorm2d(5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_depthwise_convolutions() -> None:
    assert_preserved(trained(Depthwise(), (4, 3, 8, 8)), torch.randn(2, 3, 8, 8), tolerance=1e-5)


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 1e-3}, {"momentum": None}])
@pytest.mark.parametrize("layer", ["conv", "transposed", "linear"])
def test_batch_norms_and_biases_of_every_kind(layer: str, options: dict[str, object]) -> None:
    first: nn.Module
    if layer == "linear":
        model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9, **options))
        x = torch.randn(50, 6)
    else:
        first = nn.Conv2d(6, 9, 3) if layer == "conv" else nn.ConvTranspose2d(6, 9, 3)
        model = nn.Sequential(first, nn.BatchNorm2d(9, **options))
        x = torch.randn(50, 6, 4, 4)
    nn.init.normal_(model[0].bias, std=3.0)
    with torch.no_grad():
        for _ in range(20):
            model(x)
        expected = model.eval()(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spectral_norm_model(model, types=(nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
        assert is_normalized(model[0])
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_batch_norm_without_statistics_needs_none() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)).eval()
    x = torch.randn(4, 3, 8, 8)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral_norm_model(model)
    assert torch.allclose(model(x), expected, atol=1e-3)


class PreActivation(nn.Module):
    """Batch norm, ReLU, convolution: what the last convolution gives goes into a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.norm2(self.conv1(self.norm1(x).relu())).relu())


class Dense(nn.Module):
    """DenseNet's layer: its output is concatenated to its input, and batch norm comes after."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(torch.cat([x, self.conv2(self.norm1(self.conv1(x)).relu())], 1))


@pytest.mark.parametrize("make", [PreActivation, Dense])
def test_convolutions_without_a_batch_norm_of_their_own_are_reported(make: type[nn.Module]) -> None:
    model = trained(make(), (4, 3, 8, 8))
    x = torch.randn(2, 3, 8, 8)
    norm = model.norm2 if make is PreActivation else model.norm1
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        model(x)
        with pytest.warns(UserWarning, match="in eval mode") as caught:
            spectral_norm_model(model)
        seen = seen[:1]
        model(x)
    (message,) = [str(w.message) for w in caught]
    assert "conv1" not in message
    assert "conv2: no batch norm follows; its output is divided by" in message
    assert torch.allclose(seen[1], seen[0], atol=1e-5)


class Counting(nn.Module):
    """Its forward has a side effect."""

    def __init__(self) -> None:
        super().__init__()
        self.block = spectral_norm_model(nn.Sequential(nn.Conv2d(3, 3, 1)), preserve_eval=False)
        self.conv, self.norm, self.calls = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.norm(self.conv(self.block(x)))


def test_finding_out_what_follows_changes_nothing() -> None:
    model = Counting().eval()
    nn.init.uniform_(model.norm.running_var, 1, 2)
    model.conv.train()
    before = {key: t.clone() for key, t in model.block.state_dict().items()}
    spectral_norm_model(model)
    assert all(torch.equal(t, before[key]) for key, t in model.block.state_dict().items())
    assert model.calls == 0
    assert [m.training for m in (model, model.block, model.conv, model.norm)] == [False, False, True, False]


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


