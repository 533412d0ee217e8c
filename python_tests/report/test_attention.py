"""Attention maps are the network's own, and the pictures show them where they belong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

import sabmn_ext
from sabmn_ext.data.images import load_image
from sabmn_ext.data.transforms import normalize
from sabmn_ext.report import attention
from sabmn_ext.report.attention import GAP, MARK, Network, attention_maps, draw_attention


@pytest.fixture
def network() -> Network:
    model = sabmn_ext.SABMN(3, backbone="resnet18", weights="none", feature_dim=8, attention_stage=2)
    return Network(model.eval(), 48, 24, "cpu")


@pytest.fixture
def image(tmp_path: Path) -> str:
    noise = np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


def test_maps_are_those_of_the_network(network: Network, image: str) -> None:
    found: list[Tensor] = []

    def look(block: torch.nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x, query, key = (t.detach().double() for t in (inputs[0], block.query.weight, block.key.weight))
        query, key = (torch.einsum("dc,bcn->bdn", w.flatten(1), x.flatten(2)) for w in (query, key))
        found.append(torch.einsum("bdj,bdi->bji", query, key).softmax(-1))

    network.model.train()
    maps, grid = attention_maps(network, [image, image])
    assert network.model.training
    assert not network.model.attention._forward_hooks
    assert (maps.shape, grid) == ((2, 18, 18), (6, 3))
    network.model.eval().attention.register_forward_hook(look)
    with torch.inference_mode():
        network.model(normalize(torch.stack([load_image(image, 48, 24)] * 2)))
    torch.testing.assert_close(maps.double(), found[0], rtol=1e-4, atol=1e-6)
    without = sabmn_ext.SABMN(3, backbone="resnet18", weights="none", attention_stage=None)
    with pytest.raises(ValueError, match="has no attention"):
        attention_maps(Network(without, 48, 24, "cpu"), [image])


def test_the_brightest_cell_and_the_square(
    network: Network, image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beta = torch.full((18, 18), 0.01)
    middle = 3 * 3 + 1  # the position in the middle, row 3 and column 1 of 6 × 3, gathers from row 5 and column 2
    beta[middle, 5 * 3 + 2] = 0.83
    monkeypatch.setattr(attention, "attention_maps", lambda *_: (beta[None], (6, 3)))
    draw_attention(tmp_path / "a.png", network, image, height=120)
    sheet = np.asarray(Image.open(tmp_path / "a.png")).astype(float)
    left = GAP + 3 * (112 + GAP)  # the fourth panel: image, mean, upper, middle
    panel = sheet[GAP : GAP + 120, left : left + 60]
    shown = Image.fromarray(load_image(image, 48, 24).permute(1, 2, 0).numpy()).resize((60, 120))
    grey = np.asarray(shown.convert("L"))
    for (y, x), share in {(5, 2): 1.0, (0, 0): 0.01 / 0.83, (5, 1): 0.01 / 0.83}.items():
        inside = panel[20 * y + 4 : 20 * y + 16, 20 * x + 4 : 20 * x + 16]
        expected = 0.4 * grey[20 * y + 4 : 20 * y + 16, 20 * x + 4 : 20 * x + 16, None]
        expected = expected + 0.6 * 255 * np.array(colormaps["inferno"](share)[:3])
        assert np.abs(inside - expected).max() < 2
    y, x = (panel == MARK).all(axis=2).nonzero()
    assert (y.min(), y.max(), x.min(), x.max()) == (60, 79, 20, 39)
