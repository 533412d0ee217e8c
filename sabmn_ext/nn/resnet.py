"""ResNet (He et al., 2016) without its classifier, with torchvision's parameter names, so that its checkpoints load.

The 3×3 convolution of a bottleneck carries the stride, as in torchvision ("ResNet v1.5").
"""

import pickle
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sabmn_ext.nn.layer_calls import convolve, norm_act


class Downsample(nn.Sequential):
    """A convolution and its batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        convolution, norm = self
        return norm_act(norm, convolve(convolution, x))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions; ResNet-18 and -34."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_act(self.bn1, convolve(self.conv1, x), self.relu)
        return norm_act(self.bn2, convolve(self.conv2, out), self.relu, identity)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions; ResNet-50 and deeper."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = norm_act(self.bn1, convolve(self.conv1, x), self.relu)
        out = norm_act(self.bn2, convolve(self.conv2, out), self.relu)
        return norm_act(self.bn3, convolve(self.conv3, out), self.relu, identity)


ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """The convolutional part of a ResNet; [B, 3, H, W] → [B, channels[3], H/32, W/32] (H/16, W/16 for last_stride 1).

    Args:
        architecture: resnet18, resnet34, resnet50, resnet101 or resnet152.
        last_stride: the stride of the fourth stage, 2 in the original and 1 in re-ID networks.

    Attributes:
        channels: the output channels of the four stages.
    """

    def __init__(self, architecture: str, last_stride: int = 2) -> None:
        super().__init__()
        if architecture not in ARCHITECTURES:
            raise ValueError(f"backbone '{architecture}' is unknown; expected one of {', '.join(ARCHITECTURES)}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride is {last_stride}, expected 1 or 2")
        block, depths = ARCHITECTURES[architecture]
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        widths, strides = (64, 128, 256, 512), (1, 2, 2, last_stride)
        self.channels = tuple(width * block.expansion for width in widths)
        in_channels = (64, *self.channels)
        for i in range(4):
            stage = self._stage(block, in_channels[i], widths[i], depths[i], strides[i])
            self.add_module(f"layer{i + 1}", stage)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _stage(
        block: type[BasicBlock] | type[Bottleneck], in_channels: int, width: int, depth: int, stride: int
    ) -> nn.Sequential:
        out_channels = width * block.expansion
        downsample = None
        if stride != 1 or in_channels != out_channels:
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            downsample = Downsample(convolution, nn.BatchNorm2d(out_channels))
        blocks = [block(in_channels, width, stride, downsample)]
        blocks += [block(out_channels, width, 1, None) for _ in range(depth - 1)]
        return nn.Sequential(*blocks)

    def stem(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] → [B, 64, H/4, W/4]."""
        return self.maxpool(norm_act(self.bn1, self.conv1(x), self.relu))  # type: ignore[no-any-return]

    @property
    def stages(self) -> list[nn.Module]:
        """The four stages, in order."""
        return [self.get_submodule(f"layer{i}") for i in range(1, 5)]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return x


# torchvision's IMAGENET1K_V1 weights, those of the paper's time. The file names end in the first digits of their
# SHA-256, which torch.hub checks.
_HOST = "https://download.pytorch.org/models/"
IMAGENET_URLS = {
    "resnet18": _HOST + "resnet18-f37072fd.pth",
    "resnet34": _HOST + "resnet34-b627a593.pth",
    "resnet50": _HOST + "resnet50-0676ba61.pth",
    "resnet101": _HOST + "resnet101-63fe2227.pth",
    "resnet152": _HOST + "resnet152-394f9c45.pth",
}


# How the state dicts of other codes name a ResNet: the prefix of its keys, and what stands beside it. The last is a
# difference that the names do not show.
_ORIGINS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "torchvision or torchreid": ("", ("fc.", "classifier."), ""),
    "BoT (reid-strong-baseline)": (
        "base.", ("bottleneck.", "classifier."), "it has no ReLU after the first batch normalisation"
    ),
    "fast-reid": (
        "backbone.", ("heads.", "pixel_mean", "pixel_std"), "it pads nothing before the first pooling"
    ),
}  # fmt: skip


def load_backbone_weights(backbone: ResNet, architecture: str, weights: str) -> None:
    """Fill ``backbone`` from ImageNet weights or a file.

    Args:
        weights: ``"imagenet"`` (torchvision's, downloaded once into torch.hub's folder, hash checked), ``"none"``
            (leave the random start), or a file: a state dict of torchvision's, torchreid's, BoT's
            (reid-strong-baseline) or fast-reid's ResNet, or a checkpoint of theirs that holds one, of several GPUs
            (``module.``) too. Reading it never runs code from it.

    What does not belong to the backbone, such as a classifier, is left out and named in a warning, with what differs in
    the network that the weights come from: BoT's and fast-reid's compute a little else with the same weights.

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: no download possible, a file that cannot be read, or weights of another network.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        url = IMAGENET_URLS[architecture]
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"the ImageNet weights of {architecture} could not be downloaded from {url} ({error}). "
                "Either give a file: --weights FILE (in Python weights='FILE'), or start from random weights: "
                "--weights none (weights='none')"
            ) from error
    else:
        state = _read_state_dict(weights)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    names = [name for name, (prefix, _, _) in _ORIGINS.items() if f"{prefix}conv1.weight" in state]
    origin = names[0] if names else next(iter(_ORIGINS))
    prefix, beside, difference = _ORIGINS[origin]
    left_out = [key for key in state if key.startswith(beside)]
    state = {key.removeprefix(prefix): value for key, value in state.items() if key not in left_out}
    expected = backbone.state_dict()
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in expected]
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unexpected or wrong:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", wrong)]
        found = "; ".join(f"{len(keys)} {what}, such as '{keys[0]}'" for what, keys in parts if keys)
        raise RuntimeError(f"weights '{weights}' are not those of a {architecture}: {found}")
    backbone.load_state_dict(state, strict=False)
    if left_out and weights != "imagenet":
        note = f"; its network is not quite this one: {difference}" if difference else ""
        warnings.warn(
            f"weights '{weights}' of {origin}: not of the backbone and left out: {', '.join(left_out)}{note}",
            stacklevel=2,
        )


# What a pickled numpy number is made of, by the names that numpy 1 and numpy 2 write.
_NUMPY_NUMBERS: list[Any] = [
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float32)),
    type(np.dtype(np.float64)),
]


def _read_state_dict(path: str) -> dict[str, Tensor]:
    try:
        # torchreid's checkpoints hold a result as a numpy number beside the weights.
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"weights '{path}': no such file; expected imagenet, none, or a file") from None
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"weights '{path}' cannot be read as a torch checkpoint without running code from it. Where it holds a "
            f"whole network, write the weights alone with the program it comes from: torch.save(model.state_dict(), "
            f"FILE)"
        ) from error
    except Exception as error:  # torch.load raises many kinds for files that are not checkpoints
        reason = str(error).strip().split("\n")[0][:120]
        raise RuntimeError(f"weights '{path}' cannot be read as a torch checkpoint: {reason}") from error
    for key in ("state_dict", "model"):  # torchreid's checkpoints; fast-reid's
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RuntimeError(f"weights '{path}' hold no state dict (names and tensors)")
    return state
