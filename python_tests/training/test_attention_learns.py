"""Attention that does nothing must not pass: a task that only matching across the image solves.

A mark of one of six kinds stands in the left columns, another in the right ones; are they of the same kind? The
network looks at single positions, averages over all of them and is linear from there on: without attention its logits
are a function of the left kind plus one of the right kind, which can hardly be better than chance.
"""

import pytest
import torch
from torch import Tensor, nn

import sabmn_ext
from sabmn_ext.training.loop import train_step

KINDS, SIZE, CHANNELS = 6, 8, 32


class Matcher(nn.Module):
    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2 * KINDS, CHANNELS, 1, bias=False)
        nn.init.uniform_(self.embed.weight, -1.15, 1.15)  # larger than usual: scores of a useful size from the start
        self.attention = sabmn_ext.SelfAttention2d(CHANNELS, 2) if attention else nn.Identity()
        self.classifiers = nn.ModuleList(nn.Linear(CHANNELS, 2) for _ in range(2))

    def forward(self, images: Tensor) -> list[Tensor]:
        pooled = self.attention(self.embed(images)).mean((2, 3)) * SIZE**2  # a mark is 1 of 64 positions
        return [classifier(pooled) for classifier in self.classifiers]


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images [batch, 12, 8, 8] with two marks, at least four columns apart, and whether they match [batch]."""
    labels = torch.randint(2, (batch,), generator=generator)
    left = torch.randint(KINDS, (batch,), generator=generator)
    other = (left + torch.randint(1, KINDS, (batch,), generator=generator)) % KINDS
    right = torch.where(labels == 1, left, other)
    rows = torch.randint(SIZE, (2, batch), generator=generator)
    columns = torch.randint(2, (2, batch), generator=generator) + torch.tensor([[0], [SIZE - 2]])
    images = 0.05 * torch.randn(batch, 2 * KINDS, SIZE, SIZE, generator=generator)
    images[torch.arange(batch), left, rows[0], columns[0]] += 1
    images[torch.arange(batch), KINDS + right, rows[1], columns[1]] += 1
    return images, labels


def accuracy(model: nn.Module) -> float:
    images, labels = draw(2000, torch.Generator().manual_seed(99))
    with torch.no_grad():
        logits: Tensor = torch.stack(model(images)).sum(0)
    return (logits.argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("attention", [True, False])
def test_only_attention_matches_far_marks(attention):
    torch.manual_seed(1)
    model = Matcher(attention)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(2)
    for _ in range(500):
        train_step(model, *draw(128, generator), optimizer)
    if not attention:
        assert accuracy(model) < 0.6
        return
    assert accuracy(model) >= 0.9
    with torch.no_grad():
        model.attention.gamma.zero_()
    assert accuracy(model) < 0.6, "it is the attention that solves it"
