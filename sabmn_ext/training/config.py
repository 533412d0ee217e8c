"""Recipes: the one definition of every setting, its type, its default and what it means.

A recipe is a TOML file with the sections below. A key that is not in the file has its default, which is the
paper's value. Command lines change single keys by their dotted names (``train.epochs``).
"""

# ruff: noqa: RUF009  (_key is dataclasses.field with the metadata that every key has)
from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its older name
    import tomli as tomllib

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def _key(
    default: Any,
    meaning: str,
    *,
    choices: tuple[Any, ...] = (),
    low: float | None = None,
    high: float | None = None,
    harmless: bool = False,
) -> Any:
    """One key: default, one-line meaning, allowed values; harmless keys may change when a run is resumed."""
    metadata = {"meaning": meaning, "choices": choices, "low": low, "high": high, "harmless": harmless}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataKeys:
    # a data set may move between resumes: the trainer compares the images' names, not the folder
    path: str | None = _key(None, "folder or CSV of the data set; 'demo' is the built-in one", harmless=True)
    format: str = _key("auto", "layout of the data set; 'auto' recognises it")
    cameras: bool = _key(True, "use camera numbers: false switches the same-camera rule off")
    with_val: bool = _key(False, "MSMT17: train on its validation list too")
    on_error: str = _key("stop", "what an unreadable image does: end the run, or be left out", choices=("stop", "skip"))
    cache: str = _key(
        "auto",
        "keep decoded training images in memory: auto does where half of the free memory holds them",
        choices=("auto", "ram", "off"),
        harmless=True,
    )
    workers: int = _key(0, "processes that decode images; 0: in the main one", low=0, harmless=True)


@dataclass
class ImageKeys:
    height: int = _key(256, "image height in pixels", low=8)
    width: int = _key(128, "image width in pixels", low=8)


@dataclass
class AugmentKeys:
    flip: float = _key(0.5, "probability of the horizontal flip", low=0, high=1)
    padding: int = _key(0, "pixels to pad on each side before a random crop; 0: neither", low=0)
    erasing: str = _key(
        "field",
        "random erasing: the field's has area 0.02-0.4, aspect 0.3-3.33, filled with the mean",
        choices=("field", "torchvision", "none"),
    )
    erasing_probability: float = _key(0.5, "probability of random erasing", low=0, high=1)


@dataclass
class ModelKeys:
    backbone: str = _key("resnet50", "network", choices=("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"))
    weights: str = _key("imagenet", "first weights of the backbone: 'imagenet', 'none' (random) or a file")
    attention_stage: int | None = _key(3, "stage that self-attention follows, 1-4, or 'none'", low=1, high=4)
    num_classifiers: int = _key(4, "linear classifiers, each with a cross-entropy of its own", low=1)
    feature_dim: int = _key(1024, "channels of the added 1x1 convolution: the feature's length", low=1)
    reduction: int = _key(8, "attention's channels are the stage's divided by this", low=1)
    spectral_norm: bool = _key(True, "spectral normalisation of every convolution")
    dropout: float = _key(0.5, "dropout before the classifiers", low=0, high=1)
    last_stride: int = _key(1, "stride of the last stage", choices=(1, 2))
    pooling: str = _key("max", "global pooling", choices=("max", "avg"))
    feature_bias: bool = _key(False, "a bias in the added 1x1 convolution")
    bn_neck: bool = _key(False, "BN neck: the feature for retrieval is the one after batch norm")


@dataclass
class TrainKeys:
    epochs: int = _key(260, "passes over the training images", low=1)
    max_steps: int | None = _key(None, "end after this many steps, or 'none'", low=1)
    batch_size: int = _key(64, "images a step, of all processes together", low=2)
    accumulate: int = _key(1, "equal parts that a step's images go through the network in, for less memory", low=1)
    images_per_identity: int = _key(
        0, "K of identity sampling: batch_size / K identities a batch, K images of each; 0: plain shuffling", low=0
    )
    sync_bn: bool = _key(False, "several processes: batch norm takes the statistics of all of them; needs GPUs")
    rate_backbone: float = _key(0.001, "learning rate of the backbone", low=0)
    rate_added: float = _key(0.01, "learning rate of the added layers", low=0)
    attention_rate: str = _key("added", "whose rate the attention has", choices=("added", "backbone"))
    momentum: float = _key(0.9, "SGD's momentum", low=0, high=1)
    weight_decay: float = _key(1e-5, "SGD's weight decay, on all parameters", low=0)
    label_smoothing: float = _key(0.0, "label smoothing of the cross-entropies", low=0, high=1)
    loss_factor: float = _key(1.0, "the loss is multiplied by this", low=0)
    triplet: float = _key(0.0, "weight of the batch-hard triplet loss beside the cross-entropies; 0: none", low=0)
    triplet_margin: float | None = _key(None, "margin of the triplet loss, or 'none' for the soft margin", low=0)


