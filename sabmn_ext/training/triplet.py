"""The batch-hard triplet loss (Hermans, Beyer and Leibe, 2017, arXiv:1703.07737, equation 5)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def batch_hard_triplet_loss(features: Tensor, labels: Tensor, margin: float | None = None) -> Tensor:
    """The mean over all images a of ℓ(max_p D(a, p) − min_n D(a, n)), with the Euclidean distance D.

    p runs over the images of a's identity, a itself included, and n over those of all others. ℓ(x) is
    max(0, margin + x), or the soft margin log(1 + exp(x)). An image for which there is no n counts 0.

    Args:
        features: [B, D], floating.
        labels: [B], whole numbers, on the same device.
        margin: None for the soft margin.

    Returns:
        0-dim, of the features' dtype. Where the hardest image lies at distance 0 that distance has no gradient.

    Raises:
        ValueError: the shapes are not as above.

    >>> features, labels = torch.tensor([[0.0], [1.0], [3.0], [5.0]]), torch.tensor([0, 0, 1, 1])
    >>> batch_hard_triplet_loss(features, labels, margin=0.5)    # of 0, 0, 0.5, 0
    tensor(0.1250)
    """
    if features.dim() != 2 or labels.shape != features.shape[:1]:
        shapes = f"features {list(features.shape)} and labels {list(labels.shape)}"
        raise ValueError(f"{shapes}: expected [B, D] and [B]")
    same = labels[:, None] == labels  # [B, B]
    with torch.no_grad():  # which images are the hardest; their distances come again below, by a plain difference
        distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
        positives = distances.masked_fill(~same, -math.inf).argmax(1)
        negatives = distances.masked_fill(same, math.inf).argmin(1)
    to_positive, to_negative = ((features - features[hardest]).norm(dim=1) for hardest in (positives, negatives))
    gaps = to_positive - to_negative  # [B]
    losses = F.softplus(gaps) if margin is None else F.relu(margin + gaps)
    return losses.masked_fill(same.all(1), 0).mean()
