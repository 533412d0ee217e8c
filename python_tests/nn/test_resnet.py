"""ResNet: torchvision's parameter names, and its checkpoints by address and by file."""

import hashlib
import importlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sabmn_ext.nn import resnet
from sabmn_ext.nn.resnet import ResNet, load_backbone_weights


def made_up_checkpoint(folder: Path, architecture: str = "resnet18") -> Path:
    """A file with the names and shapes of torchvision's, its classifier included, named by its hash as theirs are."""
    torch.manual_seed(0)
    network = ResNet(architecture)
    state = {**network.state_dict(), "fc.weight": torch.zeros(1000, network.channels[3]), "fc.bias": torch.zeros(1000)}
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2)
    path = folder / "checkpoint.pth"
    torch.save(state, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.rename(folder / f"{architecture}-{digest[:8]}.pth")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for downloaded weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_names_are_torchvisions() -> None:
    keys = set(ResNet("resnet50").state_dict())
    assert {"conv1.weight", "bn1.running_var", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"} <= keys
    assert {"layer3.5.conv3.weight", "layer4.2.bn3.num_batches_tracked"} <= keys
    assert len(keys) == 318  # torchvision's resnet50 has 320 with fc.weight and fc.bias
    assert sum(p.numel() for p in ResNet("resnet50").parameters()) == 23_508_032
    assert sum(p.numel() for p in ResNet("resnet18").parameters()) == 11_176_512


@pytest.mark.parametrize("architecture", list(resnet.ARCHITECTURES))
def test_equals_torchvision(architecture: str) -> None:
    try:
        models = importlib.import_module("torchvision.models")
    except Exception as error:  # absent (ImportError), or built for another torch (RuntimeError)
        pytest.skip(f"torchvision does not import: {error}")
    # In float64: with the statistics of so few positions float32's roundings grow to 0.1, in theirs as in ours.
    theirs = getattr(models, architecture)(weights=None).double()
    theirs.fc = nn.Identity()
    ours = ResNet(architecture).double()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    for train in (True, False):
        features = ours.train(train)(images).mean(dim=(2, 3))
        assert torch.allclose(features, theirs.train(train)(images), atol=1e-8)


def test_weights_from_a_file(tmp_path: Path) -> None:
    path = made_up_checkpoint(tmp_path)
    backbone = ResNet("resnet18", last_stride=1)
    load_backbone_weights(backbone, "resnet18", str(path))
    for key, value in torch.load(path).items():
        if not key.startswith("fc."):
            assert torch.equal(backbone.state_dict()[key], value)


def test_weights_by_address(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_up_checkpoint(tmp_path)
    monkeypatch.setitem(resnet.IMAGENET_URLS, "resnet18", path.as_uri())
    backbone = ResNet("resnet18")
    load_backbone_weights(backbone, "resnet18", "imagenet")
    assert torch.equal(backbone.conv1.weight, torch.load(path)["conv1.weight"])
    assert (hub / "hub" / "checkpoints" / path.name).exists()
    path.unlink()
    load_backbone_weights(ResNet("resnet18"), "resnet18", "imagenet")  # the second time from the folder


def test_a_wrong_hash_is_refused(tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made_up_checkpoint(tmp_path)
    path.write_bytes(path.read_bytes() + b"0")
    monkeypatch.setitem(resnet.IMAGENET_URLS, "resnet18", path.as_uri())
    with pytest.raises(RuntimeError, match="invalid hash"):
        load_backbone_weights(ResNet("resnet18"), "resnet18", "imagenet")


def test_no_download_possible_names_both_ways_out(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(resnet.IMAGENET_URLS, "resnet18", (tmp_path / "absent-00000000.pth").as_uri())
    with pytest.raises(RuntimeError, match=r"could not be downloaded.*--weights FILE.*--weights none"):
        load_backbone_weights(ResNet("resnet18"), "resnet18", "imagenet")


def test_files_that_are_not_these_weights(tmp_path: Path) -> None:
    backbone = ResNet("resnet50")
    with pytest.raises(RuntimeError, match=r"not those of a resnet50: \d+ missing, such as 'layer1.0.conv3.weight'"):
        load_backbone_weights(backbone, "resnet50", str(made_up_checkpoint(tmp_path)))
    with pytest.raises(FileNotFoundError, match="no such file; expected imagenet, none, or a file"):
        load_backbone_weights(backbone, "resnet50", str(tmp_path / "absent.pth"))
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    with pytest.raises(RuntimeError, match="cannot be read as a torch checkpoint"):
        load_backbone_weights(backbone, "resnet50", str(broken))
    listed = tmp_path / "list.pth"
    torch.save([1, 2], listed)
    with pytest.raises(RuntimeError, match="hold no state dict"):
        load_backbone_weights(backbone, "resnet50", str(listed))


def numbered(names: dict[str, torch.Size], start: float) -> dict[str, torch.Tensor]:
    """Tensors of these names and shapes, each full of a number of its own; a file of them is small."""
    return {key: torch.tensor(start + i).expand(shape) for i, (key, shape) in enumerate(names.items())}


def torchreid(state: dict[str, Any]) -> dict[str, Any]:
    head = {"fc.0.weight": (512, 2048), "fc.0.bias": (512,), "classifier.weight": (751, 512), "classifier.bias": (751,)}
    rank1, optimizer = np.float32(0.9), {"state": {}, "param_groups": [{"lr": 0.0003, "params": [0]}]}
    return {"state_dict": state | numbered(head, 0), "epoch": 60, "rank1": rank1, "optimizer": optimizer}


def bot(state: dict[str, Any]) -> dict[str, Any]:
    neck = {f"bottleneck.{name}": (2048,) for name in ("weight", "bias", "running_mean", "running_var")}
    return {f"base.{key}": v for key, v in state.items()} | numbered(neck | {"classifier.weight": (751, 2048)}, 0)


def fast_reid(state: dict[str, Any]) -> dict[str, Any]:
    neck = {f"heads.bottleneck.0.{name}": (2048,) for name in ("weight", "bias", "running_mean", "running_var")}
    head = neck | {"heads.pool_layer.p": (1,), "heads.weight": (751, 2048), "pixel_mean": (1, 3, 1, 1)}
    return {"model": {f"backbone.{key}": v for key, v in state.items()} | numbered(head, 0), "iteration": 9}


def of_several_gpus(state: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{key}": value for key, value in bot(state).items()}


def of_torchvision(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state)


@pytest.fixture(scope="module")
def resnet50() -> ResNet:
    return ResNet("resnet50", last_stride=1)


@pytest.mark.parametrize(
    ("origin", "left_out"),
    [
        (torchreid, "torchreid: not .*left out: fc.0.weight, fc.0.bias, classifier.weight, classifier.bias$"),
        (bot, "BoT .*left out: bottleneck.weight, .*, classifier.weight; .* no ReLU after the first batch norm"),
        (fast_reid, "fast-reid: .*left out: heads.bottleneck.0.weight, .* heads.weight, pixel_mean; .* pads no"),
        (of_several_gpus, "BoT .*left out: bottleneck.weight"),
        (of_torchvision, None),
    ],
)
def test_weights_of_other_codes(
    resnet50: ResNet, origin: Callable[..., Any], left_out: str | None, tmp_path: Path, seed: int
) -> None:
    expected = numbered({key: value.shape for key, value in resnet50.state_dict().items()}, seed + len(str(left_out)))
    torch.save(origin(expected), tmp_path / "weights.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_backbone_weights(resnet50, "resnet50", str(tmp_path / "weights.pth"))
    for key, value in resnet50.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (left_out is not None)
    assert all(re.search(str(left_out), message) for message in messages), messages


def test_other_networks_of_other_codes(resnet50: ResNet, tmp_path: Path) -> None:
    """What stands within or beside the backbone and changes what it computes is refused, not left out."""
    state = numbered({key: value.shape for key, value in resnet50.state_dict().items()}, 0)
    instance_norm = {key.replace("layer1.0.bn1", "layer1.0.bn1.BN"): value for key, value in state.items()}
    non_local = fast_reid(state)
    non_local["model"]["backbone.NL_2.0.g.weight"] = torch.zeros(1)
    for given, message in (
        (fast_reid(instance_norm), r"not those of a resnet50: 4 missing, such as 'layer1.0.bn1.weight'; 5 unexpected"),
        (non_local, r"not those of a resnet50: 1 unexpected, such as 'NL_2.0.g.weight'"),
        ({**state, "attention.gamma": torch.zeros(1)}, r"1 unexpected, such as 'attention.gamma'"),
    ):
        torch.save(given, tmp_path / "weights.pth")
        with pytest.raises(RuntimeError, match=message):
            load_backbone_weights(resnet50, "resnet50", str(tmp_path / "weights.pth"))
    torch.save(nn.Linear(2, 2), tmp_path / "network.pth")
    with pytest.raises(RuntimeError, match=r"without running code from it.*torch.save\(model.state_dict\(\), FILE\)"):
        load_backbone_weights(resnet50, "resnet50", str(tmp_path / "network.pth"))
