"""A run with every option beyond the paper, and all that is done with its checkpoint."""

import json
import os

import pytest
import torch

from sabmn_ext import Extractor, evaluate
from sabmn_ext.data.records import load_data
from sabmn_ext.nn.spectral_norm import is_normalized, remove_spectral_norm
from sabmn_ext.retrieval.export import export_checkpoint
from sabmn_ext.retrieval.features import extract_features
from sabmn_ext.train import main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint, load_model
from sabmn_ext.training.config import Config, differences, load_recipe


@pytest.fixture(scope="module")
def strong(small_market):
    """Options of a run of one epoch, 4 steps."""
    return [
        *("--recipe", "strong", "--data", str(small_market), "--weights", "none", "--backbone", "resnet18"),
        *("--image-size", "32x16", "--batch-size", "8", "--epochs", "1", "--device", "cpu"),
        *("--set", "model.feature_dim=32", "--set", "model.num_classifiers=2", "--set", "augment.padding=2"),
        *("--set", "train.images_per_identity=4", "--set", "schedule.warmup_steps=2"),
    ]


@pytest.fixture(scope="module")
def run(strong, tmp_path_factory):
    out = tmp_path_factory.mktemp("strong") / "run"
    assert main([*strong, "--out", str(out)]) == 0
    return out


def test_what_departs_from_the_paper():
    changed = {line.split(":")[0] for line in differences(Config(), load_recipe("strong"))}
    assert changed == {
        *("augment.padding", "model.bn_neck", "model.dropout", "train.images_per_identity", "train.label_smoothing"),
        *("train.triplet", "schedule.kind", "schedule.warmup_steps", "evaluation.metric"),
    }


def test_stopped_within_an_epoch_it_goes_on_exactly(strong, run, tmp_path, monkeypatch):
    seen = []
    real = loop.train_step

    def step(model, images, labels, optimizer, **options):
        seen.append(labels)
        assert (options["triplet"], options["triplet_margin"], options["label_smoothing"]) == (0.3, None, 0.1)
        if len(seen) == 2:
            os.kill(os.getpid(), 15)
        return real(model, images, labels, optimizer, **options)

    monkeypatch.setattr(loop, "train_step", step)
    out = tmp_path / "run"
    no_figures = ["--set", "run.report=false", "--set", "evaluation.counterfactuals=false"]
    assert main([*strong, *no_figures, "--out", str(out)]) == 143
    assert main(["--out", str(out), "--resume"]) == 0
    assert len(seen) == 4
    for labels in seen:
        identities = labels.view(2, 4)
        assert torch.equal(identities, identities[:, :1].expand(2, 4))
        assert identities[0, 0] != identities[1, 0]
    a, b = (load_checkpoint(folder / "last.pt") for folder in (run, out))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert not a["model"]["feature_norm.bias"].any()


def test_everything_that_uses_the_checkpoint(run, small_market, tmp_path):
    file = run / "last.pt"
    result = json.loads((run / "result.json").read_text())
    assert evaluate.main(["--checkpoint", str(file), "--device", "cpu"]) == 0
    again = json.loads((run / "last.evaluation.json").read_text())
    assert again["metric"] == "cosine"
    assert again["map"] == result["map"]
    assert result["counterfactuals"]["folded"]["map"]["drop"] == pytest.approx(0, abs=1e-6)
    assert "train.triplet" not in (page := (run / "report" / "report.html").read_text())
    assert "triplet = 0.3" in page
    assert (run / "report" / "query3_attention.png").exists()

    model, _ = load_model(file)
    records = load_data(str(small_market)).query
    sizes = {"height": 32, "width": 16, "batch_size": 4, "device": "cpu", "progress": False}
    features = extract_features(model, records, **sizes)
    assert torch.allclose(Extractor(file, device="cpu")([record.path for record in records]), features, atol=1e-5)
    remove_spectral_norm(model)
    assert not any(map(is_normalized, model.modules()))
    assert torch.allclose(extract_features(model, records, **sizes), features, atol=1e-4)
    export_checkpoint(file, tmp_path / "network.pt2", "torch-export")  # refuses features that are not the checkpoint's
    assert features.abs().max() > 1e-3
