"""Attention that does nothing must not pass: a task that only matching across distance solves.

Two marks stand far apart, their sides told apart by one channel; each is of one of two colours, and the question is
whether the colours are equal. The convolutions see 3×3 pixels and never both marks, and the mean over positions adds up
what they found: without the block, the answer can only be the sign of F(left) + G(right), which cannot say "equal" (of
the four pairs it gets three right at best, and cross-entropy drives it to a constant). With the block, the left mark's
position can take in what the right mark is.
"""

import torch
from torch import Tensor, nn

from sabmn_ext.nn.attention import SelfAttention2d
from sabmn_ext.ops import dispatch
from sabmn_ext.training.loop import train_step

HEIGHT, WIDTH, MARK = 8, 16, 4  # the marks are at least 6 pixels apart
STEPS, BATCH, RATE = 600, 64, 0.01


def draw(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [count, 3, 8, 16] and labels [count]: 1 where the two marks have the same colour, in half of the cases.

    Place and strength of every mark vary, so that there is no telling the answer from an overall level.
    """
    generator = torch.Generator().manual_seed(seed)
    images = 0.1 * torch.randn(count, 3, HEIGHT, WIDTH, generator=generator)
    equal = torch.randint(2, (count,), generator=generator)
    left = torch.randint(2, (count,), generator=generator)
    right = torch.where(equal == 1, left, 1 - left)
    rows = torch.randint(HEIGHT - MARK + 1, (count, 2), generator=generator)
    columns = torch.randint(2, (count, 2), generator=generator) + torch.tensor([0, WIDTH - MARK - 1])
    strengths = 0.6 + 0.8 * torch.rand(count, 2, generator=generator)
    for i in range(count):
        for side, colour in enumerate((left[i], right[i])):
            row, column = int(rows[i, side]), int(columns[i, side])
            mark = images[i, :, row : row + MARK, column : column + MARK]
            mark[0] += 1 - 2 * side  # which of the two marks
            mark[1] += (3 - 6 * colour) / 2 * strengths[i, side]
    return images, equal


class Network(nn.Module):
    """A list of one tensor of logits [B, 2] in train mode, the logits in eval mode."""

    def __init__(self, attention: bool) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU())
        self.attention = SelfAttention2d(32, reduction=2) if attention else nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(32, 64, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(64, 2)

    def forward(self, images: Tensor) -> list[Tensor] | Tensor:
        logits = self.classifier(self.head(self.attention(self.local(images))))
        return [logits] if self.training else logits


def accuracy_on_fresh_images(attention: bool, seed: int) -> tuple[float, Network]:
    torch.manual_seed(seed)
    model = Network(attention).train()
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    images, labels = draw(4096, seed=1000 + seed)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,), generator=generator)
        train_step(model, images[batch], labels[batch], optimizer)
        schedule.step()
    fresh, truth = draw(2000, seed=2000 + seed)
    with torch.no_grad():
        return (model.eval()(fresh).argmax(1) == truth).float().mean().item(), model


def test_only_attention_tells_whether_far_marks_are_equal() -> None:
    with dispatch.record() as calls:
        with_block, model = accuracy_on_fresh_images(attention=True, seed=1)
    assert len(calls) == 2 * STEPS + 1
    # Three of them: what is left of F and G is chance, and one time in ten it gets three of the four pairs right.
    without_block = [accuracy_on_fresh_images(attention=False, seed=seed)[0] for seed in (1, 2, 3)]
    assert with_block >= 0.9
    assert sum(without_block) / 3 <= 0.65
    assert model.attention.gamma.abs() > 0.01

    # The same weights with the block switched off do not know the answer either.
    nn.init.zeros_(model.attention.gamma)
    images, labels = draw(2000, seed=3000)
    with torch.no_grad():
        switched_off = (model(images).argmax(1) == labels).float().mean().item()
    assert switched_off <= 0.8
