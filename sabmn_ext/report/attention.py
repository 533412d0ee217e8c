"""Attention maps over the image that they belong to: what all positions gather on average, and single rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sabmn_ext.data.images import load_image
from sabmn_ext.data.transforms import normalize
from sabmn_ext.functional import attention_map
from sabmn_ext.nn.sabmn import SABMN

GAP, TEXT, MARK = 8, 28, (255, 255, 255)


@dataclass(frozen=True)
class Network:
    """A trained network, and how images are put into it."""

    model: SABMN
    height: int
    width: int
    device: str | torch.device


def attention_maps(network: Network, paths: Sequence[str]) -> tuple[Tensor, tuple[int, int]]:
    """The attention maps of images, as the trained network computes them in float32.

    Returns:
        [B, N, N] on the CPU, rows j summing to 1 over i; and the feature map's (height, width), N = height · width.
    """
    block = network.model.attention
    if block is None:
        raise ValueError("the network has no attention")
    found: list[Tensor] = []
    grid: list[tuple[int, int]] = []

    def look(_: Any, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        x = inputs[0]  # [B, C, H, W]
        grid.append((x.shape[2], x.shape[3]))
        found.append(attention_map(x, block.query.weight, block.key.weight).cpu())

    images = torch.stack([load_image(path, network.height, network.width) for path in paths])
    training = network.model.training
    hook = block.register_forward_hook(look)
    try:
        with torch.inference_mode():
            network.model.eval()(normalize(images).to(network.device))
    finally:
        hook.remove()
        network.model.train(training)
    return found[0], grid[0]


def draw_attention(file: Path, network: Network, path: str, *, height: int = 160) -> None:
    """The image, the mean over the rows of its map, and the rows of three positions, which a square marks.

    The brightest colour is the largest value of each picture; under it stands how often that is 1/N, the value of a
    map without any preference.
    """
    from matplotlib import colormaps
    from PIL import Image, ImageDraw, ImageFont

    maps, (rows, columns) = attention_maps(network, [path])
    beta = maps[0].numpy()
    image = Image.fromarray(load_image(path, network.height, network.width).permute(1, 2, 0).numpy())
    width = min(max(height * network.width // network.height, height // 2), 2 * height)
    image = image.resize((width, height))
    grey = np.asarray(image.convert("L").convert("RGB"), np.float32)
    positions = [(part * rows // 6, columns // 2) for part in (1, 3, 5)]
    panels: list[tuple[str, np.ndarray, tuple[int, int] | None]] = [("mean of all rows", beta.mean(axis=0), None)]
    for name, (y, x) in zip(("upper", "middle", "lower"), positions, strict=True):
        panels.append((f"{name} position", beta[y * columns + x], (y, x)))

    cell = max(width, 112) + GAP  # the text needs some
    sheet = Image.new("RGB", (GAP + (1 + len(panels)) * cell, 2 * GAP + height + TEXT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    sheet.paste(image, (GAP, GAP))
    draw.text((GAP, GAP + height + 2), f"{rows} by {columns} positions", fill="black", font=font)
    for number, (title, row, position) in enumerate(panels, start=1):
        left = GAP + number * cell
        heat = Image.fromarray((row / row.max()).reshape(rows, columns).astype(np.float32))
        heat = heat.resize((width, height), Image.Resampling.NEAREST)
        color = 255 * colormaps["inferno"](np.asarray(heat))[..., :3]
        sheet.paste(Image.fromarray((0.4 * grey + 0.6 * color).clip(0, 255).astype(np.uint8)), (left, GAP))
        if position is not None:
            y, x = position
            box = (x * width // columns, y * height // rows, (x + 1) * width // columns, (y + 1) * height // rows)
            draw.rectangle((left + box[0], GAP + box[1], left + box[2] - 1, GAP + box[3] - 1), outline=MARK, width=2)
        text = f"{title}\nat most {row.max() * len(row):.1f}/N"
        draw.multiline_text((left, GAP + height + 2), text, fill="black", font=font, spacing=2)
    sheet.save(file)
