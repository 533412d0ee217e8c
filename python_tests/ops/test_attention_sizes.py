"""The attention kernel up to 16,384 positions and width 2,048; its exponential, NaN and infinity."""

import pytest
import torch
from attention_cases import Inputs, call, check, draw, literal, with_gradients
from float64_rule import assert_close_to_float64
from instruction_sets import ISAS, instruction_set, needs_native

from sabmn_ext import _native
from sabmn_ext.ops import dispatch, reference

pytestmark = needs_native


# float32 runs under avx512_bf16 as under avx512; test_attention_pairs.py holds the two against each other.
@pytest.fixture(params=ISAS[:-1])
def isa(request: pytest.FixtureRequest):
    with instruction_set(request.param):
        yield request.param


# B, C, H, W, key width, value width. Above 512 positions the backward cuts the keys into parts, above 4,096 into longer
# ones.
MANY_POSITIONS = [(2, 9, 27, 41, 5, 6), (1, 5, 103, 5, 17, 3), (3, 4, 1, 1031, 2, 4), (1, 3, 67, 64, 2, 2)]
WIDE = [(2, 20, 5, 3, 300, 7), (1, 9, 4, 11, 3, 515), (1, 40, 3, 23, 2048, 2048), (2, 2048, 3, 2, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [*MANY_POSITIONS, *WIDE], ids=str)
def test_positions_and_widths(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Many draws: wide keys give sharp rows, whose few ties make the error, of plain torch's too."""
    check([draw((*sizes, True, True), 100 * seed + i, dtype) for i in range(24)], "cpu")


@pytest.mark.usefixtures("isa")
def test_parts_of_keys_under_every_instruction_set(seed: int) -> None:
    check([draw((*MANY_POSITIONS[0], True, True), 10 * seed + i, torch.float32) for i in range(2)], "cpu")


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_16384_positions(dtype: torch.dtype, seed: int) -> None:
    """Against the reference in blocks, in float64: no one could hold the map.

    y and x's gradient, which depends on all that a position has, go by the rule. A weight's or bias's gradient is few
    numbers, whose terms cancel: of them one draw says little about plain torch's error. In float32 they are held
    against the length of all of them.
    """
    inputs = draw((1, 4, 128, 128, 2, 3, True, True), seed, dtype)
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    doubles = [None if t is None else t.double() for t in inputs]
    exact = with_gradients(lambda t: call(t, "torch"), doubles, grad_y.to(dtype).double())
    plain = with_gradients(lambda t: call(t, "torch"), inputs, grad_y.to(dtype))
    ours = with_gradients(lambda t: call(t, "cpu"), inputs, grad_y.to(dtype))
    for our, other, truth in list(zip(ours, plain, exact, strict=True))[:2]:
        assert_close_to_float64(our, other, truth)
    if dtype == torch.float32:
        few, right = (torch.cat([t.double().flatten() for t in gradients[2:]]) for gradients in (ours, exact))
        assert (few - right).norm() <= 1e-4 * right.norm()


@pytest.mark.parametrize("sizes", [MANY_POSITIONS[0], WIDE[0]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(sizes: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    """Parts of the keys included, of which more are worked on at the same time with more threads."""
    before = torch.get_num_threads()
    inputs = draw((*sizes, True, True), seed, dtype)
    grad_y = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(with_gradients(lambda t: call(t, "cpu"), inputs, grad_y))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def exponential(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the kernels of ``dtype`` compute it of x, float64 for float64 and else float32."""
    result = torch.empty_like(x)
    code = dispatch.DTYPE_CODES[dtype]
    assert _native.module.attention_exponential(code, x.data_ptr(), result.data_ptr(), x.numel()) == 0
    return result


@pytest.mark.parametrize(
    ("dtype", "constant", "linear"),
    [(torch.float32, 22, 25), (torch.float64, 50, 53), (torch.bfloat16, 13, 25)],
    ids=str,
)
def test_exponential_within_its_stated_error(
    isa: str, dtype: torch.dtype, constant: int, linear: int, seed: int
) -> None:
    linear -= 2 * (isa == "baseline")  # it has no fused multiply-add
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(1_000_003, generator=generator, dtype=torch.float64)
    wide = reference.wide(dtype)
    x = torch.cat((-uniform, -87 * uniform, -uniform.pow(8))).to(wide)
    truth = x.double().exp()
    error = ((exponential(x, dtype).double() - truth) / truth).abs()
    assert (error <= 2.0**-constant + x.double().abs() * 2.0**-linear).all(), error.max()
    edges = torch.tensor([0.0, -0.0, -1e4, -1e30, -float("inf"), float("nan")], dtype=wide)
    result = exponential(edges, dtype)
    assert result[:5].tolist() == [1, 1, 0, 0, 0]
    assert result[5].isnan()


def special(inputs: Inputs, value: float) -> Inputs:
    inputs[0] = inputs[0].clone()
    inputs[0][0, 1, 2, 3] = value
    return inputs


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.usefixtures("isa")
def test_nan_and_infinity_go_where_they_go_in_plain_torch(value: float, seed: int) -> None:
    """The image that holds one is not finite in the same places; the other images do not notice."""
    sizes = (2, 6, 9, 17, 3, 4, True, True)
    inputs = special(draw(sizes, seed, torch.float32), value)
    ours, plain = call(inputs, "cpu"), literal(inputs)
    assert torch.equal(ours.isfinite(), plain.isfinite())
    assert not ours[0].isfinite().all()
    torch.testing.assert_close(ours[1], plain[1], rtol=1e-4, atol=1e-4)
