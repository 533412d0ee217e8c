"""Curves: what is read from TensorBoard's files, and that what is drawn is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from torch.utils.tensorboard import SummaryWriter

from sabmn_ext.report import plots
from sabmn_ext.retrieval import evaluate_retrieval
from sabmn_ext.retrieval.verification import VerificationPairs


def extent(file: Path, color: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is drawn in one colour, in pixels."""
    picture = np.asarray(Image.open(file).convert("RGB")).astype(int)
    y, x = (np.abs(picture - ImageColor.getrgb(color)).max(axis=2) < 40).nonzero()
    assert len(x) > 0, f"{file.name} shows nothing in {color}"
    return int(x.min()), int(y.min()), int(x.max()), int(y.max())


def test_a_resumed_run_has_each_point_once(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (10, 20, 30, 40):
            writer.add_scalar("loss", 100 - step, step)
    with SummaryWriter(str(tmp_path), purge_step=31) as writer:  # went on from a checkpoint after step 30
        for step in (40, 50):
            writer.add_scalar("loss", step, step)
            writer.add_scalar("gamma", 0.5, step)
    assert plots.read_curves(tmp_path) == {
        "loss": ([10, 20, 30, 40, 50], [90, 80, 70, 40, 50]),
        "gamma": ([40, 50], [0.5, 0.5]),
    }
    assert plots.read_curves(tmp_path / "none") == {}


def test_training_curves(tmp_path: Path) -> None:
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    plots.draw_training(one, {"loss": ([10, 20], [3.0, 1.0])}, "loss")
    left, top, right, bottom = extent(one, plots.BLUE)
    assert right - left > 200
    assert bottom - top > 100
    with pytest.raises(AssertionError, match="nothing in"):
        extent(one, plots.ORANGE)
    plots.draw_training(two, {"backbone": ([10], [1.0]), "added": ([10, 20], [2.0, 1.0])}, "rates")
    extent(two, plots.BLUE)  # a single point is a dot
    extent(two, plots.ORANGE)


def test_cmc_and_verification(tmp_path: Path, seed: int) -> None:
    pids, rng = np.arange(40) // 2, np.random.default_rng(seed)
    features = pids[:, None] + rng.normal(size=(40, 1))
    result = evaluate_retrieval(features, features, pids, pids, exclude_self=True, max_rank=7)
    plots.draw_cmc(tmp_path / "cmc.png", result)
    left, _, right, _ = extent(tmp_path / "cmc.png", plots.BLUE)
    assert right - left > 200
    assert plots.draw_verification(tmp_path / "verification.png", result)
    extent(tmp_path / "verification.png", plots.BLUE)
    extent(tmp_path / "verification.png", plots.ORANGE)
    few = VerificationPairs(np.array([1.0]), np.array([0.0, 2.0]), np.array([9]), squared=True)
    none = VerificationPairs(np.zeros(0), np.array([0.0, 2.0]), np.array([99]), squared=True)
    for number, pairs in enumerate((few, none)):
        file = tmp_path / f"{number}.png"
        assert not plots.draw_verification(file, replace(result, pairs=pairs))
        assert not file.exists()


def test_counterfactuals_are_left_and_right_of_zero(tmp_path: Path) -> None:
    def report(drop: float) -> dict:
        figure = {"value": 0.5, "drop": drop, "low": drop - 0.01, "high": drop + 0.01}
        return {"confidence": 0.95, "gamma_zero": {"map": figure, "rank1": figure | {"drop": 0, "low": 0, "high": 0}}}

    extents = {}
    for drop in (0.2, -0.2):
        plots.draw_counterfactuals(tmp_path / "a.png", report(drop))
        picture = Image.open(tmp_path / "a.png")
        picture.crop((0, 0, int(0.83 * picture.width), picture.height)).save(tmp_path / "b.png")  # without the legend
        extents[drop] = [extent(tmp_path / "b.png", color) for color in (plots.BLUE, plots.ORANGE)]
    (map_right, zero_left), (map_left, zero_right) = extents[0.2], extents[-0.2]
    assert map_right[0] > zero_left[2]
    assert map_left[2] < zero_right[0]
