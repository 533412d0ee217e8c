"""Numbers below the smallest normal one: zero to the softmax of the CPU kernels, kept everywhere else."""

import pytest
import torch
from attention_cases import Inputs, call, check, draw, with_gradients
from instruction_sets import ISAS, instruction_set, needs_native
from torch import Tensor

pytestmark = needs_native
SIZES = (2, 16, 5, 7, 3, 16, False)  # and the output projection


def subnormal(shape: torch.Size, dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of both signs from the whole subnormal range."""
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((2 * drawn - 1) * torch.finfo(dtype).smallest_normal).to(dtype)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gamma_zero_keeps_them(isa: str, dtype: torch.dtype, projection: bool, seed: int) -> None:
    inputs = draw((*SIZES, projection), seed, dtype)
    inputs[0], grad_y = (subnormal(inputs[0].shape, dtype, 2 * seed + i) for i in range(2))
    inputs[5] = torch.zeros_like(inputs[5])
    with instruction_set(isa):
        y, grad_x, *_ = with_gradients(lambda t: call(t, "cpu"), inputs, grad_y)
    assert torch.equal(y, inputs[0])
    assert torch.equal(grad_x, grad_y)


@pytest.mark.parametrize("isa", ISAS)
def test_float16_keeps_its_own(isa: str, seed: int) -> None:
    """Queries and values that are subnormal in float16 are normal numbers in float32, where they are multiplied."""

    def small(draw_seed: int) -> Inputs:
        inputs = draw((*SIZES, False), draw_seed, torch.float16)
        x, w_query, w_key, w_value = inputs[:4]
        x[:, :8] = subnormal(x[:, :8].shape, torch.float16, draw_seed)
        x[:, 8:] *= 300
        w_query[:, 8:], w_key[:, :8], w_value[:, 8:] = 0, 0, 0
        w_key *= 20
        return inputs

    with instruction_set(isa):
        check([small(100 * seed + i) for i in range(24)], "cpu")


@pytest.mark.parametrize("flushes", [False, True])
def test_the_threads_keep_their_mode(flushes: bool, seed: int) -> None:
    before = torch.get_num_threads()
    inputs = draw((*SIZES, True), seed, torch.float32)
    grad_y = torch.ones_like(inputs[0])
    tiny = torch.full((1 << 20,), 1e-40)
    torch.set_num_threads(2)
    try:
        assert torch.set_flush_denormal(flushes) or not flushes
        with_gradients(lambda t: call(t, "cpu"), inputs, grad_y)
        kept = (tiny * 1).count_nonzero()
        alone = (tiny[:1] * 1).count_nonzero()
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert alone == (not flushes)
    assert flushes or kept == tiny.numel()
