"""A checkpoint of a small untrained network, and a few images, for tests of what uses one."""

import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.training import checkpoint
from sabmn_ext.training.checkpoint import FORMAT
from sabmn_ext.training.config import load_recipe


@functools.cache
def _checkpoint(seed: int) -> bytes:
    torch.manual_seed(seed)
    model = SABMN(4, backbone="resnet18", feature_dim=16, spectral_norm=False, weights="none")
    config = dataclasses.asdict(load_recipe("demo"))
    config["image"] = {"height": 32, "width": 16}
    config["evaluation"]["batch_size"] = 4
    state = {"format": FORMAT, "model_config": model.config, "model": model.state_dict(), "config": config}
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def write_checkpoint(file: Path, seed: int = 0) -> Path:
    """Of a network that makes 16 features of images of 32 × 16."""
    file.write_bytes(_checkpoint(seed))
    return file


@pytest.fixture
def models_read_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In this test the model of one file is read once, and runs on one thread: this small, that is faster."""
    read = checkpoint.load_model
    known: dict[bytes, Any] = {}

    def cached(path: "str | Path", device: torch.device) -> Any:
        content = Path(path).read_bytes() if Path(path).is_file() else b""
        if content not in known:
            known[content] = read(path, device)
        return known[content]

    monkeypatch.setattr(checkpoint, "load_model", cached)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_images(folder: Path, names: "list[str]", seed: int = 0) -> "list[Path]":
    """Blocks of colour, of many sizes."""
    rng = np.random.default_rng(seed)
    paths = []
    for name in names:
        width, height = rng.integers(10, 60, 2)
        pixels = rng.integers(0, 256, (4, 3, 3), dtype=np.uint8)
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.NEAREST).save(path)
        paths.append(path)
    return paths
