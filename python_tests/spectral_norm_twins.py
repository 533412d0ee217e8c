"""The same network twice, normalised by this package and by torch, and trained side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sabmn_ext.nn.spectral_norm import spectral_norm_model


class Twins:
    """The networks of ``make``, normalised by ``ours`` and by ``theirs`` from the same random state.

    ``make`` and the two functions may return None where they work in place.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        ours: Callable[[nn.Module], object],
        theirs: Callable[[nn.Module], object],
        seed: int,
    ) -> None:
        self.ours, self.theirs = make(), make()
        self.theirs.load_state_dict(self.ours.state_dict())
        for network, normalize in ((self.ours, ours), (self.theirs, theirs)):
            torch.manual_seed(seed)
            normalize(network)
        self.optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (self.ours, self.theirs)]

    def assert_equal(self) -> None:
        ours, theirs = self.ours.state_dict(), self.theirs.state_dict()
        assert list(ours) == list(theirs)
        for key, value in theirs.items():
            assert torch.allclose(ours[key], value, rtol=1e-10, atol=1e-11), key

    def step(self, loss: Callable[[nn.Module], Tensor]) -> None:
        """One step of both; torch's forward is run under ``parametrize.cached()``."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.backward(loss)
        for optimizer in self.optimizers:
            optimizer.step()

    def backward(self, loss: Callable[[nn.Module], Tensor]) -> None:
        loss(self.ours).backward()
        with parametrize.cached():
            expected = loss(self.theirs)
        expected.backward()

    def train(self, losses: Sequence[Callable[[nn.Module], Tensor]]) -> None:
        """A step for each loss, then the last one again in eval mode; equal all the time."""
        for loss in losses:
            self.step(loss)
            self.assert_equal()
        self.ours.eval()
        self.theirs.eval()
        with torch.no_grad(), parametrize.cached():
            assert torch.allclose(losses[-1](self.ours), losses[-1](self.theirs), rtol=1e-10, atol=1e-11)
        self.assert_equal()


def network() -> nn.Module:
    """float64, images [B, 3, H, W]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 5, 2), nn.Conv2d(5, 2, 1)
    ).double()


def normalize_ours(model: nn.Module) -> nn.Module:
    return spectral_norm_model(model, preserve_eval=False)


def normalize_theirs(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            parametrizations.spectral_norm(module)


def network_twins(seed: int) -> Twins:
    return Twins(network, normalize_ours, normalize_theirs, seed)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 6, 5, dtype=torch.float64)


def singular_vectors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every u and v."""
    return {name: b.clone() for name, b in model.named_buffers() if name.endswith(("._u", "._v"))}
