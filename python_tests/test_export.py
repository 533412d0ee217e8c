"""``python -m sabmn_ext.export``: files that run without the package and give the checkpoint's features."""

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sabmn_ext
from sabmn_ext.data.transforms import normalize
from sabmn_ext.export import main
from sabmn_ext.retrieval import export
from sabmn_ext.retrieval.export import FORMATS, METADATA_FILE
from sabmn_ext.training.checkpoint import FORMAT
from sabmn_ext.training.config import load_recipe

missing = [name for name in FORMATS["onnx"].packages if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


@pytest.fixture(scope="module")
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network in which all parts count: spectral normalisation, attention, batch norm, mirror images."""
    torch.manual_seed(request.config.getoption("--seed"))
    model = sabmn_ext.SABMN(4, backbone="resnet18", feature_dim=24, weights="none")
    assert model.attention is not None
    nn.init.constant_(model.attention.gamma, 0.7)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    config = dataclasses.asdict(load_recipe("demo"))
    config["image"] = {"height": 48, "width": 32}
    config["evaluation"].update(flip=True, metric="cosine")
    config["run"]["precision"] = "bf16"
    path = tmp_path_factory.mktemp("run") / "last.pt"
    torch.save({"format": FORMAT, "model_config": model.config, "model": model.state_dict(), "config": config}, path)
    return path


@pytest.fixture(scope="module")
def extractor(checkpoint: Path) -> sabmn_ext.Extractor:
    extractor = sabmn_ext.Extractor(checkpoint, device="cpu")
    extractor.precision = "fp32"
    return extractor


@pytest.fixture(scope="module")
def images_and_features(
    request: pytest.FixtureRequest, extractor: sabmn_ext.Extractor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Five images, normalised, and the checkpoint's features in float32."""
    generator = torch.Generator().manual_seed(request.config.getoption("--seed"))
    images = normalize(torch.randint(0, 256, (5, 3, 48, 32), generator=generator, dtype=torch.uint8))
    features = extractor.features_of_normalized(images)
    # The mirror image has the same features; without the attention they are others.
    assert torch.allclose(extractor.features_of_normalized(images.flip(3)), features, rtol=1e-3, atol=1e-5)
    gamma = extractor.model.get_parameter("attention.gamma").data
    gamma.zero_()
    assert not torch.allclose(extractor.features_of_normalized(images), features, rtol=1e-2)
    gamma.fill_(0.7)
    return images, features


def check_metadata(found: dict[str, Any]) -> None:
    assert (found["height"], found["width"], found["feature_dim"], found["flip"]) == (48, 32, 24, True)
    assert (found["channel_order"], found["metric"], found["backbone"]) == ("RGB", "cosine", "resnet18")
    assert "bilinear" in found["interpolation"]
    pixels = torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1) * 50
    mean, std = (torch.tensor(found[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose((pixels - mean) / std, normalize(pixels))


def test_torch_export(
    checkpoint: Path,
    images_and_features: tuple[torch.Tensor, torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "network.pt2"
    out.write_bytes(b"an older file")
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--format", "torch-export"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: ")
    assert 0 <= float(printed.split("at most ")[1].split(" ")[0]) < 1e-5
    assert list(tmp_path.iterdir()) == [out]

    notes = {METADATA_FILE: ""}
    program = torch.export.load(out, extra_files=notes)
    check_metadata(json.loads(notes[METADATA_FILE]))
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in function")) for target in targets), targets
    assert not any("classifier" in key or "parametrizations" in key for key in program.state_dict)
    images, features = images_and_features
    network = program.module()
    for batch in (5, 1):
        difference = (network(images[:batch]) - features[:batch]).abs().max()
        assert difference <= 1e-5 * features.abs().max()


@needs_onnx
def test_onnx(checkpoint: Path, images_and_features: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "network.onnx"
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--format", "onnx"]) == 0
    assert list(tmp_path.iterdir()) == [out]
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    texts = session.get_modelmeta().custom_metadata_map
    words = {"producer", "backbone", "input", "output", "channel_order", "interpolation", "metric"}  # the rest is JSON
    check_metadata({key: text if key in words else json.loads(text) for key, text in texts.items()})
    (given,), (made,) = session.get_inputs(), session.get_outputs()
    assert (given.name, made.name) == ("images", "features")
    assert (given.shape[1:], made.shape[1:]) == ([3, 48, 32], [24])
    assert isinstance(given.shape[0], str)  # a name: any number
    images, features = images_and_features
    for batch in (5, 1):
        (found,) = session.run(["features"], {"images": images[:batch].numpy()})
        difference = np.abs(found - features[:batch].numpy()).max()
        assert difference <= 1e-5 * float(features.abs().max())


def error_of(capsys: pytest.CaptureFixture[str], checkpoint: Path, out: Path, format: str = "torch-export") -> str:
    capsys.readouterr()
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--format", format]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_arguments(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "network.pt2"
    assert "none.pt: no such file" in error_of(capsys, tmp_path / "none.pt", out)
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    assert "not a checkpoint of this sabmn_ext" in error_of(capsys, tmp_path / "foreign.pt", out)
    assert f"there is no folder {tmp_path}/absent" in error_of(capsys, checkpoint, tmp_path / "absent" / "network.pt2")
    assert "does not end in .pt2" in error_of(capsys, checkpoint, tmp_path / "network.onnx")
    with pytest.raises(SystemExit, match="2"):
        main(["--checkpoint", str(checkpoint), "--out", str(out), "--format", "tensorrt"])
    assert "invalid choice: 'tensorrt' (choose from" in capsys.readouterr().err
    for package in FORMATS["onnx"].packages:
        monkeypatch.setitem(sys.modules, package, None)
    message = error_of(capsys, checkpoint, tmp_path / "network.onnx", "onnx")
    assert "needs onnx, which cannot be imported" in message
    assert "pip install onnx onnxscript onnxruntime" in message
    assert [path.name for path in tmp_path.iterdir()] == ["foreign.pt"]


def test_a_file_with_other_features_is_not_written(
    checkpoint: Path,
    extractor: sabmn_ext.Extractor,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = [1.001, math.nan, 1.0]

    def save(program: Any, path: str, notes: dict[str, Any]) -> None:
        Path(path).write_bytes(b"network")

    def load(path: str) -> Any:
        assert Path(path).read_bytes() == b"network"
        factor = factors.pop(0)
        return lambda images: factor * extractor.features_of_normalized(images)

    monkeypatch.setattr(export, "Extractor", lambda *args, **options: extractor)
    monkeypatch.setattr(torch.export, "export", lambda *args, **options: None)
    monkeypatch.setitem(FORMATS, "torch-export", FORMATS["torch-export"]._replace(save=save, load=load))
    out = tmp_path / "network.pt2"
    for _ in range(2):
        assert "network.pt2 was not written: its features would differ" in error_of(capsys, checkpoint, out)
        assert not list(tmp_path.iterdir())
    assert main(["--checkpoint", str(checkpoint), "--out", str(out), "--format", "torch-export"]) == 0
    assert out.read_bytes() == b"network"
