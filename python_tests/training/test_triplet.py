"""The batch-hard triplet loss against a loop over all triplets in float64."""

import math

import pytest
import torch
from float64_rule import assert_close_to_float64

from sabmn_ext.training.triplet import batch_hard_triplet_loss

MARGINS = [None, 0.3, 2.0]


def brute_force(features, labels, margin):
    """The definition, triplet by triplet: the largest of all terms of an anchor is the one with the hardest images."""
    losses = []
    for a, label in enumerate(labels.tolist()):
        terms = [torch.zeros((), dtype=features.dtype)]
        for p, other in enumerate(labels.tolist()):
            for n, third in enumerate(labels.tolist()):
                if other == label != third:
                    to_p = (features[a] - features[p]).square().sum().sqrt() if a != p else 0.0
                    gap = to_p - (features[a] - features[n]).square().sum().sqrt()
                    term = torch.log1p(gap.exp()) if margin is None else (margin + gap).clamp(min=0)
                    terms.append(term)
        losses.append(torch.stack(terms).max())
    return sum(losses) / len(losses)


@pytest.fixture
def case(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor([3, 0, 7, 3, 0, 3, 0, 9, 3, 7, 7])  # groups of 4, 3, 3 and one without another positive
    features = torch.randn(11, 5, generator=generator, dtype=torch.float64) + labels[:, None] / 9
    return features, labels


@pytest.mark.parametrize("margin", MARGINS)
def test_equals_the_loop_over_all_triplets(case, margin):
    features, labels = case
    expected_at = features.clone().requires_grad_()
    expected = brute_force(expected_at, labels, margin)
    expected.backward()
    for dtype in (torch.float64, torch.float32):
        ours, plain = (features.to(dtype, copy=True).requires_grad_() for _ in range(2))
        loss, plain_loss = batch_hard_triplet_loss(ours, labels, margin), brute_force(plain, labels, margin)
        loss.backward()
        plain_loss.backward()
        assert loss.shape == ()
        assert_close_to_float64(loss.detach(), plain_loss.detach(), expected.detach())
        assert_close_to_float64(ours.grad, plain.grad, expected_at.grad)
    assert expected_at.grad.abs().max() > 0


@pytest.mark.parametrize("margin", MARGINS)
def test_a_strided_slice_and_gradcheck(case, margin):
    features, labels = case
    wide = torch.stack((features, features.flip(0)), dim=-1)[..., 0]  # stride 2
    assert not wide.is_contiguous()
    assert torch.equal(batch_hard_triplet_loss(wide, labels, margin), batch_hard_triplet_loss(features, labels, margin))
    assert torch.autograd.gradcheck(lambda f: batch_hard_triplet_loss(f, labels, margin), features.requires_grad_())


@pytest.mark.parametrize(("margin", "expected"), [(0.3, 0.3), (None, math.log(2))])
def test_features_that_have_collapsed_have_a_finite_gradient(margin, expected):
    features = torch.ones(6, 4, requires_grad=True)
    loss = batch_hard_triplet_loss(features, torch.tensor([0, 0, 1, 1, 2, 2]), margin)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(features.grad, torch.zeros(6, 4))


@pytest.mark.parametrize("margin", MARGINS)
def test_one_identity_alone_has_no_triplets(margin):
    features = torch.randn(4, 3, requires_grad=True)
    loss = batch_hard_triplet_loss(features, torch.tensor([5, 5, 5, 5]), margin)
    loss.backward()
    assert loss == 0
    assert torch.equal(features.grad, torch.zeros(4, 3))


def test_shapes_that_do_not_fit_are_named():
    for features, labels in ((torch.ones(4, 3), torch.zeros(3)), (torch.ones(4, 3, 1), torch.zeros(4))):
        with pytest.raises(ValueError, match=r"features \[4, 3.*\] and labels \[\d\]: expected \[B, D\] and \[B\]"):
            batch_hard_triplet_loss(features, labels)