@dataclass
class ScheduleKeys:
    kind: str = _key("step", "how the rates fall", choices=("step", "cosine", "constant"))
    milestones: list[int] = _key([160], "step: after each of these epochs the rates are multiplied by factor")
    factor: float = _key(0.1, "step: the multiplier", low=0)
    warmup_steps: int = _key(0, "steps over which the rates rise linearly from zero", low=0)


@dataclass
class EvaluationKeys:
    metric: str = _key("euclidean", "distance between features", choices=("euclidean", "cosine"))
    flip: bool = _key(False, "average the features of an image and its mirror image")
    batch_size: int = _key(64, "images a step of feature extraction", low=1, harmless=True)
    counterfactuals: bool = _key(True, "score the network without attention and the like at the end", harmless=True)
    val_ids: float = _key(0.0, "share of the training identities held out to choose best.pt", low=0, high=0.9)
    val_every: int = _key(10, "epochs between evaluations of the held-out identities", low=1)


@dataclass
class RunKeys:
    seed: int = _key(0, "seed of weights, order, augmentation and dropout", low=0)
    device: str = _key("auto", "'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'", harmless=True)
    precision: str = _key("fp32", "arithmetic of the network", choices=("fp32", "bf16", "fp16"))
    channels_last: bool = _key(True, "keep images in NHWC order, often the faster one")
    compile: bool = _key(False, "train through torch.compile: slow to start, and needs a compiler of C++ or a GPU")
    checkpoint_minutes: float = _key(10.0, "write last.pt this often; 0: by steps only", low=0, harmless=True)
    checkpoint_steps: int = _key(0, "write last.pt every so many steps too; 0: never", low=0, harmless=True)
    log_steps: int = _key(10, "steps between points of the curves, checks of the loss", low=1, harmless=True)
    progress: bool = _key(True, "show progress bars on a terminal", harmless=True)
    report: bool = _key(True, "write a page with all results at the end: report/report.html", harmless=True)


@dataclass
class Config:
    """All settings of a run; ``recipe`` is the name of the recipe it started from."""

    recipe: str = "default"
    data: DataKeys = field(default_factory=DataKeys)
    image: ImageKeys = field(default_factory=ImageKeys)
    augment: AugmentKeys = field(default_factory=AugmentKeys)
    model: ModelKeys = field(default_factory=ModelKeys)
    train: TrainKeys = field(default_factory=TrainKeys)
    schedule: ScheduleKeys = field(default_factory=ScheduleKeys)
    evaluation: EvaluationKeys = field(default_factory=EvaluationKeys)
    run: RunKeys = field(default_factory=RunKeys)

    def to_dict(self) -> dict[str, Any]:
        """Nested dict of plain values, as a checkpoint stores it."""
        return dataclasses.asdict(self)


_SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config) if f.name != "recipe"}
_FIELDS = {f"{name}.{f.name}": f for name, kind in _SECTIONS.items() for f in dataclasses.fields(kind)}
_HINTS = {f"{name}.{k}": hint for name, kind in _SECTIONS.items() for k, hint in typing.get_type_hints(kind).items()}
_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers such as [160, 200]",
}


def all_keys() -> dict[str, str]:
    """Every dotted key and its one-line meaning, with the values it may have."""
    choices = {key: ", ".join(map(str, f.metadata["choices"])) for key, f in _FIELDS.items()}
    return {key: f.metadata["meaning"] + f" ({choices[key]})" * bool(choices[key]) for key, f in _FIELDS.items()}


