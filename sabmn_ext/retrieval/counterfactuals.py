"""What the parts of a trained network are worth: features of the same images with one part taken out at a time.

    gamma_zero   γ := 0: the attention block passes its input on
    uniform      every row of the attention map is 1/N: each position gathers the mean of all values
    shuffled     the rows of the map change places, by one permutation of the positions for all images
    folded       the normalised weights W/σ stand in the layers as plain weights

The first three change what follows the attention block only: the layers before it run once for all of them. Folding
should change nothing but roundings; it shows that the network can be used without the normalisation.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sabmn_ext.functional import self_attention2d
from sabmn_ext.nn.spectral_norm import is_normalized, remove_spectral_norm

if TYPE_CHECKING:
    from sabmn_ext.nn.sabmn import SABMN

TRAINED = "trained"
ATTENTION = ("gamma_zero", "uniform", "shuffled")
FOLDED = "folded"
_SEED = 0  # of the permutation


class Counterfactuals(nn.Module):
    """A network and its counterfactuals as one module.

    Args:
        model: of it, what is there to be taken out: attention, spectral normalisation, both or nothing.
        wanted: False leaves the counterfactuals out; the network alone remains.

    Shape:
        images [B, 3, H, W] → features [B, V, D] in eval mode, one of the V for each of ``names``.

    >>> network = Counterfactuals(sabmn_ext.SABMN(751, backbone="resnet18", weights="none")).eval()
    >>> network.names
    ('trained', 'gamma_zero', 'uniform', 'shuffled', 'folded')
    >>> network(torch.randn(2, 3, 64, 32)).shape
    torch.Size([2, 5, 1024])
    """

    def __init__(self, model: "SABMN", wanted: bool = True) -> None:
        super().__init__()
        self.model = model
        self.attention = model.attention if wanted else None
        normalized = wanted and any(is_normalized(module) for module in model.modules())
        self.folded = remove_spectral_norm(copy.deepcopy(model)) if normalized else None
        self.names = (TRAINED, *(ATTENTION if self.attention is not None else ()), *((FOLDED,) if normalized else ()))

    def forward(self, images: Tensor) -> Tensor:
        if self.attention is None:
            features = [self.model(images)]
        else:
            hook = self.attention.register_forward_hook(_all_variants)
            try:
                features = list(self.model(images).chunk(1 + len(ATTENTION)))
            finally:
                hook.remove()
        if self.folded is not None:
            features.append(self.folded(images))
        return torch.stack(features, dim=1)

    def split(self, features: Tensor) -> dict[str, Tensor]:
        """The features [n, D] of each of ``names``, out of all of them [n, V, D]."""
        return dict(zip(self.names, features.unbind(1), strict=True))


def _all_variants(block: Any, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
    """In place of the block's output [B, C, H, W]: that and the three others, [4·B, C, H, W]."""
    x = inputs[0].to(y.dtype)
    # Logits of 0 make uniform rows, by the same kernel and in the same precision as the block's own.
    no_query = torch.zeros_like(block.query.weight)
    weights = no_query, block.key.weight, block.value.weight, block.out.weight
    uniform = self_attention2d(inputs[0], *weights, block.gamma, backend=block.backend)
    # With its rows exchanged the map gives position j what it gave position π(j): γ·a = y − x moves there.
    order = torch.randperm(x.shape[2:].numel(), generator=torch.Generator().manual_seed(_SEED)).to(x.device)
    shuffled = x + (y - x).flatten(2)[:, :, order].view_as(x)
    return torch.cat([y, x, uniform, shuffled])
