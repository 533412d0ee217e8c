"""A checkpoint of a small untrained network, and a few images, for tests of what uses one."""

import dataclasses
import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sabmn_ext.nn.sabmn import SABMN
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
