"""A small data set on disk in Market-1501's layout, and a network small enough to train in a test."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image


def _write(folder: Path, pids, cameras, seed):
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for pid in pids:
        shirt = tuple(random.Random(pid).choices(range(256), k=3))
        for camera in cameras:
            image = Image.effect_noise((16, 32), 40).convert("RGB")
            image = Image.blend(image, Image.new("RGB", image.size, shirt), 0.7)
            image.save(folder / f"{pid:04d}_c{camera}s1_{rng.randrange(10**6):06d}_00.jpg")


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Networks this small are slower with several threads, and far slower where others use the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small_market(tmp_path_factory) -> Path:
    """8 training identities × 4 cameras, 3 test identities × (1 query + 3 gallery images)."""
    root = tmp_path_factory.mktemp("market")
    _write(root / "bounding_box_train", range(2, 18, 2), range(1, 5), 0)
    _write(root / "query", (1, 3, 5), (1,), 1)
    _write(root / "bounding_box_test", (1, 3, 5), (2, 3, 4), 2)
    return root


@pytest.fixture(scope="session")
def large_enough_market(tmp_path_factory) -> Path:
    """70 training images: one batch of 64, and six that are left over."""
    root = tmp_path_factory.mktemp("larger")
    _write(root / "bounding_box_train", range(2, 16), range(1, 6), 0)
    _write(root / "query", (101, 103), (1,), 1)
    _write(root / "bounding_box_test", (101, 103), (2,), 2)
    return root


@pytest.fixture
def options(small_market):
    """Command-line options of a run of 3 epochs × 4 steps: a few seconds, all that is random switched on."""
    return [
        *("--recipe", "market1501", "--data", str(small_market), "--weights", "none", "--backbone", "resnet18"),
        *("--image-size", "64x32", "--batch-size", "8", "--epochs", "3", "--device", "cpu", "--seed", "5"),
        *("--set", "model.feature_dim=32", "--set", "model.num_classifiers=2", "--set", "augment.padding=2"),
        *("--set", "schedule.milestones=[2]", "--set", "run.log_steps=3", "--set", "data.format=auto"),
        *("--set", "run.report=false", "--set", "evaluation.counterfactuals=false"),
    ]
