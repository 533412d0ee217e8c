"""The traffic that benchmarks/attention_traffic.py computes: near its floor, linear, and of the compiled plan."""

import random

import attention_traffic
import pytest

from sabmn_ext import _native


@pytest.mark.parametrize("stage", attention_traffic.STAGES)
def test_every_launch_is_near_its_floor(stage: int) -> None:
    channels, positions, width = attention_traffic.STAGES[stage]
    launches = attention_traffic.traffic(64, channels, positions, width, width)
    assert [sum(name.startswith(way) for name in launches) for way in ("forward", "backward")] == [2, 6]
    # Without atomics 7 products instead of 5; and where there are few images two blocks find the same attention, each
    # for half of the output's channels, which was measured to be faster.
    most = {"backward attention": 7 / 5 if positions > attention_traffic.BLOCK_POSITIONS else 1.15}
    most["forward attention"] = 1.2 if positions <= 128 else 1.15
    for name, launch in launches.items():
        assert launch.floor <= launch.distinct <= 1.25 * launch.floor, name
        if launch.least:
            assert launch.least <= launch.mma <= most.get(name, 1.15) * launch.least, name
    forward = [launch for name, launch in launches.items() if name.startswith("forward")]
    assert sum(launch.mma for launch in forward) <= 1.15 * sum(launch.least for launch in forward)


@pytest.mark.parametrize("stage", attention_traffic.STAGES)
def test_traffic_is_linear_in_the_batch(stage: int) -> None:
    channels, positions, width = attention_traffic.STAGES[stage]
    one, two, three = (attention_traffic.traffic(b, channels, positions, width, width) for b in (256, 512, 768))
    for name in one:
        if name not in ("backward weights", "backward sums"):  # whose groups of images grow in steps
            assert two[name].distinct - one[name].distinct == three[name].distinct - two[name].distinct, name
        assert two[name].mma == 2 * one[name].mma, name


@pytest.mark.skipif(
    not hasattr(_native.module, "attention_backward_cuda_workspace"), reason="the native module was built without CUDA"
)
def test_the_workspace_is_that_of_the_compiled_plan(seed: int) -> None:
    generator = random.Random(seed)
    for _ in range(100):
        sizes = [generator.randint(1, most) for most in (70, 2100, 600, 300, 300)]
        assert _native.module.attention_backward_cuda_workspace(*sizes, True) == attention_traffic.workspace(*sizes)