def set_key(config: Config, key: str, value: Any, *, text: bool = False) -> None:
    """Set ``key`` (dotted) of ``config``; with ``text`` the value is a command line's string and is parsed.

    Raises a ValueError for an unknown key (with near names), a wrong type or a value outside the key's range.
    """
    if key not in _FIELDS:
        word = key.split(".")[-1]
        tails = {k.split(".")[-1]: k for k in _FIELDS}
        close = [tails[tail] for tail in difflib.get_close_matches(word, list(tails))]
        parts = [k for tail, k in tails.items() if word in tail or tail in word]
        near = list(dict.fromkeys(parts + difflib.get_close_matches(key, list(_FIELDS)) + close))
        hint = f"near names: {', '.join(near)}" if near else f"sections: {', '.join(_SECTIONS)}"
        raise ValueError(f"unknown key '{key}'; {hint}")
    section, name = key.split(".")
    setattr(getattr(config, section), name, _checked(key, value, text))


def _checked(key: str, value: Any, text: bool) -> Any:
    """The value in its key's type and range, or a ValueError that says what was expected."""
    hint, meta = _HINTS[key], _FIELDS[key].metadata
    optional = isinstance(hint, types.UnionType)
    if optional:
        if value is None or value == "none":
            return None
        hint = next(t for t in typing.get_args(hint) if t is not types.NoneType)
    expected = _EXPECTED[hint] + (" or 'none'" if optional else "")
    wrong = ValueError(f"{key} = {value!r}: expected {expected} ({meta['meaning']})")
    if text and hint is not str:
        try:
            value = hint(value) if hint in (int, float) else tomllib.loads(f"value = {value}")["value"]
        except ValueError:
            raise wrong from None
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not (typing.get_origin(hint) or hint):  # not isinstance: a bool is no whole number
        raise wrong
    if isinstance(value, list) and not all(type(item) is int for item in value):
        raise wrong
    if isinstance(value, float) and not math.isfinite(value):
        raise wrong
    if meta["choices"] and value not in meta["choices"]:
        raise ValueError(f"{key} = {value!r}: expected one of {', '.join(map(str, meta['choices']))}")
    low, high = meta["low"], meta["high"]
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        limits = [f"at least {low}"] * (low is not None) + [f"at most {high}"] * (high is not None)
        raise ValueError(f"{key} = {value!r}: expected {' and '.join(limits)} ({meta['meaning']})")
    return value


def config_from_dict(values: dict[str, Any], recipe: str | None = None) -> Config:
    """The inverse of :meth:`Config.to_dict`; also reads a parsed recipe: keys it lacks have their defaults."""
    config = Config(recipe=recipe or str(values.get("recipe", "default")))
    for section, keys in values.items():
        if section == "recipe":
            continue
        if section not in _SECTIONS or not isinstance(keys, dict):
            near = difflib.get_close_matches(section, _SECTIONS)
            raise ValueError(f"unknown section '{section}'; sections: {', '.join(near or _SECTIONS)}")
        for name, value in keys.items():
            set_key(config, f"{section}.{name}", value)
    return config


def load_recipe(name: str) -> Config:
    """Read a built-in recipe by its name, or a TOML file by its path."""
    built_in = sorted(path.stem for path in RECIPES.glob("*.toml"))
    path = RECIPES / f"{name}.toml" if name in built_in else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"recipe '{name}': no such file; built-in recipes: {', '.join(built_in)}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return config_from_dict(values, recipe=None if "recipe" in values else path.stem)
    except ValueError as error:  # tomllib's error is one too
        raise ValueError(f"recipe {path}: {error}") from None


def to_toml(config: Config) -> str:
    """The configuration as a recipe that load_recipe reads back, each key with its meaning."""
    meanings = all_keys()
    lines = [f"recipe = {json.dumps(config.recipe)}"]
    for section, keys in config.to_dict().items():
        if section == "recipe":
            continue
        lines += ["", f"[{section}]"]
        for name, value in keys.items():
            written = json.dumps("none" if value is None else value, ensure_ascii=False)
            lines.append(f"{name} = {written}  # {meanings[f'{section}.{name}']}")
    return "\n".join(lines) + "\n"


def differences(earlier: Config, now: Config) -> list[str]:
    """What would change the training or its result, as 'key: earlier value -> value now'."""
    found = []
    for key, key_field in _FIELDS.items():
        section, name = key.split(".")
        a, b = getattr(getattr(earlier, section), name), getattr(getattr(now, section), name)
        if a != b and not key_field.metadata["harmless"]:
            found.append(f"{key}: {a!r} -> {b!r}")
    return found
