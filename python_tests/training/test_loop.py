"""The optimisation step and the loop: losses, faults, held-out identities, precision, curves."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sabmn_ext import evaluate
from sabmn_ext.train import main
from sabmn_ext.training import loop
from sabmn_ext.training.checkpoint import load_checkpoint, load_model
from sabmn_ext.training.config import Config, set_key
from sabmn_ext.training.loop import split_identities, step_seed, train_step
from sabmn_ext.training.triplet import batch_hard_triplet_loss

FIGURES = {
    *("map", "map_trapezoid", "minp", "rank1", "rank5", "rank10", "chance_map"),
    *("num_queries", "num_valid_queries", "num_gallery"),
}


class TwoHeads(nn.Module):
    """Any module that returns a list of logits."""

    def __init__(self, classes=3):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(6, classes) for _ in range(2))

    def forward(self, x):
        return [head(x) for head in self.heads]


@pytest.fixture
def batch():
    torch.manual_seed(3)
    return torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_train_step_sums_the_cross_entropies(batch, smoothing):
    images, labels = batch
    model, twin = TwoHeads(), TwoHeads()
    twin.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(3):
        loss, correct = train_step(model, images, labels, optimizer, label_smoothing=smoothing)
        logits = twin(images)
        expected = sum(F.cross_entropy(each, labels, label_smoothing=smoothing) for each in logits)
        other.zero_grad()
        expected.backward()
        other.step()
        torch.testing.assert_close(loss, expected.detach())
        assert int(correct) == int(((logits[0] + logits[1]).argmax(1) == labels).sum())
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


class WithFeature(TwoHeads):
    """And its feature before the heads."""

    def forward(self, x):
        return super().forward(x), 2 * x


@pytest.mark.parametrize("margin", [None, 0.3])
def test_train_step_adds_the_triplet_loss(batch, margin):
    images, labels = batch
    plain, both = TwoHeads(), WithFeature()
    both.load_state_dict(plain.state_dict())
    standing = torch.optim.SGD(both.parameters(), lr=0.0)
    losses, gradients = [], []
    for model, weight in ((plain, 0.0), (both, 0.7)):
        x = images.clone().requires_grad_()
        losses.append(train_step(model, x, labels, standing, triplet=weight, triplet_margin=margin)[0])
        gradients.append(x.grad)
    x = images.clone().requires_grad_()
    triplets = batch_hard_triplet_loss(2 * x, labels, margin)
    triplets.backward()
    torch.testing.assert_close(losses[1], losses[0] + 0.7 * triplets.detach())
    torch.testing.assert_close(gradients[1], gradients[0] + 0.7 * x.grad)
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_train_step_in_low_precision(batch, precision):
    images, labels = batch
    model, twin = TwoHeads(), TwoHeads()
    twin.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss, _ = train_step(model, images, labels, optimizer, precision=precision, scaler=scaler)
    expected, _ = train_step(twin, images, labels, torch.optim.SGD(twin.parameters(), lr=0.1))
    assert loss.dtype == torch.float32
    assert loss != expected, "autocast was not on"
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_step_seeds_differ_and_are_fixed():
    seeds = {step_seed(seed, step) for seed in range(20) for step in range(200)}
    assert len(seeds) == 4000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 0) == 6213027144842677344


def run(options, out, *more):
    assert main([*options, "--out", str(out), *more]) == 0
    return json.loads((out / "result.json").read_text())


def test_result_and_files_of_a_run(options, tmp_path):
    out = tmp_path / "run"
    result = run(options, out)
    assert set(result) == FIGURES | {
        *("gamma", "attention_ratio", "map_gamma_zero", "seconds", "steps", "recipe", "data", "untrained", "best"),
        *("intervals", "verification", "counterfactuals", "flip", "loss"),
    }
    assert set(result["untrained"]) == FIGURES
    assert result["num_queries"] == 3
    assert result["num_gallery"] == 9
    assert 0 < result["map_trapezoid"] <= result["map"] <= 1
    assert result["steps"] == 12
    assert result["best"] is None
    model, config = load_model(out / "last.pt")
    assert not model.training
    assert result["gamma"] == model.attention.gamma.item() != 0
    assert 0 < result["attention_ratio"] < 1
    assert config["image"] == {"height": 64, "width": 32}
    assert model(torch.zeros(2, 3, 64, 32)).shape == (2, 32)
    assert not (out / "best.pt").exists()
    assert evaluate.main(["--checkpoint", str(out / "last.pt"), "--device", "cpu"]) == 0
    again = json.loads((out / "last.evaluation.json").read_text())
    assert {key: again[key] for key in FIGURES} == {key: result[key] for key in FIGURES}
    assert (again["flip"], again["verification"]) == (result["flip"], result["verification"])  # what search takes
    lines = (out / "log.txt").read_text().splitlines()
    assert f"loss {result['loss']:.4f}" in lines[-1]
    assert [line.split()[:4] for line in lines] == [["epoch", f"{e}/3", "step", str(4 * e)] for e in (1, 2, 3)]
    assert "rate backbone 1.00e-03  rate added 1.00e-02" in lines[1]
    assert "rate backbone 1.00e-04  rate added 1.00e-03" in lines[2]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    wanted = {"loss", "accuracy", "rate/backbone", "rate/added", "gamma", "images_per_second"}
    assert set(reader.Tags()["scalars"]) == wanted
    for name in wanted:
        assert [event.step for event in reader.Scalars(name)][-1] == 12
    assert reader.Scalars("gamma")[-1].value == pytest.approx(result["gamma"], rel=1e-6)


def test_a_run_ends_with_a_report(options, tmp_path, capsys):
    out = tmp_path / "run"
    on = ["--set", "run.report=true", "--set", "evaluation.counterfactuals=true", "--max-steps", "2"]
    result = run(options, out, *on)
    found = result["counterfactuals"]
    assert set(found) == {"confidence", "num_identities", "gamma_zero", "uniform", "shuffled", "folded"}
    assert result["map_gamma_zero"] == found["gamma_zero"]["map"]["value"]
    assert result["intervals"]["map"][0] <= result["map"] <= result["intervals"]["map"][1]
    assert f"report: {out / 'report' / 'report.html'}" in capsys.readouterr().out
    page = (out / "report" / "report.html").read_text()
    assert f"<td>{100 * result['map']:.2f}</td>" in page
    assert f"<td>{100 * result['untrained']['map']:.2f}</td>" in page
    assert "max_steps = 2" in page
    pictures = {file.name for file in (out / "report").glob("*.png")}
    assert pictures >= {"loss.png", "gamma.png", "cmc.png", "counterfactuals.png", "query3_attention.png"}


def test_without_attention_its_figures_are_null(options, tmp_path):
    result = run(options, tmp_path / "run", "--set", "model.attention_stage=none", "--max-steps", "1")
    assert [result[key] for key in ("gamma", "attention_ratio", "map_gamma_zero")] == [None, None, None]
    assert result["steps"] == 1


@pytest.mark.parametrize("more", [["--precision", "bf16", "--channels-last"], ["--precision", "fp16"]])
def test_precisions_train_and_are_resumed_exactly(options, tmp_path, more, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = [*more, "--image-size", "32x16", "--batch-size", "4", "--max-steps", "3"]  # fp16 is slow on a CPU
    assert main([*options, *more, "--out", str(whole)]) == 0
    calls = []

    def step(*args, **kwargs):
        calls.append(kwargs["precision"])
        if len(calls) == 2:
            loop.os.kill(loop.os.getpid(), 15)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    assert main([*options, *more, "--out", str(parts)]) == 143
    assert main(["--out", str(parts), "--resume"]) == 0
    assert calls == [more[1]] * 3
    a, b = (load_checkpoint(folder / "last.pt") for folder in (whole, parts))
    assert all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())
    assert a["scaler"] == b["scaler"]
    assert (a["scaler"] is not None) == ("fp16" in more)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch, capsys, value):
    out = tmp_path / "run"
    count = []

    def step(*args, **kwargs):
        loss, correct = train_step(*args, **kwargs)
        count.append(1)
        return (torch.tensor(value) if len(count) == 7 else loss), correct

    monkeypatch.setattr(loop, "train_step", step)
    assert main([*options, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert f"the loss is {value} at step 7 (epoch 2)" in message
    assert str(out / "last.pt") in message
    assert "after step 4" in message
    assert load_checkpoint(out / "last.pt")["step"] == 4


def test_a_training_that_really_diverges_says_so(options, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*options, "--backbone-rate", "1e30", "--added-rate", "1e30", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "the training diverged" in message
    assert "at step" in message
    assert "after step 0" in message
    assert load_checkpoint(out / "last.pt")["step"] == 0


def test_weights_that_are_not_finite_are_not_saved(options, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    count = []

    def step(model, *args, **kwargs):
        outcome = train_step(model, *args, **kwargs)
        count.append(1)
        if len(count) == 8:  # the epoch's last step: its loss was still finite
            model.feature.bias = nn.Parameter(torch.full((32,), float("nan")))
        return outcome

    monkeypatch.setattr(loop, "train_step", step)
    assert main([*options, "--set", "model.feature_bias=true", "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert "feature.bias has values that are not finite at step 8" in message
    assert load_checkpoint(out / "last.pt")["step"] == 4


def test_best_needs_held_out_identities(options, tmp_path, monkeypatch):
    seen = []
    real = loop.score

    def score(query, gallery, cameras, config, job):
        assert query is gallery, "leave-one-out"
        assert 0 < real(query, gallery, cameras, config).map <= 1
        seen.append({record.pid for record in query[1]})
        return type("Scored", (), {"map": [0.2, 0.7, 0.4][len(seen) - 1]})()

    monkeypatch.setattr(loop, "score", score)
    out = tmp_path / "run"
    more = ["--val-ids", "0.25", "--set", "evaluation.val_every=1", "--set", "model.num_classifiers=1"]
    result = run(options, out, *more)
    held, train = seen[0], set(range(2, 18, 2))
    assert len(held) == 2
    assert held < train
    assert all(pids == held for pids in seen)
    assert len(seen) == 3
    assert result["best"] == {"epoch": 2, "step": 6, "held_out_map": 0.7}
    best, last = load_checkpoint(out / "best.pt"), load_checkpoint(out / "last.pt")
    assert (best["step"], last["step"]) == (6, 9)
    assert "optimizer" not in best
    assert best["model_config"]["num_classes"] == 6, "held-out identities are not trained on"
    load_model(out / "best.pt")
    assert "held-out mAP 70.00%" in (out / "log.txt").read_text().splitlines()[1]


def test_split_is_a_function_of_the_seed(small_market):
    from sabmn_ext.data.records import load_data

    data = load_data(str(small_market))
    train, held = split_identities(data, 0.5, 1)
    again, _ = split_identities(data, 0.5, 1)
    assert train == again
    assert len(train.train) == len(held.train) == 16
    assert sorted(train.train + held.train) == sorted(data.train)
    assert any(split_identities(data, 0.5, seed)[0] != train for seed in range(2, 6))
    assert split_identities(data, 0.0, 1) == (data, None)
    with pytest.raises(ValueError, match=r"holds out 7 of 8 identities"):
        split_identities(data, 0.85, 1)


def test_errors_before_the_training(options, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main([*options, "--batch-size", "64", "--out", out]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: batch_size")
    assert "32" in message
    assert "64" in message
    with pytest.raises(ValueError, match=r"data\.path is not set"):
        loop.train(Config(), tmp_path / "other")
    config = Config()
    set_key(config, "run.device", "gpu")
    with pytest.raises(ValueError, match="expected auto, cpu, cuda"):
        loop.pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
            loop.pick_device("cuda")
