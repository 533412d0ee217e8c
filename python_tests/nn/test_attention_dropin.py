"""SelfAttention2d in other people's networks, against the same network with the usual eager module in its place.

A SAGAN-like pair (Zhang et al., 2019) trained with a gradient penalty (Gulrajani et al., 2017), which takes second
derivatives through the block, and a ResNet-18 with the block after a stage: one training step each. float64 must be
equal but for rounding; float32 goes by the float64 rule.
"""

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from float64_rule import assert_close_to_float64
from sagan_module import CopiedAttention
from torch import Tensor, nn
from torch.nn import functional

from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.nn.resnet import ResNet
from sabmn_ext.ops import dispatch

MakeAttention = Callable[[int], nn.Module]
Results = dict[str, Tensor]

FLOAT64 = {"rtol": 0, "atol": 1e-11}  # for tensors of size 1


class OutputAlone(CopiedAttention):
    """Without the map, so that it can stand where our block does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class PaperAttention(nn.Module):
    """The re-ID form: narrow values and an output projection, no biases. Its parameters have our block's names."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, channels // 8, 1, bias=False) for _ in range(3))
        self.out = nn.Conv2d(channels // 8, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (layer(x).flatten(2) for layer in (self.query, self.key, self.value))  # [B, C/8, N]
        attention = torch.softmax(torch.bmm(query.transpose(1, 2), key), dim=-1)  # [B, N, N]
        out = torch.bmm(value, attention.transpose(1, 2)).unflatten(2, x.shape[2:])
        return self.gamma * self.out(out) + x


def wake(network: nn.Module, generator: torch.Generator) -> None:
    """γ, 0 at the start, is drawn from ±[0.5, 2]; queries and keys grow, so that the attention is far from uniform."""
    for module in network.modules():
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            sign = 1 if torch.rand((), generator=generator) < 0.5 else -1
            nn.init.constant_(module.gamma, sign * (0.5 + 1.5 * torch.rand((), generator=generator).item()))
            for name, parameter in module.named_parameters():
                if name.startswith(("query", "key")) and name.endswith("weight"):
                    parameter.data.mul_(4)


def expected_backend(dtype: torch.dtype) -> str:
    serves = dispatch.why_not("attention_forward", "cpu", torch.device("cpu"), dtype) is None
    return "cpu" if serves else "torch"


# ---- a GAN ----


class Generator(nn.Module):
    """[B, 16] → images [B, 3, 20, 12]; attention on the [32, 10, 6] map. SiLU, since its derivatives are continuous."""

    def __init__(self, make_attention: MakeAttention) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 32 * 5 * 3)
        self.conv1 = nn.ConvTranspose2d(32, 32, 4, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.attn1 = make_attention(32)
        self.conv2 = nn.ConvTranspose2d(32, 3, 4, 2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = functional.silu(self.linear(z)).view(-1, 32, 5, 3)
        return torch.tanh(self.conv2(self.attn1(functional.silu(self.bn1(self.conv1(x))))))


class Discriminator(nn.Module):
    """Images [B, 3, 20, 12] → scores [B]; attention on the [40, 10, 6] map."""

    def __init__(self, make_attention: MakeAttention) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 40, 4, 2, padding=1)
        self.attn1 = make_attention(40)
        self.conv2 = nn.Conv2d(40, 32, 4, 2, padding=1)
        self.linear = nn.Linear(32 * 5 * 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.attn1(functional.silu(self.conv1(images)))
        return self.linear(functional.silu(self.conv2(x)).flatten(1)).squeeze(1)


def gan_form(channels: int) -> SelfAttention2d:
    return SelfAttention2d(channels, out_proj=False, bias=True)


def gan(make_attention: MakeAttention) -> nn.ModuleDict:
    return nn.ModuleDict({"generator": Generator(make_attention), "discriminator": Discriminator(make_attention)})


def copied_gan(seed: int) -> nn.ModuleDict:
    torch.manual_seed(seed)
    theirs = gan(OutputAlone)
    wake(theirs, torch.Generator().manual_seed(seed))
    return theirs


def load_gan(state: dict[str, Tensor]) -> nn.ModuleDict:
    """Our GAN from the state dict of the copied one: the attention's part by load_sagan_state_dict."""
    ours = gan(gan_form).to(next(iter(state.values())).dtype)
    rest = {key: tensor for key, tensor in state.items() if ".attn1." not in key}
    missing, unexpected = ours.load_state_dict(rest, strict=False)
    assert not unexpected
    assert all(".attn1." in key for key in missing)
    for name in ours:
        prefix = f"{name}.attn1."
        part = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        ours[name].attn1.load_sagan_state_dict(part)
    return ours


def draw_gan_inputs(seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """z [B, 16], real images [B, 3, 20, 12], and where between real and generated the penalty is taken [B, 1, 1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 16, generator=generator)
    real = torch.rand(6, 3, 20, 12, generator=generator) * 2 - 1
    return z.to(dtype), real.to(dtype), torch.rand(6, 1, 1, 1, generator=generator).to(dtype)


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def train_gan(networks: nn.ModuleDict, seed: int) -> Results:
    """One step of each network: losses, all gradients (the penalty's own, too), and all parameters after it."""
    dtype = next(networks.parameters()).dtype
    z, real, mix = draw_gan_inputs(seed, dtype)
    generator, discriminator = networks["generator"], networks["discriminator"]
    optimizers = [torch.optim.SGD(network.parameters(), lr=0.05) for network in (discriminator, generator)]
    results: Results = {}

    fake = generator(z).detach()
    penalty = gradient_penalty(discriminator, real, fake, mix)
    loss = discriminator(fake).mean() - discriminator(real).mean() + 10 * penalty
    weights = {name: p for name, p in discriminator.named_parameters() if name != "linear.bias"}  # it adds no slope
    gradients = torch.autograd.grad(penalty, list(weights.values()), retain_graph=True)
    results |= {f"penalty's gradient of {name}": g for name, g in zip(weights, gradients, strict=True)}
    loss.backward()
    results |= {f"gradient of discriminator.{name}": p.grad for name, p in weights.items()}
    optimizers[0].step()

    generator_loss = -discriminator(generator(z)).mean()
    generator_loss.backward()
    results |= {f"gradient of generator.{name}": p.grad for name, p in generator.named_parameters()}
    optimizers[1].step()
    results |= {"discriminator's loss": loss, "generator's loss": generator_loss}
    results |= {f"{name} after the step": p for name, p in networks.named_parameters()}
    return {name.replace("_conv", ""): tensor.detach().clone() for name, tensor in results.items()}


def compare(ours: Results, plain: Results, exact: Results) -> None:
    """float64 equal but for rounding; float32 by the rule, each tensor brought to a size of about 1 first.

    A single number, as γ's gradient is, comes to 1/64: it is a sum whose terms may cancel, and one draw of plain
    torch's error says little. The gradient of a key bias is 0, whatever rounding leaves of it in the other network;
    every other one must not be.
    """
    assert ours.keys() == plain.keys() == exact.keys()
    for name, truth in exact.items():
        size, shape = truth.abs().max().item(), ours[name].shape  # γ is [1] in the copied module
        if name.endswith("key.bias"):
            assert ours[name].abs().max() < 1e-8, f"{name} is not 0"
            continue
        assert size > 1e-7, f"{name} is 0: it proves nothing"
        scale = 2.0 ** -math.frexp(size)[1] / (64 if truth.numel() == 1 else 1)
        our, other, expected = (t[name].reshape(shape) * scale for t in (ours, plain, exact))
        try:
            if our.dtype == torch.float64:
                torch.testing.assert_close(our, expected, **FLOAT64)
            else:
                assert_close_to_float64(our, other, expected)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gan_with_a_gradient_penalty(dtype: torch.dtype, seed: int) -> None:
    state = copied_gan(seed).state_dict()
    exact, theirs = gan(OutputAlone).double(), gan(OutputAlone).to(dtype)
    exact.load_state_dict(state)
    theirs.load_state_dict(state)
    ours = load_gan(theirs.state_dict())
    with dispatch.record() as calls:
        found = train_gan(ours, seed)
    compare(found, train_gan(theirs, seed), train_gan(exact, seed))
    backend = expected_backend(dtype)
    # Forward: generator twice, discriminator on fake, real, between, and once more for the generator.
    assert calls.count(("attention_forward", backend)) == 6
    assert {taken for _, taken in calls} == {backend}
    assert calls.count(("attention_backward", backend)) >= 5


def test_the_penalty_reaches_every_weight_of_the_block(seed: int) -> None:
    """Its gradient is a second derivative: a block whose backward pass is a constant for autograd would give none."""
    discriminator = load_gan(copied_gan(seed).double().state_dict())["discriminator"]
    z, real, mix = draw_gan_inputs(seed, torch.float64)
    fake = torch.tanh(functional.interpolate(z.view(6, 1, 4, 4), (20, 12))).expand(-1, 3, -1, -1)
    block = discriminator.attn1

    def penalty(**weights: Tensor) -> Tensor:
        parameters = {f"attn1.{name.replace('_', '.')}": weight for name, weight in weights.items()}
        return gradient_penalty(lambda x: torch.func.functional_call(discriminator, parameters, (x,)), real, fake, mix)

    for name in ("query_weight", "key_weight", "value_weight", "gamma"):
        weight = block.get_parameter(name.replace("_", "."))
        direction = torch.randn_like(weight)
        direction /= direction.norm()
        (gradient,) = torch.autograd.grad(penalty(**{name: weight}), weight)
        step = 1e-4
        difference = penalty(**{name: weight + step * direction}) - penalty(**{name: weight - step * direction})
        slope = (gradient * direction).sum()
        torch.testing.assert_close(slope, difference.detach() / (2 * step), rtol=1e-5, atol=1e-9)
        assert gradient.abs().max() > 1e-6


# ---- state dicts ----


def test_a_gan_checkpoint_from_a_file(seed: int) -> None:
    """Written by the copied module's network, read into ours: the same images and scores, in both memory formats."""
    theirs = copied_gan(seed).eval()
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    ours = load_gan(torch.load(file, weights_only=True)).eval()
    z, real, _ = draw_gan_inputs(seed, torch.float32)
    exact = copy.deepcopy(theirs).double()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = real.contiguous(memory_format=memory_format)
        with torch.no_grad():
            pairs = [(network["generator"](z), network["discriminator"](images)) for network in (ours, theirs)]
            truth = exact["generator"](z.double()), exact["discriminator"](images.double())
        for our, their, expected in zip(*pairs, truth, strict=True):
            assert_close_to_float64(our, their, expected)

    again = gan(gan_form).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again["generator"](z), ours["generator"](z)), "and ours is saved and loaded as any module is"


# ---- a ResNet ----


class Classifier(nn.Module):
    """ResNet-18 with attention after one stage, average pooling and a linear layer."""

    def __init__(self, make_attention: MakeAttention, stage: int) -> None:
        super().__init__()
        self.backbone = ResNet("resnet18", last_stride=1)
        before = self.backbone.get_submodule(f"layer{stage}")
        attended = nn.Sequential(before, make_attention(self.backbone.channels[stage - 1]))
        setattr(self.backbone, f"layer{stage}", attended)
        self.linear = nn.Linear(512, 7)

    def forward(self, images: Tensor) -> Tensor:
        return self.linear(self.backbone(images).mean((2, 3)))


def train_classifier(network: Classifier, seed: int) -> Results:
    """One step of SGD: the loss, all gradients, and the state dict after it, batch norm's statistics included."""
    generator = torch.Generator().manual_seed(seed)
    dtype = network.linear.weight.dtype
    images = torch.randn(4, 3, 80, 48, generator=generator).to(dtype)
    labels = torch.randint(7, (4,), generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loss = functional.cross_entropy(network(images), labels)
    loss.backward()
    optimizer.step()
    results = {"the loss": loss}
    results |= {f"gradient of {name}": parameter.grad for name, parameter in network.named_parameters()}
    results |= {f"{key} after the step": t for key, t in network.state_dict().items() if t.is_floating_point()}
    return {name: tensor.detach().clone() for name, tensor in results.items()}


# In float32 a ReLU behind the block may switch on one side and not on the other, for no fault of the block: there it
# stands last. What comes before it computes the same bits in both networks.
@pytest.mark.parametrize(("dtype", "stage"), [(torch.float64, 2), (torch.float64, 3), (torch.float32, 4)])
def test_a_resnet_trains_as_with_the_eager_block(dtype: torch.dtype, stage: int, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = Classifier(PaperAttention, stage)
    wake(theirs, torch.Generator().manual_seed(seed))
    exact = copy.deepcopy(theirs).double()
    theirs.to(dtype)
    ours = Classifier(SelfAttention2d, stage).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    with dispatch.record() as calls:
        found = train_classifier(ours, seed)
    compare(found, train_classifier(theirs, seed), train_classifier(exact, seed))
    backend = expected_backend(dtype)
    calls = [call for call in calls if call[0].startswith("attention")]
    assert calls == [("attention_forward", backend), ("attention_backward", backend)]
