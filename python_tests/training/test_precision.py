"""A run in 16 bits says so where they are slower than float32."""

import pytest
import torch

from sabmn_ext.training import precision
from sabmn_ext.training.precision import slow_precision, times_as_long


@pytest.mark.parametrize(("ratio", "told"), [(0.5, False), (1.05, False), (1.26, True)])
def test_what_is_told(monkeypatch, ratio, told):
    monkeypatch.setattr(precision, "times_as_long", lambda name: ratio)
    note = slow_precision("bf16", torch.device("cpu"))
    assert bool(note) == told
    if told:
        assert note.startswith("run.precision = bf16: on this processor a convolution takes 1.3 times as long")


def test_nothing_is_timed_where_there_is_no_question(monkeypatch):
    monkeypatch.setattr(precision, "times_as_long", None)
    assert slow_precision("fp32", torch.device("cpu")) is None
    assert slow_precision("bf16", torch.device("cuda")) is None


def test_the_ratio_is_of_the_two_times(monkeypatch):
    """By a clock of our own: in float32 a call takes 2 s, in 16 bits 3 s; the first call of each is not counted."""
    readings = iter([0.0, 0.0, 10.0, 12.0, 20.0, 23.0, 30.0, 32.0, 40.0, 43.0])
    monkeypatch.setattr(precision, "time", type("Clock", (), {"perf_counter": lambda: next(readings)}))
    real, dtypes = precision.F.conv2d, []

    def conv2d(*args, **keys):
        y = real(*args, **keys)
        dtypes.append(y.dtype)
        return y

    monkeypatch.setattr(precision.F, "conv2d", conv2d)
    assert times_as_long("bf16", rounds=2) == pytest.approx(1.5)
    assert dtypes == [torch.float32, torch.bfloat16] * 3
