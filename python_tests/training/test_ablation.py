"""The ablation: what its rows train, that it goes on after a stop, and that a run which diverges is one more result."""

import json
import os
import signal

import pytest
import torch
from command_errors import error_of
from torch import nn

import sabmn_ext
from sabmn_ext import ablate
from sabmn_ext.report.ablation import markdown_table
from sabmn_ext.train import build_config, build_parser
from sabmn_ext.training import loop
from sabmn_ext.training.ablation import GROUPS, largest_sigmas, pick_rows
from sabmn_ext.training.config import differences, load_recipe


@pytest.fixture
def few(options):
    """Two small steps a run."""
    return [*options, "--image-size", "32x16", "--max-steps", "2", "--epochs", "1", "--seed", "3"]


def changes(name):
    (row,) = pick_rows([name])
    base = load_recipe("market1501")
    return set(differences(base, row.config(base, 0)))


def test_rows_change_what_they_say():
    one = {"model.attention_stage: 3 -> None", "model.num_classifiers: 4 -> 1"}
    assert changes("one") == one
    assert changes("four") == {"model.attention_stage: 3 -> None"}
    assert [changes(f"stage{stage}") for stage in (1, 2, 4)] == [
        {f"model.attention_stage: 3 -> {stage}"} for stage in (1, 2, 4)
    ]
    assert changes("stage3") == set(), "the proposed network"
    rates = {"train.rate_backbone: 0.001 -> 0.004", "train.rate_added: 0.01 -> 0.04"}
    assert changes("one-rate4") == one | rates
    assert changes("one-loss4") == one | {"train.loss_factor: 1.0 -> 4.0"}
    rates = {"train.rate_backbone: 0.001 -> 0.05", "train.rate_added: 0.01 -> 0.05"}
    assert changes("norm-on-0.05") == rates
    assert changes("norm-off-0.05") == rates | {"model.spectral_norm: True -> False"}
    base = load_recipe("demo")
    assert differences(base, pick_rows(["stage3"])[0].config(base, 7)) == ["run.seed: 0 -> 7"]


def test_rows_by_name_and_group():
    assert len(pick_rows([])) == 14
    assert [row.name for row in pick_rows(["stage3", "gradient", "one"])] == ["one", "stage3", "one-rate4", "one-loss4"]
    assert pick_rows(["paper"]) == list(GROUPS["paper"])
    with pytest.raises(ValueError, match="--rows stage5: expected groups or rows of paper, gradient, spectral, one,"):
        pick_rows(["one", "stage5"])


def test_it_goes_on_after_a_stop(few, tmp_path, monkeypatch, capsys):
    real_step, steps = loop.train_step, []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:  # the first one of the second row
            os.kill(os.getpid(), signal.SIGTERM)
        return real_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", step)
    command = [*few, "--rows", "one", "stage2", "--out", str(tmp_path)]
    assert ablate.main(command) == 143
    assert "the whole ablation with the same command" in capsys.readouterr().err
    assert [row["name"] for row in json.loads((tmp_path / "table.json").read_text())["rows"]] == ["one"]
    assert ablate.main(command) == 0
    assert len(steps) == 4, "two rows, two steps: none is taken twice"
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [(row["name"], row["seeds"]) for row in table] == [("one", [3]), ("stage2", [3])]
    for row in table:
        folder = tmp_path / row["name"] / "seed3"
        (run,) = row["runs"]
        assert run["result"] == json.loads((folder / "result.json").read_text())
        assert run["loss"] == run["result"]["loss"] > 0
        assert (run["steps"], run["not_finite"]) == (2, 0)
        assert load_recipe(str(folder / "config.toml")).run.seed == 3
        assert {file.name for file in folder.iterdir()} >= {"last.pt", "log.txt", "tensorboard"}
        assert not (folder / "previous.pt").exists()
        assert not (folder / "report").exists()
        assert row["title"] in printed
    assert (tmp_path / "table.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "table.md").read_text()
    assert text == markdown_table(table) + f"\nData {few[3]}, recipe market1501, seeds 3.\n"
    message = error_of(ablate.main, capsys, *command, "--set", "train.momentum=0.5")
    assert "holds a run under other settings: train.momentum: 0.9 -> 0.5" in message


def test_a_run_that_diverges_is_a_result(few, tmp_path, capsys):
    """The rates of the second row are its own."""
    wild = ["--backbone-rate", "1e30", "--added-rate", "1e30", "--rows", "stage3", "norm-off-0.01"]
    command = [*few, *wild, "--out", str(tmp_path)]
    assert ablate.main(command) == 0
    printed = capsys.readouterr().out
    assert "the training diverged" in printed
    diverged, other = json.loads((tmp_path / "table.json").read_text())["rows"]
    (run,) = diverged["runs"]
    assert run["result"] is None
    assert (run["not_finite"], run["steps"]) == (1, 2), "the step after the first one, which was still finite"
    assert diverged["summary"]["map"] == {"mean": None, "spread": None, "interval": None}
    assert other["runs"][0]["result"]["map"] > 0
    assert ablate.main(command) == 0
    assert "the training diverged" not in capsys.readouterr().out, "read, and not trained again"


def test_errors_are_one_line(few, tmp_path, capsys):
    for more, expected in (
        (["--rows", "two"], "--rows two: expected"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
        (["--seeds", "-1"], "run.seed = -1: expected at least 0"),
        (["--set", "train.epoch=3"], "near names: train.epochs"),
    ):
        assert expected in error_of(ablate.main, capsys, *few, "--out", tmp_path, *more)


def test_largest_sigmas():
    """Against the singular values themselves; a normalised weight counts as what the network computes with."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1), nn.Linear(7, 9))

    def largest(module):
        weights = [each.weight.double().flatten(1) for each in module if isinstance(each, nn.Conv2d)]
        return max(torch.linalg.matrix_norm(weight, 2).item() for weight in weights)

    plain, normalized = network(), sabmn_ext.spectral_norm_model(network(), preserve_eval=False)
    with torch.no_grad():
        for each in (plain[0].weight, plain[3].weight, normalized[0].parametrizations.weight.original):
            each *= 30
    found = largest_sigmas(plain.state_dict())
    assert found["sigma"] == found["sigma_stored"] == pytest.approx(largest(plain), rel=1e-9)
    used = largest_sigmas(normalized.state_dict())
    assert used["sigma_stored"] == pytest.approx(found["sigma"], rel=1e-9)
    assert used["sigma"] == pytest.approx(largest(normalized.eval()), rel=1e-5)
    assert 1 <= used["sigma"] < 1.1


def test_four_times_the_loss_is_four_times_the_gradient(few):
    config = build_config(build_parser().parse_args([*few, "--set", "train.loss_factor=4"]))
    assert config.train.loss_factor == 4.0
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    images, labels = torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    losses, gradients = [], []
    for factor in (1.0, 4.0):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        wrapped = nn.Sequential(layer)
        wrapped.forward = lambda x: [layer(x)]
        loss, _ = loop.train_step(wrapped, images, labels, optimizer, loss_factor=factor)
        losses.append(loss)
        gradients.append(layer.weight.grad.clone())
    assert losses[1] == 4 * losses[0]
    torch.testing.assert_close(gradients[1], 4 * gradients[0])
