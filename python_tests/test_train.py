"""The training command line: which recipe, which keys, which messages."""

import pytest

from sabmn_ext import train
from sabmn_ext.train import ALIASES, build_config, build_parser, main, table
from sabmn_ext.training.config import all_keys


def config_of(*arguments):
    return build_config(build_parser().parse_args(arguments))


def test_no_arguments_are_the_demo():
    config = config_of()
    assert config.recipe == "demo"
    assert config.data.path == "demo"
    assert config.model.weights == "none"
    assert config_of("--data", "demo:7").recipe == "demo"


@pytest.mark.parametrize(
    ("name", "recipe"), [("dukemtmc", "dukemtmc"), ("market1501", "market1501"), ("csv", "market1501")]
)
def test_the_data_chooses_the_recipe(name, recipe, monkeypatch):
    asked = {}

    def load_data(path, **options):
        asked.update(options, path=path)
        return type("Found", (), {"name": name})()

    monkeypatch.setattr("sabmn_ext.data.records.load_data", load_data)
    config = config_of("--data", "/people", "--no-camera-rule", "--format", "csv")
    assert config.recipe == recipe
    assert config.data.path == "/people"
    assert asked == {"path": "/people", "format": "csv", "cameras": False}
    assert config.data.cameras is False
    assert config_of("--data", "/people", "--recipe", "demo").recipe == "demo"


def test_every_alias_is_a_key():
    assert set(ALIASES.values()) <= set(all_keys())
    config = config_of(
        *("--epochs", "3", "--batch-size", "16", "--image-size", "128x64", "--backbone", "resnet34"),
        *("--backbone-rate", "0.1", "--added-rate", "0.2", "--device", "cpu", "--workers", "2", "--seed", "9"),
        *("--precision", "bf16", "--channels-last", "--weights", "w.pth", "--max-steps", "5", "--val-ids", "0.1"),
        *("--set", "train.momentum=0.5", "--set", "model.attention_stage = 2"),
    )
    assert (config.image.height, config.image.width) == (128, 64)
    assert (config.train.epochs, config.train.batch_size, config.train.max_steps) == (3, 16, 5)
    assert (config.train.rate_backbone, config.train.rate_added, config.train.momentum) == (0.1, 0.2, 0.5)
    assert (config.model.backbone, config.model.weights, config.model.attention_stage) == ("resnet34", "w.pth", 2)
    assert (config.run.device, config.run.seed, config.run.precision, config.run.channels_last) == (
        "cpu",
        9,
        "bf16",
        True,
    )
    assert (config.data.workers, config.evaluation.val_ids) == (2, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.epoch=3"], "unknown key 'train.epoch'; near names: train.epochs"),
        (["--set", "train.epochs"], "expected KEY=VALUE"),
        (["--epochs", "three"], "train.epochs = 'three': expected a whole number"),
        (["--image-size", "256"], "expected HxW"),
        (["--recipe", "market"], "built-in recipes: demo, dukemtmc, market1501"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path):
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_faults_of_the_program_keep_their_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "build_config", lambda args: int("seven"))
    with pytest.raises(ValueError, match="seven"):
        main(["--out", str(tmp_path)])


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for key, meaning in all_keys().items():
        assert key in text
        assert meaning in text


def test_table():
    figures = {"map": 0.5, "map_trapezoid": 0.4, "minp": 0.1, "rank1": 0.75, "rank5": 0.8, "rank10": 1.0}
    result = {**figures, "untrained": {**figures, "map": 0.04}, "chance_map": 0.02, "map_gamma_zero": 0.45}
    lines = table(result).splitlines()
    assert lines[1].split() == ["trained", "50.0", "40.0", "10.0", "75.0", "80.0", "100.0"]
    assert lines[2].split()[:2] == ["untrained", "4.0"]
    assert lines[3].split()[:2] == ["chance", "2.0"]
    assert lines[4].split()[-6:] == ["45.0", "-", "-", "-", "-", "-"]
    assert len(table({**result, "map_gamma_zero": None}).splitlines()) == 4
