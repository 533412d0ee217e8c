"""The network against a twin that is written literally from the paper, and every option of it."""

import copy
import json
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.nn.spectral_norm import is_normalized, spectral_norm_model


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs))


class TwinBlock(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(inputs, width, 1), conv_bn(width, width, 3, stride)
        self.c = conv_bn(width, 4 * width, 1)
        self.skip = conv_bn(inputs, 4 * width, 1, stride) if inputs != 4 * width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return (self.c(self.b(self.a(x).relu()).relu()) + self.skip(x)).relu()


class Twin(nn.Module):
    """Sections II-B to II-D of the paper, in the order of its sentences."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64, 7, 2)
        stages, inputs = [], 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 1)):
            blocks = [TwinBlock(inputs if i == 0 else 4 * width, width, stride if i == 0 else 1) for i in range(depth)]
            stages.append(nn.Sequential(*blocks))
            inputs = 4 * width
        self.stages = nn.ModuleList(stages)
        self.gamma = nn.Parameter(torch.zeros(()))
        self.g, self.f, self.h = (nn.Conv2d(1024, 128, 1, bias=False) for _ in range(3))
        self.v = nn.Conv2d(128, 1024, 1, bias=False)
        self.reduce, self.bn = nn.Conv2d(2048, 1024, 1, bias=False), nn.BatchNorm1d(1024)
        self.heads = nn.ModuleList(nn.Linear(1024, classes) for _ in range(4))
        for module in list(self.modules()):
            if isinstance(module, nn.Conv2d):
                parametrizations.spectral_norm(module)

    def attend(self, x: Tensor) -> Tensor:
        s = self.f(x).flatten(2).transpose(1, 2) @ self.g(x).flatten(2)  # s_ij = f(x_i)ᵀ g(x_j)
        beta = s.softmax(dim=1)  # over i
        a = self.v((self.h(x).flatten(2) @ beta).unflatten(2, x.shape[2:]))
        return self.gamma * a + x

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        x = nn.functional.max_pool2d(self.stem(x).relu(), 3, 2, 1)
        for i, stage in enumerate(self.stages):
            x = self.attend(stage(x)) if i == 2 else stage(x)
        feature = self.reduce(x.flatten(2).max(dim=2).values[:, :, None, None]).flatten(1)
        shared = nn.functional.dropout(self.bn(feature).relu(), 0.5, self.training)
        return [head(shared) for head in self.heads], feature


def parameters(model: nn.Module) -> list[nn.Parameter]:
    """γ first, then the rest in order: the two networks agree in that."""
    named = dict(model.named_parameters())
    return sorted(named.values(), key=lambda p: p.dim() != 0)


def test_equals_the_twin() -> None:
    torch.manual_seed(0)
    ours, twin = SABMN(5, weights="none").double(), Twin(5).double()
    with torch.no_grad():
        ours.attention.gamma.fill_(0.7)
        for target, source in zip(parameters(twin), parameters(ours), strict=True):
            assert target.shape == source.shape
            target.copy_(source)
        for target, source in zip(twin.buffers(), ours.buffers(), strict=True):
            assert target.shape == source.shape
            target.copy_(source)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (ours, twin)]
    labels = torch.tensor([0, 3, 1, 4])
    for step in range(2):
        images = torch.randn(4, 3, 64, 32, dtype=torch.float64)
        torch.manual_seed(step)
        logits = ours(images)
        torch.manual_seed(step)
        with parametrize.cached():
            twin_logits, _ = twin(images)
        for ours_head, twin_head in zip(logits, twin_logits, strict=True):
            assert torch.allclose(ours_head, twin_head, atol=1e-9)
        for optimizer, outputs in zip(optimizers, (logits, twin_logits), strict=True):
            optimizer.zero_grad()
            sum(nn.functional.cross_entropy(head, labels) for head in outputs).backward()
        for our_parameter, twin_parameter in zip(parameters(ours), parameters(twin), strict=True):
            scale = twin_parameter.grad.abs().max()
            assert scale > 0
            assert (our_parameter.grad - twin_parameter.grad).abs().max() <= 1e-8 * scale + 1e-12
        for optimizer in optimizers:
            optimizer.step()
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    with parametrize.cached():
        expected = twin.eval()(images)[1]
    assert torch.allclose(ours.eval()(images), expected, atol=1e-9)


def test_parameters_of_the_papers_network() -> None:
    network = SABMN(751, weights="none")
    assert sum(p.numel() for p in network.parameters()) == 29_210_621
    assert sum(is_normalized(module) for module in network.modules()) == 58  # 53 + 4 of the attention + the added one
    assert not any(is_normalized(classifier) for classifier in network.classifiers)
    groups = network.parameter_groups()
    assert sum(p.numel() for p in groups["backbone"]) == 23_508_032
    assert sum(p.numel() for p in groups["attention"]) == 524_289
    assert sum(len(group) for group in groups.values()) == len(list(network.parameters()))


@pytest.mark.parametrize(
    "options",
    [
        {"backbone": "resnet34", "attention_stage": 1, "reduction": 4, "num_classifiers": 1},
        {"backbone": "resnet18", "attention_stage": 2, "reduction": 2, "feature_dim": 64, "pooling": "avg"},
        {"backbone": "resnet18", "attention_stage": 4, "reduction": 1, "spectral_norm": False, "feature_bias": True},
        {"backbone": "resnet18", "attention_stage": None, "num_classifiers": 2, "last_stride": 2},
    ],
)
def test_options(options: dict[str, object]) -> None:
    network = SABMN(7, weights="none", **options)
    logits = network(torch.randn(3, 3, 64, 32))
    assert [head.shape for head in logits] == [(3, 7)] * options.get("num_classifiers", 4)
    sum(head.square().sum() for head in logits).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert network.eval()(torch.randn(3, 3, 64, 32)).shape == (3, options.get("feature_dim", 1024))
    assert any(map(is_normalized, network.modules())) == options.get("spectral_norm", True)
    rebuilt = SABMN(**json.loads(json.dumps(network.config)), weights="none")
    rebuilt.load_state_dict(network.state_dict())
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(rebuilt.eval()(x), network(x))


def test_bn_neck(seed: int) -> None:
    """Before it: the triplet's feature, as without a neck. After it: classifiers and retrieval, the same features."""
    torch.manual_seed(seed)
    options = {"backbone": "resnet18", "weights": "none", "feature_dim": 24, "dropout": 0.0, "spectral_norm": False}
    network = SABMN(5, bn_neck=True, **options).double()
    plain = SABMN(5, **options).double()
    network.with_feature = plain.with_feature = True
    missing = plain.load_state_dict(network.state_dict(), strict=False).missing_keys
    assert missing == [f"classifiers.{i}.bias" for i in range(4)]
    images = torch.randn(6, 3, 32, 16, dtype=torch.float64)
    with torch.no_grad():
        network.attention.gamma.fill_(0.5)
        network.feature_norm.weight.uniform_(0.5, 2)
    plain.load_state_dict(network.state_dict(), strict=False)
    logits, before = network(images)
    assert torch.equal(plain(images)[1], before)
    centred = before - before.mean(0)
    after = network.feature_norm.weight * centred / (before.var(0, unbiased=False) + network.feature_norm.eps).sqrt()
    assert (after < 0).any(), "a ReLU would show"
    for head, classifier in zip(logits, network.classifiers, strict=True):
        assert torch.allclose(head, after @ classifier.weight.T, atol=1e-12)
    (sum(head.square().sum() for head in logits) + before.square().sum()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None] == ["feature_norm.bias"]
    assert not network.feature_norm.bias.any()

    neck, before = network.eval().feature_norm, plain.eval()(images)
    expected = neck.weight * (before - neck.running_mean) / (neck.running_var + neck.eps).sqrt()
    assert torch.allclose(network(images), expected, atol=1e-12)
    assert not torch.allclose(network(images), before, atol=0.1)
    rebuilt = SABMN(**json.loads(json.dumps(network.config)), weights="none").double()
    rebuilt.load_state_dict(network.state_dict())
    assert torch.equal(rebuilt.eval()(images), network(images))


def test_deeper_backbones() -> None:
    for backbone, weights in (("resnet101", 104), ("resnet152", 155)):
        network = SABMN(3, backbone=backbone, weights="none", spectral_norm=False)
        convolutions = [m for m in network.backbone.modules() if isinstance(m, nn.Conv2d)]
        assert len(convolutions) == weights


def test_last_stride_keeps_the_map_large() -> None:
    network = SABMN(3, backbone="resnet18", weights="none", attention_stage=4)
    shapes: list[torch.Size] = []
    network.attention.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    network.eval()(torch.randn(1, 3, 256, 128))
    assert shapes == [(1, 512, 16, 8)]


def test_normalising_later_keeps_what_the_network_computes() -> None:
    """The feature keeps its direction (its own convolution is divided by σ), the logits all of themselves."""
    torch.manual_seed(1)
    plain = SABMN(4, backbone="resnet18", spectral_norm=False, weights="none", dropout=0.0)
    with torch.no_grad():
        for _ in range(3):
            plain(torch.randn(8, 3, 64, 32))
    plain.eval()
    images = torch.randn(4, 3, 64, 32)
    expected = plain(images)
    normalised = copy.deepcopy(plain)
    with pytest.warns(UserWarning, match=r"attention\.query: it does not appear in the traced forward"):
        spectral_norm_model(normalised)
    cosine = nn.functional.cosine_similarity(normalised(images), expected)
    assert (1 - cosine).max() < 1e-5
    heads = [
        network.classifiers[0](network.feature_norm(network(images)).relu()) for network in (plain, normalised)
    ]
    assert torch.allclose(heads[0], heads[1], rtol=1e-3, atol=1e-5)


def test_no_warning_at_construction() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SABMN(4, backbone="resnet18", weights="none")


def test_channels_last_and_autocast() -> None:
    torch.manual_seed(2)
    network = SABMN(4, backbone="resnet18", weights="none").eval()
    with torch.no_grad():
        network.attention.gamma.fill_(0.5)
        images = torch.randn(2, 3, 64, 32)
        expected = network(images)
        last = network.to(memory_format=torch.channels_last)
        assert torch.allclose(last(images.to(memory_format=torch.channels_last)), expected, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            low = network(images)
    assert nn.functional.cosine_similarity(low.float(), expected).min() > 0.99


def test_compiles_without_a_graph_break() -> None:
    torch.manual_seed(3)
    network = SABMN(4, backbone="resnet18", weights="none", dropout=0.0, feature_dim=32)
    with torch.no_grad():
        network.attention.gamma.fill_(0.5)
    network.double()  # rounding grows a thousandfold on the way back through so few positions
    twin = copy.deepcopy(network)
    images = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for model in (compiled, twin):
        sum(head.square().sum() for head in model(images)).backward()
    for ours, plain in zip(network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, plain.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes is 0"),
        ({"attention_stage": 5}, "attention_stage is 5, expected 1, 2, 3, 4 or None"),
        ({"backbone": "vgg16"}, "backbone 'vgg16' is unknown; expected one of resnet18"),
        ({"pooling": "gem"}, "pooling 'gem' is unknown; expected one of max, avg"),
        ({"last_stride": 3}, "last_stride is 3, expected 1 or 2"),
        ({"num_classifiers": 0}, "num_classifiers is 0"),
    ],
)
def test_clear_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SABMN(**{"num_classes": 3, "weights": "none", **options})
