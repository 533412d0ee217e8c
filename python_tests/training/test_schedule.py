"""Rates as a function of the position."""

import itertools
import math

import pytest

from sabmn_ext.training.schedule import rate_factor


def test_step_decay_starts_after_the_milestone():
    def factor(epoch):
        return rate_factor(epoch * 202, epoch, 260 * 202, kind="step", milestones=[160], factor=0.1)

    assert [factor(e) for e in (1, 160)] == [1.0, 1.0]
    assert factor(161) == pytest.approx(0.1)
    assert factor(260) == pytest.approx(0.1)
    assert rate_factor(0, 90, 100, milestones=[40, 70], factor=0.1) == pytest.approx(0.01)


def test_warm_up_is_linear_and_meets_the_schedule():
    factors = [rate_factor(step, 1, 1000, kind="constant", warmup_steps=4) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rate_factor(1, 200, 1000, milestones=[160], factor=0.1, warmup_steps=4) == pytest.approx(0.05)


def test_cosine_falls_from_one_to_zero_after_the_warm_up():
    factors = [rate_factor(step, 1, 110, kind="cosine", warmup_steps=10) for step in range(110)]
    assert factors[9] == factors[10] == 1.0
    assert factors[60] == pytest.approx(0.5)
    assert factors[109] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.99)))
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert rate_factor(500, 1, 110, kind="cosine") == pytest.approx(0.0)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="expected step, cosine or constant"):
        rate_factor(0, 1, 10, kind="linear")
