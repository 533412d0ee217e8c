"""A checkpoint of a small untrained network, and a few images, for tests of what uses one."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sabmn_ext.nn.sabmn import SABMN
from sabmn_ext.training.checkpoint import save_checkpoint
from sabmn_ext.training.config import load_recipe


def write_checkpoint(file: Path, seed: int = 0, **evaluation: Any) -> Path:
    """16 features of images of 32 × 16; ``evaluation`` changes the keys of that table."""
    torch.manual_seed(seed)
    model = SABMN(4, backbone="resnet18", feature_dim=16, spectral_norm=False, weights="none")
    config = dataclasses.asdict(load_recipe("demo"))
    config["image"] = {"height": 32, "width": 16}
    config["evaluation"] |= {"batch_size": 4, **evaluation}
    save_checkpoint(file, {"model_config": model.config, "model": model.state_dict(), "config": config})
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
