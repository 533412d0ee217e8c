"""The rows of an ablation, and one training run for each row and seed.

The first six are the paper's (Munir and Micheloni, SpliTech 2020, Table III). Four summed cross-entropies also give the
trunk four times the gradient of one, so two rows give one classifier four times the rate and four times the loss. The
last six ask for what the paper says of spectral normalisation: that training diverges without it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sabmn_ext.training.checkpoint import load_checkpoint, write_atomically
from sabmn_ext.training.config import Config, config_from_dict, differences, load_recipe, set_key
from sabmn_ext.training.loop import TrainingDiverged, train

RECORD = "ablation.json"


@dataclass(frozen=True)
class Row:
    """What one row changes in the recipe. ``paper``: its rank-1 and mAP on Market-1501, in percent."""

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    paper: tuple[float, float] | None = None

    def config(self, base: Config, seed: int) -> Config:
        config = config_from_dict(base.to_dict())
        for key, value in {**self.changes, "run.seed": seed}.items():
            set_key(config, key, value)
        config.train.rate_backbone *= self.rate_factor
        config.train.rate_added *= self.rate_factor
        return config


def _classifiers(number: int) -> dict[str, Any]:
    return {"model.attention_stage": None, "model.num_classifiers": number}


def _attention(stage: int) -> dict[str, Any]:
    return {"model.attention_stage": stage, "model.num_classifiers": 4}


def _spectral_norm(on: bool, rate: float) -> Row:
    rates = {"train.rate_backbone": rate, "train.rate_added": rate}
    title = f"spectral norm {'on' if on else 'off'}, rate {rate}"
    changes = {**_attention(3), "model.spectral_norm": on, **rates}
    return Row(f"norm-{'on' if on else 'off'}-{rate}", title, changes)


GROUPS: dict[str, tuple[Row, ...]] = {
    "paper": (
        Row("one", "one classifier", _classifiers(1), paper=(89.0, 70.2)),
        Row("four", "four classifiers", _classifiers(4), paper=(92.4, 78.6)),
        Row("stage1", "attention after stage 1", _attention(1), paper=(92.8, 79.6)),
        Row("stage2", "attention after stage 2", _attention(2), paper=(93.5, 80.4)),
        Row("stage4", "attention after stage 4", _attention(4), paper=(92.2, 79.0)),
        Row("stage3", "attention after stage 3 (proposed)", _attention(3), paper=(93.8, 80.8)),
    ),
    "gradient": (
        Row("one-rate4", "one classifier, 4 × the rate", _classifiers(1), rate_factor=4.0),
        Row("one-loss4", "one classifier, 4 × the loss", {**_classifiers(1), "train.loss_factor": 4.0}),
    ),
    "spectral": tuple(_spectral_norm(on, rate) for rate in (0.01, 0.05, 0.1) for on in (True, False)),
}


def pick_rows(names: Sequence[str]) -> list[Row]:
    """The rows of these names or groups, in the table's order; all of them for none. A ValueError for unknown names."""
    rows = [row for group in GROUPS.values() for row in group]
    members = {group: [row.name for row in those] for group, those in GROUPS.items()}
    members |= {row.name: [row.name] for row in rows}
    if unknown := [name for name in names if name not in members]:
        raise ValueError(f"--rows {unknown[0]}: expected groups or rows of {', '.join(members)}")
    chosen = {member for name in names or GROUPS for member in members[name]}
    return [row for row in rows if row.name in chosen]


def check_folder(config: Config, folder: Path) -> None:
    """A ValueError where the run in ``folder`` was begun under other settings."""
    settings = folder / "config.toml"
    if settings.exists() and (changed := differences(load_recipe(str(settings)), config)):
        raise ValueError(f"{folder} holds a run under other settings: {'; '.join(changed)}; name another --out")


def run(config: Config, folder: Path) -> dict[str, Any]:
    """Train into ``folder``, or go on there, or read what a finished run left.

    Returns:
        "result" as in ``result.json``, None for a run that diverged; "steps" of the whole run; "not_finite", how many
        of them were not finite (the run ends at the first one: from there on all would be); "loss" of the last whole
        epoch; ``largest_sigmas`` at the end, of a run that diverged at its last checkpoint.
    """
    if (folder / RECORD).exists():
        return json.loads((folder / RECORD).read_text())
    begun = (folder / "config.toml").exists() or (folder / "last.pt").exists()
    try:
        result = train(config, folder, resume=begun)
        figures = {"result": result, "steps": result["steps"], "not_finite": 0}
    except TrainingDiverged as error:
        print(error, flush=True)
        not_finite = error.total_steps - error.step + 1
        figures = {"result": None, "steps": error.total_steps, "not_finite": not_finite}
    state = load_checkpoint(folder / "last.pt")
    figures |= {"loss": state["epoch_loss"], **largest_sigmas(state["model"])}
    write_atomically(folder / RECORD, lambda file: file.write(json.dumps(figures, indent=2).encode()))
    (folder / "previous.pt").unlink(missing_ok=True)  # the largest file beside last.pt, and there are many runs
    return figures


def largest_sigmas(model: dict[str, Tensor]) -> dict[str, float]:
    """The largest singular value of any convolution, exactly, from a network's state dict.

    "sigma": of the weights that the network computes with, W/σ̂ where they are normalised; "sigma_stored": of W.
    """
    used, stored = [0.0], [0.0]
    for key, weight in model.items():
        if weight.dim() != 4:
            continue
        matrix = weight.double().flatten(1)  # [Cout, Cin·k·k]
        gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
        sigma = torch.linalg.eigvalsh(gram)[-1].clamp(min=0).sqrt().item()
        stored.append(sigma)
        vectors = [model.get(key.removesuffix("original") + f"0.{name}") for name in ("_u", "_v")]
        if vectors[0] is not None and vectors[1] is not None:
            sigma /= (vectors[0].double() @ matrix @ vectors[1].double()).item()
        used.append(sigma)
    return {"sigma": max(used), "sigma_stored": max(stored)}
