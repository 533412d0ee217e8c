"""Recipes: every key typed and known, errors that say what to do, TOML that reads back."""

import dataclasses

import pytest

from sabmn_ext.training.config import (
    RECIPES,
    Config,
    all_keys,
    config_from_dict,
    differences,
    load_recipe,
    set_key,
    to_toml,
    tomllib,
)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.epochs", "7", 7),
        ("train.rate_added", "1e-3", 0.001),
        ("train.rate_added", ".5", 0.5),
        ("train.weight_decay", "0", 0.0),
        ("model.spectral_norm", "false", False),
        ("model.attention_stage", "none", None),
        ("model.attention_stage", "2", 2),
        ("train.triplet_margin", "0.3", 0.3),
        ("train.triplet_margin", "none", None),
        ("train.max_steps", "none", None),
        ("schedule.milestones", "[40, 70]", [40, 70]),
        ("data.path", "/some/where", "/some/where"),
        ("model.weights", "none", "none"),
    ],
)
def test_values_from_the_command_line(key, text, value):
    config = Config()
    set_key(config, key, text, text=True)
    section, name = key.split(".")
    found = getattr(getattr(config, section), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("train.epochs", "many", "whole number"),
        ("train.epochs", "1.5", "whole number"),
        ("train.epochs", "0", "at least 1"),
        ("train.rate_added", "fast", "a number"),
        ("train.rate_added", "nan", "a number"),
        ("model.spectral_norm", "yes", "true or false"),
        ("model.spectral_norm", "1", "true or false"),
        ("schedule.milestones", "160", "list of whole numbers"),
        ("schedule.milestones", "[1.5]", "list of whole numbers"),
        ("model.attention_stage", "5", "at most 4"),
        ("run.precision", "fp64", "fp32, bf16, fp16"),
        ("augment.flip", "1.5", "at most 1"),
    ],
)
def test_wrong_values_say_what_is_expected(key, text, expected):
    with pytest.raises(ValueError, match=expected) as error:
        set_key(Config(), key, text, text=True)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.epoch", "train.epochs"),
        ("epochs", "train.epochs"),
        ("train.height", "image.height"),
        ("train.learning_rate_added", "train.rate_added"),
        ("model.stage", "model.attention_stage"),
    ],
)
def test_unknown_keys_list_near_names(key, near):
    with pytest.raises(ValueError, match="unknown key") as error:
        set_key(Config(), key, 1)
    assert near in str(error.value)


def test_recipe_files_are_checked(tmp_path):
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[train]\nepochs = true\n")
    with pytest.raises(ValueError, match=r"mine\.toml.*train\.epochs = True.*whole number"):
        load_recipe(str(recipe))
    recipe.write_text("[trian]\nepochs = 3\n")
    with pytest.raises(ValueError, match=r"unknown section 'trian'.*train"):
        load_recipe(str(recipe))
    recipe.write_text("[train\nepochs = 3\n")
    with pytest.raises(ValueError, match=r"mine\.toml"):
        load_recipe(str(recipe))
    recipe.write_text("[train]\nepochs = 3\nrate_added = 1\n")
    config = load_recipe(str(recipe))
    assert config.recipe == "mine"
    assert config.train.epochs == 3
    assert type(config.train.rate_added) is float
    with pytest.raises(FileNotFoundError, match="built-in recipes: demo, dukemtmc, market1501, strong"):
        load_recipe("marked1501")


@pytest.mark.parametrize("name", ["market1501", "dukemtmc", "strong", "demo"])
def test_recipes_survive_a_round_trip(name, tmp_path):
    config = load_recipe(name)
    set_key(config, "data.path", 'C:\\people "one"')
    (tmp_path / "config.toml").write_text(to_toml(config))
    again = load_recipe(str(tmp_path / "config.toml"))
    assert again == config
    assert again.recipe == name
    assert config_from_dict(config.to_dict()) == config
    for key, meaning in all_keys().items():
        assert meaning in to_toml(config), key


@pytest.mark.parametrize("name", ["market1501", "dukemtmc"])
def test_paper_recipes_write_every_setting_out(name):
    written = tomllib.loads((RECIPES / f"{name}.toml").read_text())
    for section in ("image", "augment", "model", "schedule"):
        assert set(written[section]) == {f.name for f in dataclasses.fields(getattr(Config(), section))}
    assert {"epochs", "batch_size", "rate_backbone", "rate_added", "momentum", "weight_decay"} <= set(written["train"])
    assert load_recipe(name) == dataclasses.replace(Config(), recipe=name), "the defaults are the paper's"


def test_differences_leave_harmless_keys_out():
    earlier, now = Config(), Config()
    set_key(now, "data.workers", 4)
    set_key(now, "run.device", "cpu")
    assert differences(earlier, now) == []
    set_key(now, "train.rate_added", 0.5)
    set_key(now, "model.attention_stage", None)
    found = differences(earlier, now)
    assert sorted(line.split(":")[0] for line in found) == ["model.attention_stage", "train.rate_added"]
